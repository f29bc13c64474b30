"""Changes of a network in place, each undone in turn at the end, also after an error."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

_ABSENT = object()


class Edits(ExitStack):
    """A context in which a network on loan may be changed.

    Parameters stay the same objects under the same names; their storage is never written, so
    that graphs kept from before stay right.
    """

    def set_data(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give ``parameter`` the numbers ``value``, in its own dtype."""
        before = parameter.data

        def undo() -> None:
            parameter.data = before

        self.callback(undo)
        parameter.data = value.detach().to(before)

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute of this one module, a method too."""
        own = module.__dict__
        before = own.get(name, _ABSENT)

        def undo() -> None:
            if before is _ABSENT:
                del own[name]
            else:
                own[name] = before

        self.callback(undo)
        own[name] = value

    def add_bias(self, module: nn.Module, value: Tensor) -> None:
        """Register a bias in a layer that has none."""

        def undo() -> None:
            module._parameters["bias"] = None

        self.callback(undo)
        module._parameters["bias"] = nn.Parameter(value.detach(), requires_grad=False)

    def replace_input(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """Call the module with ``change(input)`` in place of its input."""

        def enter(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, kwargs | {"input": change(kwargs["input"])}

        self.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
