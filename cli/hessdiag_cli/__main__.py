"""The entry point: runs a command and turns every error into one message and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType

from hessdiag.errors import HessdiagError, InputError, OutOfResources, is_out_of_memory
from hessdiag_cli import console, ranks

EXIT_USAGE = 2
EXIT_RESOURCES = 5
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


PATIENCE = 3  # that many Ctrl-C end the process at once


class Stopped(BaseException):
    """A signal came; nothing on the way out may take it for an ordinary error."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def exit_code(error: BaseException) -> int:
    """The contract's exit code for an error."""
    if isinstance(error, InputError):
        return EXIT_USAGE
    if isinstance(error, OutOfResources) or is_out_of_memory(error):
        return EXIT_RESOURCES
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_INTERNAL


def main() -> None:
    """Run the command line; never shows a traceback unless ``--debug`` asks for it."""
    try:
        _run()
    except BaseException as ended:
        ranks.let_the_first_speak(getattr(ended, "code", EXIT_INTERNAL))
        raise


def _run() -> None:
    _catch_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name or a κ that the terminal's encoding lacks must not cost the result.
            stream.reconfigure(errors="replace")
    ranks.mute_others()
    try:
        from hessdiag_cli.app import app

        app()
    except Stopped as stopped:
        _deaf()
        ranks.speak_for_the_lost()
        lost = ranks.lost_meanwhile()  # torchrun then stops the others
        if lost is not None:
            console.fail("\n".join([str(lost), *getattr(stopped, "__notes__", [])]))
            raise SystemExit(EXIT_RESOURCES) from None
        console.notice(_message(stopped).replace("\n", "; "))
        raise SystemExit(stopped.code) from None
    except (Exception, KeyboardInterrupt) as error:
        _deaf()
        if isinstance(error, OutOfResources):
            ranks.speak_for_the_lost()
        if "--debug" in sys.argv:
            raise
        console.fail(_message(error))
        raise SystemExit(exit_code(error)) from None
    finally:
        _deaf()


def _deaf() -> None:
    """Ignore signals from here on: the exit code is known, and is told without a stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _catch_signals() -> None:
    """SIGINT and SIGTERM end the work once; later ones leave the way out alone."""
    seen: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        code = EXIT_TERMINATED if number == signal.SIGTERM else EXIT_INTERRUPTED
        seen.append(number)
        if len(seen) >= PATIENCE:
            os._exit(code)  # whatever hangs: finished blocks are on the disk
        if len(seen) == 1:
            raise Stopped(code)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as under nohup
        signal.signal(signal.SIGINT, stop)


def _name(error: BaseException) -> str:
    return type(error).__name__


def _message(error: BaseException) -> str:
    """What went wrong, and what its notes add."""
    return "\n".join([_reason(error), *getattr(error, "__notes__", [])])


def _reason(error: BaseException) -> str:
    if isinstance(error, HessdiagError):
        return str(error)
    if isinstance(error, Stopped):
        return "terminated" if error.code == EXIT_TERMINATED else "interrupted"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if exit_code(error) == EXIT_RESOURCES:
        return "out of memory; lower --exact-limit, --batch-size or --memory-budget"
    return (
        f"internal error: {_name(error)}: {error}\n"
        "This is a bug in hessdiag. Run again with --debug and report what it prints."
    )


if __name__ == "__main__":
    main()
