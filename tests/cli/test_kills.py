"""Kill -9 at any moment loses at most the row in work; so does a disk that fills up.

``HESSDIAG_KILLS=200`` asks for more kills than the usual 30.
"""

import os
import random
import resource
import time
from collections import Counter

import pytest

import processes

KILLS = int(os.environ.get("HESSDIAG_KILLS", "30"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run in one piece, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    processes.prepare(folder)
    started = time.monotonic()
    code, _, err = processes.finish(processes.start(folder))
    assert code == 0, err
    return processes.stored(folder), time.monotonic() - started


def wait_for(condition, process, deadline):
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.001)


def kill_at(moment, process, folder, source, seconds):
    """Kill at a random time, while a file is being written, or when all parts are there."""
    deadline = time.monotonic() + 3 * seconds
    inside = folder / "model.h5.parts"
    if moment == "any":
        time.sleep(source.uniform(0, seconds))
    elif moment == "writing":
        for _ in range(source.randrange(1, 4)):
            wait_for(lambda: any(inside.glob(".hessdiag-*")), process, deadline)
            wait_for(lambda: not any(inside.glob(".hessdiag-*")), process, deadline)
        wait_for(lambda: any(inside.glob(".hessdiag-*")), process, deadline)
    else:
        full = processes.ROWS
        wait_for(lambda: len(processes.parts(folder)) == full, process, deadline)
        time.sleep(source.uniform(0, 0.3))
    process.kill()


def test_killed_analyses_resume_to_the_undisturbed_run(undisturbed, tmp_path):
    reference, seconds = undisturbed
    source = random.Random(20260)
    killed, rounds = Counter(), 0
    while sum(killed.values()) < KILLS:
        folder = tmp_path / f"round-{rounds}"
        folder.mkdir()
        processes.prepare(folder)
        rounds += 1
        while True:
            before = processes.parts(folder)
            process = processes.start(folder)
            if sum(killed.values()) < KILLS:
                moment = source.choice(("any", "any", "any", "writing", "merging"))
                kill_at(moment, process, folder, source, seconds)
            code, _, err = processes.finish(process)
            if code == -9:
                killed[moment] += 1
                done = processes.parts(folder)
                assert (folder / "model.h5").exists() or done >= before
                continue
            assert code == 0, err
            break
        assert processes.deviations(processes.stored(folder), reference) == []
        assert sorted(p.name for p in folder.iterdir() if p.suffix != ".py") == [
            "model.h5",
            "model.pt",
        ]
        assert not list(folder.rglob(".hessdiag-*"))
    print(f"{sum(killed.values())} kills {dict(killed)} over {rounds} runs")


@pytest.mark.parametrize(("limit", "finished"), [(300, 0), (60_000, 0), (150_000, 14)])
def test_a_full_disk_exits_5_keeps_what_is_finished_and_the_same_command_resumes(
    limit, finished, undisturbed, tmp_path
):
    """The header, the matrix and the run are the first files that do not fit."""
    processes.prepare(tmp_path)
    code, out, err = processes.finish(
        processes.start(
            tmp_path,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
    )
    assert (code, out) == (5, "")
    assert "no room for" in err
    assert "Traceback" not in err
    assert not (tmp_path / "model.h5").exists()
    assert len(processes.parts(tmp_path)) == finished
    if finished:
        assert f"{finished} of {processes.ROWS} rows" in err
        assert "the same command resumes" in err
    code, _, err = processes.finish(processes.start(tmp_path))
    assert code == 0
    assert bool(finished) == ("resuming: " in err)
    assert processes.deviations(processes.stored(tmp_path), undisturbed[0]) == []


def test_a_full_disk_leaves_the_old_run_as_it_was(undisturbed, tmp_path):
    processes.prepare(tmp_path)
    assert processes.finish(processes.start(tmp_path, "--task-arg", "pause=0"))[0] == 0
    before = (tmp_path / "model.h5").read_bytes()
    limit = len(before) // 2
    code, _, err = processes.finish(
        processes.start(
            tmp_path,
            *("--seed", "1", "--force", "--task-arg", "pause=0"),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
    )
    assert code == 5, err
    assert (tmp_path / "model.h5").read_bytes() == before
    assert len(processes.parts(tmp_path)) == processes.ROWS
