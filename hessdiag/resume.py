"""What is there already at the output of an analysis, and what is left to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hessdiag
from hessdiag.blocks import Block
from hessdiag.finished import FinishedRows, finished_rows, is_complete, still_good
from hessdiag.options import Options
from hessdiag.progress import Event, Report
from hessdiag.run import Run
from hessdiag.store.folder import parts_folder
from hessdiag.store.identity import check_same
from hessdiag.store.journal import Journal, open_journal, remove_leftover
from hessdiag.store.read import is_run, read_run
from hessdiag.variants.grammar import RAW


@dataclass(frozen=True)
class Begun:
    """Where an analysis starts.

    Attributes:
        run: The stored run, when it is this one and leaves nothing to do.
        finished: Rows that are taken as they are.
        journal: Takes the new ones; None when nothing is to be written.
        replace: A run is there that the new one may replace.
    """

    run: Run | None
    finished: FinishedRows
    journal: Journal | None
    replace: bool


def begin(
    output: Path | None,
    fingerprint: dict[str, Any],
    config: dict[str, Any],
    blocks: Sequence[Block],
    options: Options,
    report: Report,
    *,
    force: bool,
) -> Begun:
    """Look at ``output`` and open its journal.

    Args:
        output: The run to be, or None.
        fingerprint: Of the analysis.
        config: Its options, for the record.
        blocks: Those to analyse.
        options: Of the analysis.
        report: Hears how much is finished.
        force: Take nothing over, and replace the run that is there.
    Raises:
        StoreError: Another analysis is there, or at work there; or the output cannot be written.
        OutOfResources: The disk is full.
    """
    if output is None:
        return Begun(None, {}, None, replace=False)
    stored = None if force else _stored(output, fingerprint)
    if stored is not None and is_complete(stored, options):
        tell_left(report, output, remove_leftover(stored, output))
        return Begun(stored, {}, None, replace=False)
    journal = open_journal(
        output,
        fingerprint=fingerprint,
        config=config,
        blocks=[block.name for block in blocks],
        variants=options.variants or (RAW,),
        created_at=now(),
        hessdiag_version=hessdiag.__version__,
        force=force,
    )
    try:
        # Whoever held the lock until now may have finished this very run.
        stored = None if force else _stored(output, fingerprint)
        if stored is not None and is_complete(stored, options):
            journal.release()
            return Begun(stored, {}, None, replace=False)
        known = ({} if stored is None else finished_rows(stored)) | journal.finished
        finished = {key: done for key, done in known.items() if still_good(done, options)}
        journal.finished = dict(finished)
        count, told = journal.header.progress(finished)
        if count:
            report(Event(message=f"resuming: {told} were finished"))
        return Begun(None, finished, journal, replace=force or stored is not None)
    except BaseException:
        journal.release()
        raise


def tell_left(report: Report, output: Path, names: list[str]) -> None:
    """Say why the folder of the parts is still there."""
    if names:
        shown = ", ".join(repr(name) for name in names[:4]) + (", …" if len(names) > 4 else "")
        folder = parts_folder(output)
        report(Event(message=f"notice: {folder} stays, for hessdiag did not write {shown}"))


def now() -> str:
    """The time to note, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _stored(output: Path, fingerprint: dict[str, Any]) -> Run | None:
    """The run at ``output``, complete or not, when it is this one; None where there is none.

    Raises:
        StoreError: Another analysis is there.
    """
    if not is_run(output):
        return None
    stored = read_run(output)
    check_same(stored.provenance.fingerprint, fingerprint, output)
    return stored
