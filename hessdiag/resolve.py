"""Which task belongs to a checkpoint: finding it runs no user code, loading it does."""

from __future__ import annotations

import inspect
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hessdiag.errors import OptionError, TaskError
from hessdiag.huggingface.describe import PREFIX, describe, refusal
from hessdiag.importing import guarded, import_file, import_named, on_path

if TYPE_CHECKING:
    from hessdiag.checkpoint import Checkpoint
    from hessdiag.task import Task

DEMO = "demo:"
DEFAULT_NAME = "task"
VARIABLE = "HESSDIAG_TASK"
TASK_FILE = "hessdiag_task.py"
FORMS = "FILE.py[:NAME], pkg.mod[:NAME] or demo:NAME"
FIRST_TENSORS = 6


@dataclass(frozen=True)
class Resolution:
    """A task that was found.

    Attributes:
        source: The rule that found it, in words.
        reference: What it says: ``FILE.py:NAME``, ``pkg.mod:NAME``, ``demo:NAME``, ``hf:KIND``.
        location: Path of the file or directory, dotted name of the module, or name of the demo.
        name: What to take from there.
        folder: Where modules are looked up.
        arguments: ``--task-arg`` pairs.
        build: Makes the task of a Hugging Face directory, where it is one.
    """

    source: str
    reference: str
    location: Path | str
    name: str
    folder: Path
    arguments: Mapping[str, str] = field(default_factory=dict)
    build: Callable[..., Task] | None = None

    def load(self) -> Task:
        """Run the user's code and take the task from it.

        Raises:
            TaskError: The code raises, or there is no task in it; the message says where.
        """
        if self.build is not None:
            arguments = {key: parse_value(value) for key, value in self.arguments.items()}
            _check_arguments(self.build, arguments, self.reference)
            return self.build(**arguments)
        if self.reference.startswith(DEMO):
            return self._take(_demos()[self.name], None)
        with on_path(self.folder):
            if isinstance(self.location, Path):
                module = import_file(self.location)
            else:
                module = import_named(self.location)
            path = Path(module.__file__) if module.__file__ else None
            return self._take(_member(module, self.name, self.reference), path)

    def _take(self, found: object, path: Path | None) -> Task:
        from hessdiag.task import Task

        if isinstance(found, Task):
            if self.arguments:
                raise TaskError(f"{self.reference} is a Task and takes no --task-arg")
            return found
        if not callable(found):
            raise TaskError(
                f"{self.reference} is a {type(found).__name__}; it must be a hessdiag.Task, "
                "or a function that returns one"
            )
        arguments = {key: parse_value(value) for key, value in self.arguments.items()}
        _check_arguments(found, arguments, self.reference)
        made = guarded(lambda: found(**arguments), path)
        if not isinstance(made, Task):
            raise TaskError(
                f"{self.reference} returned a {type(made).__name__}; it must return a hessdiag.Task"
            )
        return made


def resolve(
    reference: str | None,
    *,
    cwd: Path,
    environ: Mapping[str, str],
    checkpoint: Checkpoint | None = None,
    task_args: Mapping[str, str] | None = None,
    data: Path | None = None,
) -> Resolution:
    """The first task that the documented order finds; no user code runs.

    Raises:
        TaskError: A reference is wrong; or there is none, and the message says what the
            checkpoint is and which commands would work.
    """
    found = find(
        reference,
        cwd=cwd,
        environ=environ,
        checkpoint=checkpoint,
        task_args=task_args,
        data=data,
    )
    if found is None:
        raise TaskError(no_task_message(checkpoint))
    return found


def find(
    reference: str | None,
    *,
    cwd: Path,
    environ: Mapping[str, str],
    checkpoint: Checkpoint | None = None,
    task_args: Mapping[str, str] | None = None,
    data: Path | None = None,
) -> Resolution | None:
    """As :func:`resolve`; None when no rule applies.

    Args:
        reference: What ``--task`` says.
        cwd: The working directory: the only place where files are looked for unasked.
        environ: For ``HESSDIAG_TASK``.
        checkpoint: Whose own word comes last: a built-in name, or a Hugging Face directory.
        task_args: ``--task-arg`` pairs.
        data: Tokens for the task of a Hugging Face directory.

    Raises:
        TaskError: A reference is wrong.
        OptionError: There are ``data``, and the task that was found brings its own.
    """
    given = task_args or {}
    found = _said(reference, cwd, environ, given)
    if found is None and checkpoint is not None:
        found = _own_word(checkpoint, cwd, given, data)
    if found is not None and data is not None and found.build is None:
        raise OptionError(
            f"--data is for Hugging Face directories, and the task {found.reference} "
            f"({found.source}) brings its own data; leave --data out"
        )
    return found


def _said(
    reference: str | None, cwd: Path, environ: Mapping[str, str], given: Mapping[str, str]
) -> Resolution | None:
    """What the user says: on the command line, in the environment, in the working directory."""
    if reference is not None:
        return _parse(reference, "--task", cwd, given)
    if environ.get(VARIABLE):
        return _parse(environ[VARIABLE], f"the environment's {VARIABLE}", cwd, given)
    for file in ("hessdiag.toml", "pyproject.toml"):
        configured = _configured(cwd / file)
        if configured is not None:
            return _parse(configured, f"{file} of the working directory", cwd, given)
    if (cwd / TASK_FILE).is_file():
        return _parse(TASK_FILE, f"{TASK_FILE} of the working directory", cwd, given)
    return None


def _own_word(
    checkpoint: Checkpoint, cwd: Path, given: Mapping[str, str], data: Path | None
) -> Resolution | None:
    """What the checkpoint says of itself; it never names code to run."""
    asked = checkpoint.task
    if asked is not None:
        if not asked.startswith(DEMO):
            raise TaskError(
                f"the checkpoint asks for the task {asked!r}; only built-in tasks are taken "
                "from a checkpoint, for the others say --task yourself"
            )
        return _parse(asked, "the checkpoint", cwd, given)
    if checkpoint.config is None or refusal(checkpoint.config) is not None:
        return None

    def build(*, length: int | None = None) -> Task:
        from hessdiag.huggingface.task import causal_lm_task

        return causal_lm_task(checkpoint, data, length=length)

    name = describe(checkpoint.config)
    source = "the Hugging Face directory"
    return Resolution(source, name, checkpoint.path, DEFAULT_NAME, cwd, given, build)


def no_task_message(checkpoint: Checkpoint | None) -> str:
    """What to say when there is no task: what the file is, and two commands that would work."""
    if checkpoint is None:
        lines, path = ["No task was found."], "CKPT"
    else:
        path = str(checkpoint.path)
        count = sum(tensor.numel() for tensor in checkpoint.weights.values())
        shown = list(checkpoint.weights.items())[:FIRST_TENSORS]
        width = max(len(name) for name, _ in shown)
        lines = [
            f"{path} is a {checkpoint.format} of {len(checkpoint.weights)} tensors with {count:,} "
            "values.",
            _why_no_task(checkpoint),
            "",
            *(
                f"  {name:<{width}}  {'×'.join(map(str, t.shape)) or 'scalar':<12}  "
                f"{str(t.dtype).removeprefix('torch.')}"
                for name, t in shown
            ),
        ]
        if len(checkpoint.weights) > len(shown):
            lines.append(f"  … and {len(checkpoint.weights) - len(shown)} more")
    return "\n".join(
        [
            *lines,
            "",
            "Write a task, which is a model, its data and its loss, here:",
            "  hessdiag init",
            "or name one that you have:",
            f"  hessdiag analyze {path} --task FILE.py",
        ]
    )


def _why_no_task(checkpoint: Checkpoint) -> str:
    reason = None if checkpoint.config is None else refusal(checkpoint.config)
    if reason is not None:
        return f"No task can be made from it ({reason}), and no other was found."
    return "It does not say which network, data and loss it belongs to, and no task was found."


def parse_value(text: str) -> int | float | bool | str:
    """``3`` an int, ``1e-3`` a float, ``true`` and ``false`` a bool, all else a string."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return {"true": True, "false": False}.get(text.lower(), text)


def _parse(reference: str, source: str, cwd: Path, arguments: Mapping[str, str]) -> Resolution:
    wrong = TaskError(f"{source} says {reference!r}, which is not {FORMS}")
    if reference.startswith(DEMO):
        name = reference.removeprefix(DEMO)
        demos = _demos()
        if name not in demos:
            raise TaskError(
                f"there is no built-in task {reference!r}{_near(name, demos, DEMO)}; "
                f"there are {', '.join(DEMO + known for known in demos)}"
            )
        return Resolution(source, reference, name, name, cwd, arguments)
    if reference.startswith(PREFIX):
        raise TaskError(
            f"{source} says {reference!r}, which is what hessdiag calls the task of a Hugging Face "
            "directory: give that directory as the checkpoint, without --task"
        )
    place, name = reference, DEFAULT_NAME
    if not reference.endswith(".py") and ":" in reference:
        place, name = reference.rsplit(":", 1)
    if not name.isidentifier():
        raise wrong
    if place.endswith(".py"):
        try:
            path = (cwd / Path(place).expanduser()).resolve()
            there = path.is_file()
        except (OSError, ValueError, RuntimeError) as error:  # too long, a null, no such ~user
            raise TaskError(f"{place[:100]} is no path of a file ({source}): {error}") from error
        if not there:
            files = [file.name for file in path.parent.glob("*.py")]
            raise TaskError(
                f"there is no file {place} ({source}){_near(path.name, files)}; "
                "hessdiag init writes a task to start from"
            )
        return Resolution(source, f"{place}:{name}", path, name, path.parent, arguments)
    if not all(part.isidentifier() for part in place.split(".")):
        raise wrong
    return Resolution(source, f"{place}:{name}", place, name, cwd, arguments)


def _configured(path: Path) -> str | None:
    """The ``task`` of ``[tool.hessdiag]``, in ``hessdiag.toml`` also at the top."""
    if not path.is_file():
        return None
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # TOML's, Unicode's, a number of 5,000 digits
        raise TaskError(f"{path} is not valid TOML: {error}; correct it, or give --task") from error
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}; or give --task") from error
    tool = content.get("tool", {})
    table = tool.get("hessdiag", {}) if isinstance(tool, dict) else {}
    task = table.get("task") if isinstance(table, dict) else None
    if task is None and path.name == "hessdiag.toml":
        task = content.get("task")
    if task is not None and not isinstance(task, str):
        raise TaskError(f"the task in {path} must be a string, {FORMS}")
    return task


def _demos() -> Mapping[str, Callable[[], Task]]:
    from hessdiag.demos import DEMOS

    return DEMOS


def _member(module: ModuleType, name: str, reference: str) -> object:
    if hasattr(module, name):
        return getattr(module, name)
    own = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    defined = f"; it defines {', '.join(own[:8])}" if own else ""
    raise TaskError(
        f"{reference.rsplit(':', 1)[0]} has no {name!r}{defined}{_near(name, own)}; write a "
        f"function {name}() that returns a hessdiag.Task, or name another with :NAME"
    )


def _check_arguments(
    function: Callable[..., object], arguments: Mapping[str, object], reference: str
) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a builtin without a signature says itself what is wrong
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "none"
        hint = next((h for a in arguments if (h := _near(a, signature.parameters))), "")
        raise TaskError(
            f"{reference} does not take these --task-arg: {error}{hint} (its arguments: {takes})"
        ) from error


def _near(name: str, known: Iterable[str], prefix: str = "") -> str:
    names = list(known)
    close = [match for match in get_close_matches(name, names, n=1) if match != name]
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
