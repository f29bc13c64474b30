"""Several checkpoints in one command: where each run goes, and what is checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hessdiag.errors import HessdiagError, OptionError
from hessdiag_cli.resolution import default_output, find_task

if TYPE_CHECKING:
    from hessdiag.checkpoint import Checkpoint
    from hessdiag.resolve import Resolution
    from hessdiag.task import Task


@dataclass(frozen=True)
class Job:
    """A checkpoint, and the run file that it becomes."""

    checkpoint: Path
    output: Path


def plan(checkpoints: Sequence[Path], output: Path | None, shard: str | None = None) -> list[Job]:
    """One run file per checkpoint: ``output``, or the default's name, of several inside it.

    Args:
        checkpoints: To analyse.
        output: As given, or None.
        shard: ``I/N``; the default's name says so.

    Raises:
        OptionError: Two would be the same file; or ``output`` is no folder for several.
    """
    if len(checkpoints) == 1:
        return [Job(checkpoints[0], output or default_output(checkpoints[0], shard))]
    if output is not None and not output.is_dir():
        raise OptionError(
            f"-o {output} is not a directory, which it must be for {len(checkpoints)} checkpoints: "
            f"each gets a run file of its own there; make it first: mkdir -p {output}"
        )
    jobs: list[Job] = []
    taken: dict[Path, Path] = {}
    for checkpoint in checkpoints:
        path = (output or Path()) / default_output(checkpoint, shard)
        if path in taken:
            raise OptionError(
                f"{taken[path]} and {checkpoint} would both be stored in {path}; "
                "analyse them in two commands with -o, or in two folders"
            )
        taken[path] = checkpoint
        jobs.append(Job(checkpoint, path))
    return jobs


class Tasks:
    """The tasks that a command line names; each is loaded once, for a model is lent, not kept."""

    def __init__(self, reference: str | None, arguments: Sequence[str], data: Path | None) -> None:
        self.reference = reference
        self.arguments = arguments
        self.data = data
        self.loaded: dict[str, Task] = {}

    def find(self, checkpoint: Checkpoint) -> Resolution:
        """The task for a checkpoint; no user code runs yet."""
        return find_task(checkpoint, self.reference, self.arguments, self.data)

    def load(self, found: Resolution) -> Task:
        """Run the user's code, unless it has run; one that a checkpoint makes is made anew."""
        if found.build is not None:
            return found.load()
        if found.reference not in self.loaded:
            self.loaded[found.reference] = found.load()
        return self.loaded[found.reference]


def check_all(jobs: Sequence[Job], tasks: Tasks, *, trust: bool) -> None:
    """Refuse what would fail later: every file is read, has a task, fits it and can be stored.

    Raises:
        InputError: The first that cannot be used, by name.
    """
    from hessdiag.checkpoint import match_weights, read_checkpoint
    from hessdiag.curvature.loan import bare
    from hessdiag.store.folder import check_folder
    from hessdiag.store.write import check_target

    for position, job in enumerate(jobs):
        try:
            check_target(job.output, force=True)
            check_folder(job.output)
            source = read_checkpoint(job.checkpoint, trust=trust)
            found = tasks.find(source)
            if found.build is None:  # what a checkpoint makes of itself fits it
                match_weights(source, bare(tasks.load(found).model))
        except HessdiagError as error:
            error.add_note(f"{place(jobs, position)}; nothing was analysed")
            raise


def place(jobs: Sequence[Job], position: int) -> str:
    """Which checkpoint, and how many there are."""
    return f"at {jobs[position].checkpoint}, checkpoint {position + 1} of {len(jobs)}"


def kept(jobs: Sequence[Job], position: int) -> str:
    """What is stored when the checkpoint at ``position`` does not come through."""
    if position == 0:
        return place(jobs, position)
    first, last = jobs[0].output, jobs[position - 1].output
    files = str(first) if position == 1 else f"{first} to {last}"
    runs = "run is" if position == 1 else f"{position} runs are"
    return f"{place(jobs, position)}; the finished {runs} stored in {files}"
