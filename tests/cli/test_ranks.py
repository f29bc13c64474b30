"""Several processes under torchrun's environment: one of them speaks, and one loss ends all."""

import signal
import sys
import time

import pytest

import processes
import ranks as launcher
from hessdiag.launched import launched, launched_rank
from hessdiag_cli import ranks

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"}


def test_several_processes_of_torchrun_are_known_and_no_others():
    assert launched(TORCHRUN)
    assert launched_rank(TORCHRUN) == 1
    for other in (
        {},
        TORCHRUN | {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "2", "RANK": "1"},  # a cluster's job that starts one process by itself
    ):
        assert not launched(other)
        assert launched_rank(other) == 0


@pytest.fixture
def rank_1(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("rank_1")
def test_a_rank_but_the_first_is_mute(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    ranks.mute_others()
    print("twice")
    print("twice", file=sys.stderr)
    sys.stdout.close()
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_one_process_alone_speaks_and_has_no_group(capsys):
    ranks.mute_others()
    print("once")
    with ranks.together("auto") as group:
        assert group is None
    assert capsys.readouterr().out == "once\n"
    assert ranks.lost_meanwhile() is None


@pytest.mark.usefixtures("rank_1")
def test_a_mute_rank_that_failed_waits_until_it_is_terminated(monkeypatch):
    waited = []
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setattr(signal, "sigtimedwait", lambda *given: waited.append(given))
    for code in (0, 130, 143):
        ranks.let_the_first_speak(code)
    assert waited == []
    ranks.let_the_first_speak(2)
    assert waited == [({signal.SIGTERM}, ranks.PATIENCE)]


def test_a_refusal_is_told_once_and_ends_all_ranks_with_its_code(tmp_path):
    processes.prepare(tmp_path)
    started = launcher.analyze(2, tmp_path, "--curvature", "nonsense")
    first, second = started
    assert first.wait(timeout=60) == 2
    second.terminate()  # as torchrun does then
    outcomes = launcher.finish(started)
    assert [code for code, _, _ in outcomes] == [2, 2]
    assert "curvature is 'nonsense'" in outcomes[0][2]
    assert outcomes[1][1:] == ("", "")


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_with_5_and_one_process_resumes(tmp_path):
    processes.prepare(tmp_path)
    started = launcher.analyze(2, tmp_path, "--engine", "recompute")
    until = time.monotonic() + 60
    while len(processes.parts(tmp_path)) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    started[1].kill()
    code, _, err = launcher.finish(started)[0]
    assert code == 5
    assert "rank 1 was lost" in err
    assert "finished and kept" in err
    kept = processes.parts(tmp_path)
    assert len(kept) >= 2
    code, _, err = processes.finish(processes.start(tmp_path, "--engine", "recompute"))
    assert code == 0, err
    assert "resuming" in err
    other = tmp_path / "undisturbed"
    other.mkdir()
    processes.prepare(other)
    code, _, err = processes.finish(processes.start(other, "--engine", "recompute"))
    assert code == 0, err
    assert len(processes.stored(tmp_path).blocks) == len(processes.stored(other).blocks)
    for block in processes.stored(other).blocks:
        twin = processes.stored(tmp_path)[block.name]
        for variant, result in block.variants.items():
            scale = abs(result["lambda_max"].value)
            found = twin.variants[variant]["lambda_min"].value
            assert abs(found - result["lambda_min"].value) <= 1e-12 * scale


@pytest.mark.slow
def test_a_finished_run_ends_all_ranks_and_another_is_refused_by_all(tmp_path):
    processes.prepare(tmp_path)
    code, _, err = processes.finish(processes.start(tmp_path, "--exact-limit", "0"))
    assert code == 0, err
    outcomes = launcher.finish(launcher.analyze(2, tmp_path, "--exact-limit", "0", "--json"))
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert outcomes[0][1].startswith("{")
    assert outcomes[1][1:] == ("", "")
    started = launcher.analyze(2, tmp_path, "--exact-limit", "1")
    assert started[0].wait(timeout=120) == 2
    started[1].terminate()
    outcomes = launcher.finish(started)
    assert [code for code, _, _ in outcomes] == [2, 2]
    assert "exact_limit differs" in outcomes[0][2]
    assert outcomes[1][1:] == ("", "")
