"""A directory's causal language model as a task: its next-token loss on tokens, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hessdiag.errors import InputError, TaskError
from hessdiag.huggingface.build import build_model, longest, vocabulary
from hessdiag.huggingface.describe import describe
from hessdiag.huggingface.tokens import (
    BYTES,
    DEMO_NOTICE,
    ROWS,
    as_rows,
    check_range,
    demo_tokens,
    read_tokens,
)
from hessdiag.huggingface.trainer import trainer_optimizer
from hessdiag.huggingface.wide import Wide
from hessdiag.task import Task

if TYPE_CHECKING:
    from hessdiag.checkpoint import Checkpoint


def causal_lm_task(
    checkpoint: Checkpoint, data: Path | str | None = None, *, length: int | None = None
) -> Task:
    """The task of a Hugging Face directory: mean next-token cross-entropy.

    Args:
        checkpoint: Of :func:`hessdiag.checkpoint.read_checkpoint`, with a ``config``.
        data: Tokens, see :func:`hessdiag.huggingface.tokens.read_tokens`; None takes the bytes of
            a short shipped text, and the run says so.
        length: Tokens in a row, where the data are one sequence.
    Returns:
        The task, its model at random weights: an analysis loads those of the checkpoint.
    Raises:
        MissingExtra: transformers is not installed.
        TaskError: The directory holds no causal language model that transformers can build.
        InputError: The data do not fit the model.
    """
    if checkpoint.config is None:
        raise TaskError(f"{checkpoint.path} is no Hugging Face directory: it has no config.json")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool)):
        raise InputError(f"length must be a whole number of tokens, not {length!r}")
    model = build_model(checkpoint.config, checkpoint.path, checkpoint.weights)
    known = vocabulary(model)
    path = None if data is None else Path(data)
    text = path is None or path.suffix == ".txt"
    if text and known < BYTES:
        raise InputError(
            f"a text's bytes are its tokens, 0 to {BYTES - 1}, and this model's vocabulary is 0 to "
            f"{known - 1}; give tokens of its own: --data tokens.npy"
        )
    source = "the demo text" if path is None else f"--data {path}"
    tokens = demo_tokens() if path is None else read_tokens(path)
    rows = as_rows(tokens, length=length, longest=longest(model), source=source)
    check_range(rows, known, source)
    notices = [DEMO_NOTICE] if path is None else []
    lost = tokens.numel() - rows.numel()
    if lost and path is not None:
        notices.append(f"the last {lost} tokens of {path.name} fill no row and are left out")
    stored = checkpoint.optimizer
    return Task(
        model=model,
        data=list(rows.split(ROWS)),
        loss=next_token_loss,
        optimizer=None if stored is None else trainer_optimizer(stored),
        batch_size=_predicted,
        name=describe(checkpoint.config),
        notices=tuple(notices),
    )


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of every next token, in the type of the model throughout.

    Args:
        model: Of transformers; returns ``logits``.
        tokens: ``(rows, length)``.
    """
    with Wide():
        output: Any = model(input_ids=tokens)
    return cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _predicted(tokens: Tensor) -> float:
    rows, length = tokens.shape
    return float(rows * (length - 1))
