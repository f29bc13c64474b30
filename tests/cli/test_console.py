"""The two streams: what a stranger's names may not do to them, and what when they are gone."""

import errno
import io
import os
import sys

import pytest

from hessdiag.errors import OutOfResources
from hessdiag.progress import Event
from hessdiag_cli import console
from hessdiag_cli.progress import progress

NAME = "\x1b[2J\x07\u202ename"
SHOWN = r"\x1b[2J\x07\u202ename"


@pytest.mark.parametrize("say", [console.notice, console.fail])
def test_a_message_keeps_its_lines_and_nothing_else_that_acts(say, capsys):
    say(f"first {NAME}\nsecond")
    lines = capsys.readouterr().err.splitlines()
    assert all(line.isprintable() for line in lines)
    assert any(f"first {SHOWN}" in line for line in lines)
    assert any("second" in line and "first" not in line for line in lines)


def test_a_blocks_progress_is_told_under_its_printable_name(capsys):
    with progress(quiet=False) as report:
        report(Event(block=NAME, index=1, count=2, done=1, total=3))
        report(Event(message=f"notice: {NAME}"))
    assert capsys.readouterr().err.splitlines() == [
        f"row 1/2 {SHOWN}: 1 of 3 products",
        f"notice: {SHOWN}",
    ]


class Broken(io.StringIO):
    """A stream that the reader, or the disk, no longer takes."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_is_gone_costs_nothing(name, monkeypatch):
    monkeypatch.setattr(sys, name, Broken(errno.EPIPE))
    console.emit("a table")
    console.notice("a notice")


def test_a_full_disk_under_stdout_is_out_of_resources_and_no_bug(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    with pytest.raises(OutOfResources, match="No space left"):
        console.emit("a table")
