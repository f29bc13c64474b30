"""The journal of an analysis: what is finished survives whatever ends the process.

Each finished (block, variant) goes to its own file as soon as it is there; at the end the run is
written beside the folder and the folder is removed. ``docs/file-format.md`` says the same in
prose.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hessdiag.errors import StoreError
from hessdiag.run import BlockResult, Provenance, Run, row_label
from hessdiag.store.atomic import TEMPORARY, sync_folder
from hessdiag.store.folder import (
    BLOCK,
    HEADER,
    LOCK,
    MATRIX,
    block_name,
    check_folder,
    clear,
    listed,
    parts_folder,
    remove,
    take_lock,
)
from hessdiag.store.identity import check_same, differing
from hessdiag.store.parts import Finished, damaged, read_block, read_part, write_block, write_part
from hessdiag.store.read import read_run
from hessdiag.store.write import write_run


@dataclass(frozen=True)
class Header:
    """What every part belongs to.

    Attributes:
        fingerprint: Of the analysis.
        config: Its options.
        blocks: Names of those to analyse, in the order of the run.
        variants: Of the run.
        forced: It was begun with ``--force``.
        created_at: When it was begun.
        hessdiag_version: The release that began it.
    """

    fingerprint: dict[str, Any]
    config: dict[str, Any]
    blocks: list[str]
    variants: list[str]
    forced: bool
    created_at: str
    hessdiag_version: str

    def progress(self, finished: Container[tuple[str, str]]) -> tuple[int, str]:
        """How many rows are finished, and that in words: ``3 of 14 rows``, or blocks of raw."""
        pairs = [(block, variant) for block in self.blocks for variant in self.variants]
        count = sum(pair in finished for pair in pairs)
        return count, f"{count} of {len(pairs)} {'rows' if len(self.variants) > 1 else 'blocks'}"


@dataclass
class Journal:
    """An analysis under way, which holds the lock of its folder.

    Attributes:
        path: The run to be.
        header: What the parts belong to.
        finished: By (block, variant).
    """

    path: Path
    header: Header
    finished: dict[tuple[str, str], Finished]
    _lock: int | None = field(repr=False)

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return parts_folder(self.path)

    def add(self, done: Finished) -> None:
        """Keep one finished (block, variant).

        Raises:
            OutOfResources: The disk is full.
            StoreError: The folder cannot be written.
        """
        index = self.header.blocks.index(done.block.name)
        write_block(self.folder / block_name(index, done.variant), done, self.header.fingerprint)
        self.finished[done.block.name, done.variant] = done

    def keep_matrix(self, matrix: NDArray[Any]) -> None:
        """Keep the matrix of the whole network, from which the layers are cut, bit for bit.

        Raises:
            OutOfResources: The disk is full.
            StoreError: The folder cannot be written.
        """
        document = {"fingerprint": self.header.fingerprint}
        write_part(self.folder / MATRIX, document, {"matrix": matrix})

    def load_matrix(self, size: int) -> NDArray[Any] | None:
        """What :meth:`keep_matrix` kept, ``size`` by ``size``, or None.

        Raises:
            StoreError: It is damaged, or another analysis's.
        """
        path = self.folder / MATRIX
        if not os.path.lexists(path):
            return None
        document, arrays = read_part(path)
        _check_part(path, document.get("fingerprint"), self.header)
        matrix = arrays.get("matrix")
        if matrix is None or matrix.shape != (size, size) or not np.isfinite(matrix).all():
            raise damaged(path, f"it holds no matrix of {size}×{size} numbers")
        return matrix

    def finish(self, run: Run, *, force: bool, keep_matrix: bool) -> list[str]:
        """Write the run, then remove the folder.

        Args:
            run: All blocks.
            force: Replace a run that is there.
            keep_matrix: Blocks are left that a later command will cut from it.
        Returns:
            Names of files that hessdiag did not write; they stay.
        Raises:
            OutOfResources: The disk is full; the parts stay.
            StoreError: The run cannot be written; the parts stay.
        """
        write_run(run, self.path, force=force, scratch=self.folder)
        keep_matrix = keep_matrix and (self.folder / MATRIX).exists()
        left = clear(
            self.folder, keep=frozenset({HEADER, LOCK, MATRIX}) if keep_matrix else frozenset()
        )
        self.release()
        return left

    def kept(self) -> str | None:
        """What an interrupted user must know; None where nothing was finished yet."""
        if self._lock is None:
            return None
        there = set(self.finished)
        with contextlib.suppress(StoreError, OSError):
            names = listed(self.folder)
            for index, block in enumerate(self.header.blocks):
                # One may have been moved to its place a moment before the interrupt.
                there |= {(block, v) for v in self.header.variants if block_name(index, v) in names}
        count, told = self.header.progress(there)
        if not count:
            return None
        return (
            f"{told} {'is' if count == 1 else 'are'} finished and kept "
            f"in {self.folder}; the same command resumes"
        )

    def release(self) -> None:
        """Free the lock; a folder without anything finished is removed."""
        if self._lock is None:
            return
        lock, self._lock = self._lock, None
        try:
            with contextlib.suppress(StoreError, OSError):
                names = listed(self.folder)
                if MATRIX not in names and not any(BLOCK.fullmatch(name) for name in names):
                    clear(self.folder)
        finally:
            os.close(lock)


def open_journal(
    path: Path,
    *,
    fingerprint: Mapping[str, Any],
    config: Mapping[str, Any],
    blocks: Sequence[str],
    variants: Sequence[str],
    created_at: str,
    hessdiag_version: str,
    force: bool,
) -> Journal:
    """Begin the journal of the run at ``path``, or go on with the one that is there.

    Args:
        path: The run to be.
        fingerprint: Of the analysis.
        config: Its options, for ``show``.
        blocks: Names of those to analyse, in the order of the run.
        variants: Of the run.
        created_at: Now.
        hessdiag_version: This release.
        force: Begin anew, unless what is there was begun with ``force`` too and is the same:
            then this is the same command again, and it resumes.
    Raises:
        StoreError: Another process is at it; the folder is not ours, cannot be written, or holds
            another analysis; a part is damaged.
        OutOfResources: The disk is full.
    """
    check_folder(path)
    folder = parts_folder(path)
    wanted = Header(
        fingerprint=json.loads(json.dumps(fingerprint)),  # as it will be read back
        config=dict(config),
        blocks=list(blocks),
        variants=list(variants),
        forced=force,
        created_at=created_at,
        hessdiag_version=hessdiag_version,
    )
    lock = take_lock(path)
    try:
        header = _agreed(folder, wanted)
        for name in listed(folder):
            if TEMPORARY.fullmatch(name):
                remove(folder / name)
        if header is None:
            clear(folder, keep=frozenset({LOCK}))
            write_part(folder / HEADER, vars(wanted))
            sync_folder(path.parent)
            header = wanted
        return Journal(path, header, _finished(folder, header), lock)
    except BaseException:
        try:
            if not os.path.lexists(folder / HEADER):
                with contextlib.suppress(StoreError, OSError):
                    clear(folder)
        finally:
            os.close(lock)
        raise


def _agreed(folder: Path, wanted: Header) -> Header | None:
    """The header in the folder, to go on with; None to begin anew.

    Raises:
        StoreError: It is another analysis's, and ``wanted`` is not forced.
    """
    if not os.path.lexists(folder / HEADER):
        return None
    header = read_header(folder)
    if wanted.forced:
        same = header.forced and not differing(header.fingerprint, wanted.fingerprint)
        return header if same and header.hessdiag_version == wanted.hessdiag_version else None
    check_same(header.fingerprint, wanted.fingerprint, folder)
    if header.hessdiag_version != wanted.hessdiag_version:
        raise StoreError(
            f"{folder} was begun by hessdiag {header.hessdiag_version}, this is "
            f"{wanted.hessdiag_version}; go on with that release, or begin anew with --force"
        )
    return header


def read_header(folder: Path) -> Header:
    """What the parts in ``folder`` belong to.

    Raises:
        StoreError: It is damaged.
    """
    path = folder / HEADER
    try:
        document, _ = read_part(path)
        header = Header(**{name: document[name] for name in Header.__dataclass_fields__})
        _check_types(header)
    except (StoreError, KeyError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged, so the finished blocks beside it cannot be trusted; "
            f"remove the folder {folder} to begin anew, or choose another place with -o/--output"
        ) from error
    return header


def _check_types(header: Header) -> None:
    """Refuse a header whose entries are of other types than were written.

    Raises:
        ValueError: The first that is.
    """
    kinds: dict[str, type] = {"fingerprint": dict, "config": dict, "forced": bool}
    kinds |= {"blocks": list, "variants": list, "created_at": str, "hessdiag_version": str}
    for name, kind in kinds.items():
        if not isinstance(getattr(header, name), kind):
            raise ValueError(f"its {name} is no {kind.__name__}")
    if not all(isinstance(name, str) for name in (*header.blocks, *header.variants)):
        raise ValueError("a block or a variant has no name")


def _finished(folder: Path, header: Header) -> dict[tuple[str, str], Finished]:
    """The parts in ``folder``; names that hessdiag does not write are left alone."""
    finished: dict[tuple[str, str], Finished] = {}
    for name in listed(folder):
        if not BLOCK.fullmatch(name):
            continue
        path = folder / name
        done, fingerprint = read_block(path)
        _check_part(path, fingerprint, header)
        known = done.block.name in header.blocks and done.variant in header.variants
        if not known or name != block_name(header.blocks.index(done.block.name), done.variant):
            raise damaged(path, f"it holds the block {done.block.name!r}, {done.variant}")
        finished[done.block.name, done.variant] = done
    return finished


def _check_part(path: Path, fingerprint: Any, header: Header) -> None:
    if not isinstance(fingerprint, dict):
        raise damaged(path, "it does not say of which analysis it is")
    ours = header.fingerprint
    fields = sorted(n for n in {*fingerprint, *ours} if fingerprint.get(n) != ours.get(n))
    if fields:
        raise damaged(path, f"it is of another analysis: {', '.join(fields)}")


def is_unfinished(path: str | Path) -> bool:
    """Whether there is no run at ``path``, but parts of one."""
    path = Path(path)
    return not os.path.lexists(path) and os.path.lexists(parts_folder(path) / HEADER)


def open_run(path: str | Path) -> Run:
    """The run at ``path``; of an unfinished one, the blocks that are done and a warning.

    Raises:
        StoreError: There is no such file, it is foreign, or it is damaged.
        UnknownSchema: Another major version wrote it.
    """
    folder = parts_folder(Path(path))
    if not is_unfinished(path):
        if not os.path.lexists(path) and folder.is_dir():
            raise StoreError(
                f"{path} does not exist, and {folder} beside it has no {HEADER}, so its blocks "
                "cannot be read; remove that folder and analyse again"
            )
        return read_run(path)
    header = read_header(folder)
    finished = _finished(folder, header)
    engines = {row_label(*key): done.engine for key, done in finished.items()}
    seconds = {row_label(*key): done.seconds for key, done in finished.items()}
    blocks = []
    for name in header.blocks:
        parts = [finished[name, v].block for v in header.variants if (name, v) in finished]
        if parts:
            merged = {v: result for part in parts for v, result in part.variants.items()}
            blocks.append(BlockResult(name, parts[0].parameters, merged))
    warning = (
        f"unfinished: {header.progress(finished)[1]} are finished; "
        f"the same `hessdiag analyze` resumes"
    )
    return Run(
        blocks=tuple(blocks),
        variants=tuple(header.variants),
        provenance=Provenance(
            config=header.config,
            environment={"engine": engines, "seconds": seconds},
            fingerprint=header.fingerprint,
            warnings=[warning],
        ),
        created_at=header.created_at,
        hessdiag_version=header.hessdiag_version,
    )


def remove_leftover(run: Run, path: Path) -> list[str]:
    """Remove the folder that a kill left after ``run`` was moved to ``path``.

    A later analysis with ``--force`` may be unfinished in it; that one stays, as does a folder
    that is in use or cannot be read.

    Returns:
        Names of files that hessdiag did not write; they stay.
    """
    folder = parts_folder(path)
    with contextlib.suppress(StoreError, OSError):
        if not os.path.lexists(folder / HEADER):
            return []
        check_folder(path)
        header = read_header(folder)
        if header.fingerprint == run.provenance.fingerprint and header.created_at <= run.created_at:
            lock = take_lock(path)
            try:
                return clear(folder)
            finally:
                os.close(lock)
    return []
