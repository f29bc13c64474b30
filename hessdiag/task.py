"""What is diagnosed: a model, its data and the loss whose Hessian is taken."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hessdiag.data import row_count
from hessdiag.errors import TaskError

Loss = Callable[[nn.Module, Any], Tensor]
"""``(model, batch) -> scalar``, the mean over the batch's units."""

Units = Callable[[Any], float]
"""``batch -> `` how many units the batch's mean loss was taken over: the batch's weight."""

IGNORED = -100
"""The label that torch and everybody after it skips when a loss is averaged."""

TARGET_KEYS = ("labels", "targets", "target", "y")


@dataclass(frozen=True, eq=False)
class Task:
    """What is diagnosed; see :func:`as_loss` and :func:`units` for how it is read.

    Attributes:
        model: The network; a checkpoint's weights are loaded into it.
        data: A re-iterable of batches: tensors, or tuples, dicts, NamedTuples, UserDicts of them.
        loss: ``loss(model, batch)``, a scalar that is the mean over the batch's units; or a loss
            module with ``reduction="mean"``, for batches that are ``(input, target)`` pairs.
        optimizer: ``optimizer(model)`` builds the optimizer that made the checkpoint; its
            parameter groups tell which stored state belongs to which parameter.
        batch_size: ``batch_size(batch)``, how many units the batch's mean was taken over.
            By default the rows, or the counted targets where targets can be ignored.
        mode: ``"eval"`` or ``"train"``, for dropout and BatchNorm.
        name: What tables call this task.
        notices: What every table of a run of this task must say.
    """

    model: nn.Module
    data: Iterable[Any]
    loss: Loss | nn.Module
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    batch_size: Units | None = None
    mode: Literal["eval", "train"] = "eval"
    name: str | None = None
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_model(self.model)
        _check_data(self.data)
        _check_loss(self.loss)
        _check_optimizer(self.optimizer)
        if self.batch_size is not None and not callable(self.batch_size):
            raise TaskError(
                "the task's batch_size is a function of a batch that returns how many units its "
                f"mean loss was taken over, not {_kind(self.batch_size)}; leave it out to count "
                "rows, and set the size of batches where the data is made"
            )
        if self.mode not in ("eval", "train"):
            raise TaskError(f'the task\'s mode must be "eval" or "train", not {self.mode!r}')
        if self.name is not None and not isinstance(self.name, str):
            raise TaskError(f"the task's name must be a string, not {_kind(self.name)}")
        if not isinstance(self.notices, tuple) or not all(isinstance(n, str) for n in self.notices):
            raise TaskError(
                f"the task's notices must be a tuple of strings, not {_kind(self.notices)}"
            )


def as_loss(task: Task) -> Loss:
    """The task's loss as one function of model and batch, whichever form it was given in.

    Raises:
        TaskError: When the result is called: a loss module met a batch that is not a pair, or
            the loss is not one real number.
    """
    loss = task.loss
    call = _module_loss(loss) if isinstance(loss, nn.Module) else loss

    def scalar_loss(model: nn.Module, batch: Any) -> Tensor:
        value = call(model, batch)
        if not isinstance(value, Tensor):
            raise TaskError(
                f"the task's loss must return a tensor with one number, not {_kind(value)}"
                + ("; return its .loss" if hasattr(value, "loss") else "")
            )
        if value.numel() != 1 or not value.is_floating_point():
            raise TaskError(
                "the task's loss must return one real number, the mean over the batch, "
                f"not {value.dtype} of shape {tuple(value.shape)}; take its .mean()"
            )
        if value.is_meta:
            raise TaskError("the task's loss is on the meta device and holds no number")
        return value.reshape(())

    return scalar_loss


def units(task: Task) -> Units:
    """How many units each batch's mean loss was taken over, as the weight of the batch.

    Without ``task.batch_size``: what torch divides by for ``CrossEntropyLoss`` and ``NLLLoss``
    (counted targets, or the sum of their class weights); for a loss function with integer
    targets the targets that are not -100; otherwise the rows of the first tensor in the batch.
    The rule depends on the kind of batch and never on whether a -100 happens to be in it,
    so that weights of different batches can be compared.

    Raises:
        TaskError: When the result is called: the size of a batch cannot be told.
    """
    if task.batch_size is not None:
        return _declared_units(task.batch_size)
    loss = task.loss
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return _class_units(loss)
    return _rows if isinstance(loss, nn.Module) else _counted_targets


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in a batch of any kind that a task may yield, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from batch_tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from batch_tensors(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from batch_tensors(getattr(batch, field.name))


def _module_loss(loss: nn.Module) -> Loss:
    """``loss(model(input), target)``, with the module's own tensors where the output is."""
    converted: dict[tuple[torch.device, torch.dtype], nn.Module] = {}
    own = [t for t in (*loss.parameters(), *loss.buffers()) if t.is_floating_point()]

    def call(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, list | tuple) or len(batch) != 2:
            raise TaskError(
                f"the task's loss is the module {type(loss).__name__}, which needs batches that "
                f"are (input, target) pairs, and a batch is {_kind(batch)}; write the loss as "
                "a function of model and batch instead"
            )
        output = model(batch[0])
        # Class weights stay float32 on the CPU while the model went to float64 or to the GPU.
        if own and isinstance(output, Tensor) and output.is_floating_point():
            place = (output.device, output.dtype)
            if place not in converted:
                converted[place] = copy.deepcopy(loss).to(*place).requires_grad_(False)
            return converted[place](output, batch[1])  # type: ignore[no-any-return]
        return loss(output, batch[1])  # type: ignore[no-any-return]

    return call


def _declared_units(batch_size: Units) -> Units:
    def declared(batch: Any) -> float:
        answer: Any = batch_size(batch)
        try:
            count = math.nan if isinstance(answer, str) else float(answer)
        except (TypeError, ValueError, RuntimeError):
            count = math.nan
        if not 0 <= count < math.inf:
            raise TaskError(
                f"the task's batch_size(batch) returned {answer!r}; it must return how many "
                "units the batch's mean loss was taken over, a finite number of at least 0"
            )
        return count

    return declared


def _class_units(loss: nn.CrossEntropyLoss | nn.NLLLoss) -> Units:
    def counted(batch: Any) -> float:
        target = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
        if not isinstance(target, Tensor):
            return _rows(batch)
        if (
            target.is_floating_point() and target.ndim
        ):  # class probabilities: torch divides by the positions
            return target.numel() / target.shape[min(1, target.ndim - 1)]
        kept = target != loss.ignore_index
        if loss.weight is None:
            return float(kept.sum())
        return float(loss.weight.to(target.device, torch.float64)[target[kept].long()].sum())

    return counted


def _counted_targets(batch: Any) -> float:
    target = None
    if isinstance(batch, Mapping):
        target = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, list | tuple) and len(batch) == 2:
        target = batch[1]
    if isinstance(target, Tensor) and _is_integer(target):
        return float((target != IGNORED).sum())
    return _rows(batch)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _rows(batch: Any) -> float:
    """Leading dimension of the first tensor that has one; a batch of scalars is one example."""
    tensors = list(batch_tensors(batch))
    if any(tensor.ndim for tensor in tensors):
        return float(row_count(batch))
    if tensors or batch is None:
        return 1.0
    raise TaskError(
        f"how many examples a batch holds cannot be told: {_kind(batch)} has no tensor; "
        "give the task batch_size=..., a function of a batch that returns the number"
    )


def _kind(value: object) -> str:
    name = type(value).__name__
    if isinstance(value, list | tuple):
        return f"a {name} of {len(value)}"
    return f"a Tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {name}"


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        hint = "; call it to make one" if isinstance(model, type) else ""
        raise TaskError(f"the task's model must be a torch.nn.Module, not {_kind(model)}{hint}")
    named = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in named if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise TaskError(
            f"the task's model has parameters without a shape yet ({', '.join(lazy[:4])}"
            f"{', …' if len(lazy) > 4 else ''}); run it once on a batch before it is given to Task"
        )
    if next(model.parameters(), None) is None:
        raise TaskError("the task's model has no parameters, so its loss has no Hessian")


def _check_data(data: object) -> None:
    if isinstance(data, Tensor | Mapping | str | bytes):
        raise TaskError(
            f"the task's data must be a list, a DataLoader or another re-iterable of batches, "
            f"not {_kind(data)}; a single batch goes into a list: data=[batch]"
        )
    if isinstance(data, Iterator):
        raise TaskError(
            f"the task's data can be read only once ({_kind(data)}), and every Hessian product "
            "reads it again; make it a list, or an object whose __iter__ starts anew"
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TaskError(f"the task's data must be an iterable of batches, not {_kind(data)}")


def _check_loss(loss: object) -> None:
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise TaskError(
            f"the task's loss is the class {loss.__name__}; make one: {loss.__name__}()"
        )
    if not callable(loss):
        raise TaskError(
            "the task's loss must be a function of model and batch, or a loss module, "
            f"not {_kind(loss)}"
        )
    # KLDivLoss's "batchmean" is the mean over rows, which is what is asked for.
    reduction = getattr(loss, "reduction", "mean") if isinstance(loss, nn.Module) else "mean"
    if reduction not in ("mean", "batchmean"):
        raise TaskError(
            f"the task's loss {type(loss).__name__} has reduction={reduction!r}; hessdiag weighs "
            'batches by what they hold, so it needs reduction="mean"'
        )


def _check_optimizer(optimizer: object) -> None:
    if optimizer is None:
        return
    is_class = isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)
    if is_class or isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TaskError(
            "the task's optimizer is a function that builds one for a model, for example "
            "lambda model: torch.optim.Adam(model.parameters()), "
            f"not {'a class' if is_class else _kind(optimizer)}"
        )
