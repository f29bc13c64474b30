"""The user's model on loan: in another dtype, on another device, and returned bit for bit."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessdiag.curvature.cross_entropy import LARGE, large_cross_entropy
from hessdiag.data import convert
from hessdiag.errors import InputError

# Parameters, buffers and submodules are converted where they live, not as plain attributes.
_TABLES = ("_parameters", "_buffers", "_modules")


def bare(model: nn.Module) -> nn.Module:
    """The network inside ``torch.compile`` and (Distributed)DataParallel wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        else:
            return model
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether the model, in its present mode, normalises by the statistics of the batch."""
    kinds = (nn.modules.batchnorm._BatchNorm,)
    return any(
        isinstance(module, kinds) and (module.training or module.running_mean is None)
        for module in model.modules()
    )


@contextmanager
def loan(
    modules: Sequence[nn.Module], *, mode: str, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Change the modules in place for the analysis and undo everything, also after an error.

    Inside, parameters and buffers are copies in ``dtype`` on ``device``, gradients are off for
    every parameter, and the mode is set. Parameter objects stay the same objects, so closures
    over them keep working. Afterwards parameters (the same storage), buffers, ``.grad``,
    ``requires_grad``, modes, plain attributes (what lists, dicts and sets hold, too) and the
    global random states are what they were.

    Raises:
        InputError: A parameter is complex, has no data yet, or can never require gradients.
    """
    with torch.inference_mode(False):
        yield from _lend(modules, mode, dtype, device)


def _lend(
    modules: Sequence[nn.Module], mode: str, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    every = list(dict.fromkeys(module for root in modules for module in root.modules()))
    parameters = list(
        dict.fromkeys(p for module in every for p in module._parameters.values() if p is not None)
    )
    for module in every:
        for name, parameter in module._parameters.items():
            _check_parameter(name, parameter)
    saved_modules = [_snapshot(module) for module in every]
    saved_parameters = [(p, p.data, p.grad, p.requires_grad) for p in parameters]
    saved_random = _random_states()
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
            parameter.data = convert(parameter.data, dtype=dtype, device=device)
        for module in every:
            _convert_module(module, dtype, device)
        for root in modules:
            root.train(mode == "train")
        yield
    finally:
        for parameter, data, grad, requires_grad in saved_parameters:
            parameter.grad = None
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, (attributes, contents) in zip(every, saved_modules, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in contents.items():
                live = module.__dict__[name]
                live.clear()
                if isinstance(live, (list, deque)):
                    live.extend(content)
                else:
                    live.update(content)
        _restore_random(saved_random)


def _check_parameter(name: str, parameter: nn.Parameter | None) -> None:
    if parameter is None:
        return
    if parameter.is_complex():
        raise InputError(
            f"parameter {name!r} is complex; its Hessian is not defined here: "
            "hold its real and imaginary parts as two real parameters"
        )
    if parameter.device.type == "meta":
        raise InputError(f"parameter {name!r} is on the meta device and holds no numbers")
    if parameter.is_inference():
        raise InputError(
            f"parameter {name!r} was made inside torch.inference_mode() and can never have a "
            "gradient; build the model outside of it"
        )


def _snapshot(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes, and copies of what the containers among them hold (hooks, caches)."""
    contents: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if isinstance(value, dict):
            contents[name] = dict(value)
        elif isinstance(value, (list, set, deque)):
            contents[name] = list(value)
    return dict(module.__dict__), contents


def _convert_module(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = convert(buffer, dtype=dtype, device=device)
    for name, value in list(module.__dict__.items()):
        if name in _TABLES or isinstance(value, nn.Parameter):
            continue
        if _holds_plain_tensors(value):
            module.__dict__[name] = convert(value, dtype=dtype, device=device)


def _holds_plain_tensors(value: Any) -> bool:
    """Whether an attribute is a tensor, or a container of tensors that are no parameters."""
    if isinstance(value, Tensor):
        return True
    if not isinstance(value, (list, tuple, dict)):
        return False
    items = list(value.values()) if isinstance(value, dict) else list(value)
    return any(isinstance(item, Tensor) for item in items) and not any(
        isinstance(item, nn.Parameter) for item in items
    )


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global state is what users share
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _restore_random(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def has_rnn(modules: Sequence[nn.Module]) -> bool:
    """Whether any module is a recurrent one, whose cuDNN kernels have no double backward."""
    return any(isinstance(m, nn.RNNBase) for root in modules for m in root.modules())


@contextmanager
def exact_arithmetic(modules: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Global switches that second derivatives need; yields the record for the provenance.

    Math attention (the fused kernels have no double backward), no fused encoder path, TF32 off,
    autocast off, compiled code run eagerly, cuDNN off when there is a recurrent module, and
    large cross-entropies by :mod:`hessdiag.curvature.cross_entropy`.
    """
    record: dict[str, Any] = {
        "attention": "math",
        "encoder_fastpath": False,
        "tf32": False,
        "autocast": False,
        "compiled_modules": "run eagerly",
        "cudnn_rnn": "off" if has_rnn(modules) else "not used",
        "cross_entropy": f"by rows from {LARGE} logits on",
        "default_dtype": str(dtype).removeprefix("torch."),
    }
    fastpath = torch.backends.mha.get_fastpath_enabled()
    default = torch.get_default_dtype()
    cudnn = torch.backends.cudnn.enabled
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        stack.enter_context(large_cross_entropy())
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_tf32_off())
        if "torch._dynamo" in sys.modules:  # nothing is compiled where it was never imported
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            torch.backends.cudnn.enabled = cudnn and not has_rnn(modules)
            torch.backends.mha.set_fastpath_enabled(False)
            torch.set_default_dtype(dtype)
            yield record
        finally:
            torch.backends.cudnn.enabled = cudnn
            torch.backends.mha.set_fastpath_enabled(fastpath)
            torch.set_default_dtype(default)


@contextmanager
def _tf32_off() -> Iterator[None]:
    """Full float32 products, by whichever of torch's two interfaces the process uses.

    Reading the older flags raises once the newer were set; setting only the newer makes the
    older unreadable for the user's code.
    """
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    newer: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)
    saved = [kind.fp32_precision for kind in newer]
    older: tuple[str, bool] | None
    try:
        _ = torch.backends.cuda.matmul.allow_tf32
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        older = None
    try:
        if older is None:
            for kind in newer:
                kind.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
            cudnn.allow_tf32 = False
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for kind, value in zip(newer, saved, strict=True):
            kind.fp32_precision = value
