"""The entry point: runs a command and turns every error into one message and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType

from hessdiag.errors import HessdiagError, InputError, OutOfResources, is_out_of_memory
from hessdiag_cli import console

EXIT_USAGE = 2
EXIT_RESOURCES = 5
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM came; nothing on the way out may take it for an ordinary error."""


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

    def terminate(_signal: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name or a κ that the terminal's encoding lacks must not cost the result.
            stream.reconfigure(errors="replace")
    try:
        from hessdiag_cli.app import app

        app()
    except BrokenPipeError:
        # The reader of stdout is gone (`| head`); there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Terminated:
        raise SystemExit(EXIT_TERMINATED) from None
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in sys.argv:
            raise
        console.fail(_message(error))
        raise SystemExit(exit_code(error)) from None


def _name(error: BaseException) -> str:
    return type(error).__name__


def _message(error: BaseException) -> str:
    if isinstance(error, HessdiagError):
        return str(error)
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
