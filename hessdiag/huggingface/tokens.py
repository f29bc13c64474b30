"""Token data for a language model: from a file, or a short text that ships with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hessdiag.checkpoint.torch_file import load
from hessdiag.errors import CheckpointError, InputError

LENGTH = 128
"""Tokens in a row, where neither the data nor the model say."""

ROWS = 8
"""Rows in a batch; ``--batch-size`` cuts anew."""

BYTES = 256
DEMO = "demo.txt"
DEMO_NOTICE = (
    "demo text, not your data: the tokens are the bytes of a short story; "
    "give yours with --data tokens.npy"
)


def demo_tokens() -> Tensor:
    """The shipped text's bytes, int64 ``(n,)``.

    Source:
        Carroll (1865), Alice's Adventures in Wonderland, chapter I; in the public domain.
    """
    return _bytes(files(__package__).joinpath(DEMO).read_bytes())


def read_tokens(path: Path) -> Tensor:
    """Integer tokens from ``.npy`` or ``.pt``, or the bytes of a ``.txt``.

    Returns:
        int64, ``(n,)`` or ``(rows, length)``.
    Raises:
        InputError: The file cannot be read, or holds no such tokens.
    """
    kinds = {".npy": _from_numpy, ".pt": _from_torch, ".txt": _from_text}
    if path.suffix not in kinds:
        raise InputError(
            f"--data {path} must end in {', '.join(kinds)}: integer tokens as numpy or torch "
            "store them, or a text whose bytes are the tokens"
        )
    try:
        found = kinds[path.suffix](path)
    except OSError as error:
        raise InputError(f"--data {path} cannot be read: {error.strerror or error}") from error
    if found.ndim not in (1, 2):
        raise InputError(
            f"--data {path} has shape {tuple(found.shape)}; tokens are one sequence (n,), or rows "
            "of equal length (rows, length)"
        )
    return found


def as_rows(tokens: Tensor, *, length: int | None, longest: int | None, source: str) -> Tensor:
    """One sequence cut into rows, its last incomplete row left out; rows as they are.

    Args:
        tokens: ``(n,)`` or ``(rows, length)``.
        length: Of a row, if the user says; for one sequence only.
        longest: The longest row that the model takes; None without a limit.
        source: What the tokens come from, for messages.
    Raises:
        InputError: There are too few tokens, or rows are too long for the model.
    """
    limit = longest or max(tokens.shape[-1], 2)
    if tokens.ndim == 1:
        wanted = LENGTH if length is None else length
        if length is not None and not 2 <= length <= limit:
            raise InputError(
                f"a row of {length} tokens is not possible; this model takes 2 to {limit}"
            )
        wanted = max(min(wanted, limit, tokens.numel()), 1)
        count = tokens.numel() // wanted
        tokens = tokens[: count * wanted].reshape(count, wanted)
    elif length is not None:
        raise InputError(f"{source} has rows already; length is for one sequence of tokens")
    rows, width = tokens.shape
    if rows == 0 or width < 2:
        raise InputError(
            f"{source} holds too few tokens ({tokens.numel()}): a row needs two, one to predict "
            "the other"
        )
    if width > limit:
        raise InputError(
            f"{source} has rows of {width} tokens, and this model takes at most {limit}; "
            "cut the rows, or give one sequence (n,)"
        )
    return tokens


def check_range(tokens: Tensor, vocabulary: int, source: str) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        InputError: A token lies outside of ``0 … vocabulary - 1``.
    """
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        worst = low if low < 0 else high
        raise InputError(
            f"{source} holds the token {worst}, and the model's vocabulary is 0 to "
            f"{vocabulary - 1}; make the tokens with the tokenizer of this model"
        )


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).astype(np.int64))


def _from_text(path: Path) -> Tensor:
    return _bytes(path.read_bytes())


def _from_numpy(path: Path) -> Tensor:
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(
            f"--data {path} is no array of numpy ({error}); write it with numpy.save"
        ) from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu":
        kind = found.dtype if isinstance(found, np.ndarray) else "an archive"
        raise InputError(f"--data {path} must hold integer tokens, not {kind}")
    if found.size and int(found.max()) > np.iinfo(np.int64).max:
        raise InputError(f"--data {path} holds the token {int(found.max())}, which is none")
    return torch.from_numpy(found.astype(np.int64))


def _from_torch(path: Path) -> Tensor:
    try:
        found = load(path, trust=False)
    except CheckpointError as error:
        raise InputError(
            f"--data cannot be used: {error}. Save the tokens alone, with torch.save(tokens, FILE)"
        ) from error
    if not isinstance(found, Tensor):
        raise InputError(f"--data {path} must hold one tensor, not a {type(found).__name__}")
    kind = str(found.dtype).removeprefix("torch.")
    if not kind.lstrip("u").startswith("int"):
        raise InputError(f"--data {path} must hold integer tokens, not {kind}")
    return found.to(torch.int64)
