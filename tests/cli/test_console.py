"""Messages that quote a stranger's names are shown by the terminal and not obeyed."""

import pytest

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
        f"block 1/2 {SHOWN}: 1 of 3 products",
        f"notice: {SHOWN}",
    ]
