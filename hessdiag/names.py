"""Names of parameters and layers, as the user wrote them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

COMPILED = "_orig_mod"


def clean_name(name: str) -> str:
    """A parameter's or module's name without the marks of compiled submodules."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def named_parameters(
    model: nn.Module, *, aliases: bool = False
) -> Iterator[tuple[str, nn.Parameter]]:
    """``model.named_parameters()`` under clean names; with ``aliases`` tied ones recur."""
    for name, parameter in model.named_parameters(remove_duplicate=not aliases):
        yield clean_name(name), parameter


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to; a parametrization belongs to what it makes."""
    owner, _, leaf = f".{name}".partition(".parametrizations.")
    if leaf:  # the root's own have no owner: they stand for the tensor that they make
        return owner.removeprefix(".") or leaf.partition(".")[0]
    head, _, _ = name.rpartition(".")
    return head or name
