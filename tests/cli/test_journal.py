"""Interrupted analyses from the command line: signals, messages, and how they are shown."""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest

import processes
from hessdiag.opened import Opened
from hessdiag_cli import __main__ as entry


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a checkpoint and its task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESSDIAG_TASK", raising=False)
    processes.prepare(tmp_path)
    return tmp_path


@pytest.fixture
def hessdiag(here, monkeypatch, capsys):
    """``hessdiag("analyze", …)`` -> exit code, stdout, stderr; through the real entry point."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hessdiag", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "hessdiag_task", raising=False)
        capsys.readouterr()
        with processes.kept_handlers(), pytest.raises(SystemExit) as stopped:
            entry.main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, " ".join(err.replace("│", " ").split())

    return run


ANALYZE = ("analyze", "model.pt", "--task-arg", "pause=0", "--variants", "raw")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder with three of seven blocks, and what the interrupted command said."""
    folder, solve, said = tmp_path_factory.mktemp("interrupted"), Opened.solve, io.StringIO()
    processes.prepare(folder)

    def stopping(opened):
        if opened.block.name == "4":
            signal.raise_signal(signal.SIGINT)
        return solve(opened)

    with (
        pytest.MonkeyPatch.context() as patch,
        processes.kept_handlers(),
        contextlib.redirect_stderr(said),
    ):
        patch.chdir(folder)
        patch.setattr(Opened, "solve", stopping)
        patch.setattr(sys, "argv", ["hessdiag", *ANALYZE, "-q"])
        with pytest.raises(SystemExit) as stopped:
            entry.main()
    assert len(processes.parts(folder)) == 3
    return folder, (stopped.value.code, said.getvalue())


@pytest.fixture
def unfinished(here, interrupted):
    """Three of seven blocks in the working directory, and what the command said."""
    folder, told = interrupted
    shutil.copytree(folder / "model.h5.parts", here / "model.h5.parts")
    return told


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_interrupt_says_in_one_line_what_is_kept_where_and_how_to_go_on(unfinished):
    assert unfinished == (
        130,
        "interrupted; 3 of 7 blocks are finished and kept in model.h5.parts; "
        "the same command resumes\n",
    )


def test_the_same_command_resumes_with_a_notice(unfinished, here, hessdiag):
    code, out, err = hessdiag(*ANALYZE)
    assert code == 0
    assert "resuming: 3 of 7 blocks were finished" in err
    assert "row 1/7" not in err
    assert hessdiag("show", "model.h5")[1] == out
    assert not (here / "model.h5.parts").exists()


def test_show_of_an_unfinished_run_has_what_is_done_and_how_much(unfinished, hessdiag):
    code, out, err = hessdiag("show", "model.h5")
    assert (code, err) == (0, "")
    rows = [line.split()[0] for line in out.splitlines() if line[:1].isalnum()]
    assert [name for name in rows if name in {"0", "2", "4", "6", "8", "10", "whole"}] == [
        "0",
        "2",
        "whole",
    ]
    told = " ".join(out.split())
    assert "unfinished: 3 of 7 blocks are finished; the same `hessdiag analyze` resumes" in told


def test_show_json_and_validate_of_an_unfinished_run_say_so(unfinished, hessdiag):
    document = json.loads(hessdiag("show", "model.h5", "--json")[1])
    assert document["format"] == "hessdiag-run"
    assert [block["name"] for block in document["blocks"]] == ["0", "2", "whole"]
    assert document["blocks"][0]["variants"]["raw"]["kappa"]["status"] == "exact"
    assert document["warnings"][0].startswith("unfinished: 3 of 7 blocks")
    code, out, _ = hessdiag("validate", "model.h5")
    assert code == 0
    assert out.endswith("3 blocks, 1 variant; unfinished: the same analyze resumes\n")
    checked = json.loads(hessdiag("validate", "model.h5", "--json")[1])
    assert (checked["unfinished"], checked["valid"], checked["blocks"]) == (True, True, 3)


def test_the_unfinished_numbers_are_those_of_the_finished_run(unfinished, hessdiag):
    early = json.loads(hessdiag("show", "model.h5", "--json")[1])["blocks"]
    late = {b["name"]: b for b in json.loads(hessdiag(*ANALYZE, "--json")[1])["blocks"]}
    assert early == [late[block["name"]] for block in early]


def test_other_options_are_refused_by_field_with_the_way_out(unfinished, here, hessdiag):
    before = contents(here)
    code, out, err = hessdiag(*ANALYZE, "--steps", "7", "--seed", "2")
    assert (code, out) == (2, "")
    assert "model.h5.parts holds another analysis: steps, seed differ" in err
    assert "--force" in err
    assert contents(here) == before
    code, _, err = hessdiag(*ANALYZE, "--seed", "2", "--force")
    assert code == 0
    assert "resuming" not in err


def test_a_damaged_part_is_one_error_with_the_remedy_everywhere(unfinished, here, hessdiag):
    part, source = here / "model.h5.parts" / "block-0001-raw.part", random.Random(0)
    content = bytearray(part.read_bytes())
    content[source.randrange(len(content))] ^= 1
    part.write_bytes(content)
    before = contents(here)
    for arguments in (ANALYZE, ("show", "model.h5"), ("validate", "model.h5")):
        code, out, err = hessdiag(*arguments)
        assert (code, out) == (2, "")
        assert "block-0001-raw.part is damaged" in err
        assert "remove it, and the same command computes again what it held" in err
    assert contents(here) == before
    part.unlink()
    code, _, err = hessdiag(*ANALYZE)
    assert code == 0
    assert "resuming: 2 of 7" in err


def test_a_damaged_run_is_refused_and_kept(hessdiag, here):
    (here / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n damaged")
    code, _, err = hessdiag(*ANALYZE, "--force")
    assert code == 2
    assert "or a damaged one, so it is not replaced" in err
    assert (here / "model.h5").read_bytes().endswith(b"damaged")


def test_a_foreign_folder_or_a_link_in_the_way_is_refused_and_kept(hessdiag, here):
    (here / "model.h5.parts").mkdir()
    (here / "model.h5.parts" / "thesis.tex").write_text("mine")
    before = contents(here)
    code, _, err = hessdiag(*ANALYZE, "--force")
    assert code == 2
    assert "model.h5.parts is not a folder of hessdiag" in err
    assert contents(here) == before
    (here / "link.h5.parts").symlink_to("model.h5.parts")
    code, _, err = hessdiag(*ANALYZE, "-o", "link.h5")
    assert code == 2
    assert "link.h5.parts is a symbolic link" in err
    assert contents(here)[here / "model.h5.parts" / "thesis.tex"] == b"mine"


def test_a_strangers_file_in_our_folder_stays_and_is_named(unfinished, here, hessdiag):
    (here / "model.h5.parts" / "notes.txt").write_text("mine")
    code, _, err = hessdiag(*ANALYZE)
    assert code == 0
    assert "model.h5.parts stays, for hessdiag did not write 'notes.txt'" in err
    assert [p.name for p in (here / "model.h5.parts").iterdir()] == ["notes.txt"]


def test_time_that_is_over_exits_4_with_a_table_and_the_next_command_goes_on(hessdiag, here):
    code, out, _ = hessdiag(*ANALYZE, "--max-seconds", "0")
    assert code == 4
    assert "not begun within --max-seconds 0" in " ".join(out.split())
    assert hessdiag("show", "model.h5")[1] == out
    assert hessdiag("validate", "model.h5")[0] == 0
    assert hessdiag(*ANALYZE)[0] == 0
    assert not (here / "model.h5.parts").exists()


@pytest.mark.slow
def test_signals_keep_finished_blocks_and_a_second_ctrl_c_shows_no_traceback(here):
    expected = ((signal.SIGINT, 130, "interrupted; "), (signal.SIGTERM, 143, "terminated; "))
    done = set()
    for number, code, word in expected:
        process = processes.start(here)
        deadline = time.monotonic() + 60
        while len(processes.parts(here)) <= len(done) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(number)
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        found, out, err = processes.finish(process)
        assert (found, out) == (code, "")
        assert "Traceback" not in err
        assert err.count("the same command resumes") == 1
        assert f"{word}{len(processes.parts(here))} of {processes.ROWS} rows" in err
        assert processes.parts(here) > done
        done = processes.parts(here)


def test_a_hanging_way_out_ends_at_the_third_signal(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with processes.kept_handlers():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        entry._catch_signals()
        with pytest.raises(entry.Stopped):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert ended == []
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]


def test_an_ignored_interrupt_stays_ignored():
    with processes.kept_handlers():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        entry._catch_signals()
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
