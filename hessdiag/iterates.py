"""The checkpoints along a training: found by a pattern, in the order of their steps."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from hessdiag.checkpoint import match_weights, read_checkpoint
from hessdiag.errors import OptionError
from hessdiag.fingerprint import hash_tensors
from hessdiag.names import clean_name
from hessdiag.series import named_step

NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Iterate:
    """One checkpoint of the trajectory; its tensors are read when they are asked for.

    Attributes:
        path: The file, or the directory.
        step: Training steps done: what the file says, else a number in its name.
        digest: Hash of its tensors.
        trust: It may be a pickled module, which runs code when it is read.
    """

    path: Path
    step: int
    digest: str
    trust: bool = False

    def load(self, model: nn.Module) -> dict[str, Tensor]:
        """The parameters there, by their first names, in the dtype and on the device of ``model``.

        The model is only read. Buffers are left out: along the trajectory the loss is one
        function of the parameters, that with the buffers of the analysed checkpoint.

        Raises:
            CheckpointError: The file is unreadable, of another architecture, or not finite; the
                message names it, and the tensors.
        """
        weights = match_weights(read_checkpoint(self.path, trust=self.trust), model).weights
        return {
            clean_name(name): weights[name].detach().to(parameter.device, parameter.dtype)
            for name, parameter in model.named_parameters()
        }


def find_iterates(
    pattern: str, model: nn.Module | None = None, *, trust: bool = False
) -> list[Iterate]:
    """The checkpoints that ``pattern`` matches, by ascending step.

    Args:
        pattern: Of files or Hugging Face directories, such as ``iterates/*.pt``; ``**`` goes
            through folders, ``~`` is the home. A path that exists is meant as it is.
        model: What all of them must fit; None leaves that to :meth:`Iterate.load`.
        trust: Allow pickled modules.

    Raises:
        OptionError: Nothing matches; the order is not to be told, because a file has neither a
            step nor a number in its name; or two that differ have the same step.
        CheckpointError: One cannot be read, or does not fit ``model``.

    Cost:
        Every file is read once, one at a time.
    """
    plain = os.path.expanduser(pattern)  # noqa: PTH111  a pattern is no path
    paths = [Path(plain)] if os.path.lexists(plain) else _matches(plain)
    if not paths:
        raise OptionError(
            f"no file matches --iterates {pattern!r} (in {Path.cwd()}); give the checkpoints of "
            "the training, in quotes, as --iterates 'iterates/*.pt'"
        )
    if len(paths) == 1 and paths[0].is_dir() and not (paths[0] / "config.json").exists():
        raise OptionError(
            f"--iterates {pattern!r} is a folder; give a pattern of the files in it, as "
            f"--iterates '{paths[0] / '*.pt'}'"
        )
    # By the numbers that it holds, one checkpoint may lie there twice: model.pt and its iterate.
    distinct = {(i.step, i.digest): i for i in (_examined(p, model, trust=trust) for p in paths)}
    found = sorted(distinct.values(), key=lambda iterate: iterate.step)
    for left, right in pairwise(found):
        if left.step == right.step:
            raise OptionError(
                f"{left.path} and {right.path} are both of step {left.step} and differ, so their "
                "order is not known; match one training and each of its steps once, and store the "
                "step in the file ({'model': …, 'step': 100}) where the name does not tell it"
            )
    return found


def digest(iterates: Sequence[Iterate]) -> str:
    """One hash of the steps and tensors of a trajectory, for the fingerprint."""
    listed = json.dumps([[iterate.step, iterate.digest] for iterate in iterates])
    return hashlib.sha256(listed.encode()).hexdigest()


def _matches(pattern: str) -> list[Path]:
    try:
        return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    except (ValueError, re.error) as error:
        raise OptionError(f"--iterates {pattern!r} is no pattern of files: {error}") from error


def _examined(path: Path, model: nn.Module | None, *, trust: bool) -> Iterate:
    checkpoint = read_checkpoint(path, trust=trust)
    if model is not None:
        match_weights(checkpoint, model)
    step = checkpoint.step if checkpoint.step is not None else _number(path)
    if step is None:
        raise OptionError(
            f"{path} holds no step and has no number in its name, so its place among the iterates "
            "is not known; name it by its step (step-100.pt), or store {'model': …, 'step': 100}"
        )
    return Iterate(path, step, hash_tensors(checkpoint.weights), trust)


def _number(path: Path) -> int | None:
    """The step in the name of a checkpoint, else the last number there."""
    name = path.stem if not path.suffix[1:].isdecimal() else path.name
    told = named_step(path.name)
    numbers = NUMBER.findall(name)
    return told if told is not None or not numbers else int(numbers[-1])
