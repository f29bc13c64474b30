"""The failure of one rank, made the same failure on all of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from hessdiag.errors import HessdiagError, is_out_of_memory


@dataclass(frozen=True)
class Failure:
    """What a rank tells the others of an exception.

    Attributes:
        module: Of its class.
        name: Of its class.
        text: Of it.
        where: The handler that caught it; None inside a collective, where all ranks are.
    """

    module: str
    name: str
    text: str
    where: str | None

    @classmethod
    def of(cls, error: Exception, where: str | None) -> Failure:
        """What there is to tell."""
        known = getattr(error, "where", None) if is_known(error) else where
        if is_out_of_memory(error):
            return cls("builtins", "MemoryError", str(error) or "out of memory", known)
        kind = type(error)
        return cls(kind.__module__, kind.__qualname__, str(error), known)

    def error(self, rank: int | None) -> Exception:
        """The exception, which every rank makes alike.

        Args:
            rank: That failed, told where the class is not one of ours; None where all did.
        """
        kind = self._kind()
        text = self.text
        if rank is not None and not issubclass(kind or Exception, HessdiagError):
            text = f"{text} (on rank {rank})"
        if kind is not None:
            try:
                return make_known(kind(text), self.where)
            except Exception:  # a class that wants more than a text
                text = f"{self.name}: {text}"
        return make_known(RuntimeError(text if kind else f"{self.name}: {text}"), self.where)

    def _kind(self) -> type[Exception] | None:
        try:
            found = getattr(import_module(self.module), self.name, None)
        except ImportError:
            return None
        return found if isinstance(found, type) and issubclass(found, Exception) else None


def make_known(error: Exception, where: str | None = None) -> Exception:
    """Mark an exception that every rank raises."""
    error.known_to_all = True  # type: ignore[attr-defined]
    error.where = where  # type: ignore[attr-defined]
    return error


def is_known(error: BaseException) -> bool:
    """Whether every rank raises it."""
    return getattr(error, "known_to_all", False)
