"""The process itself: exit codes, signals, start-up, and the frozen surface of the commands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from hessdiag import errors
from hessdiag_cli.__main__ import exit_code
from hessdiag_cli.app import app

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands

SLOW_TASK = """
import time
import torch
from torch import nn
from hessdiag import Task

def task():
    def loss(model, batch):
        time.sleep(0.02)
        return model(batch).square().mean()
    return Task(nn.Linear(30, 20), [torch.randn(8, 30)], loss)
"""


def environment():
    paths = [str(ROOT), str(ROOT / "cli"), str(ROOT / "probes")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        **options,
    )


def options(command):
    parameters = COMMANDS[command].params
    return {name for p in parameters for name in p.opts if name.startswith("-")}


def test_the_commands_are_these():
    assert sorted(COMMANDS) == [
        "analyze",
        "crosscheck",
        "demo",
        "diff",
        "init",
        "inspect",
        "merge",
        "show",
        "validate",
    ]


def test_the_options_of_analyze_are_these():
    assert options("analyze") - {"-h", "--help"} == {
        *("--task", "--task-arg", "--trust", "--output", "-o", "--force", "--variants", "--blocks"),
        *("--curvature", "--exact-limit", "--steps", "--probes", "--density", "--tolerance"),
        *("--eigensolver", "--max-seconds", "--device", "--dtype", "--seed"),
        *("--batch-size", "--max-examples", "--weight-decay", "--damping", "--engine"),
        *("--iterates", "--reference", "--shard"),
        *("--memory-budget", "--json", "--quiet", "-q", "--verbose", "-v", "--debug", "--data"),
    }


def test_the_options_of_inspect_and_diff_are_these():
    common = {"--json", "--quiet", "-q", "--verbose", "-v", "--debug"}
    assert options("diff") - {"-h", "--help"} == {"--block", "--variant", *common}
    asked = options("inspect") - {"-h", "--help"} - common
    assert asked - {"--estimate"} < options("analyze")
    assert asked - options("analyze") == {"--estimate"}
    assert asked >= {
        *("--blocks", "--curvature", "--exact-limit", "--steps", "--probes", "--density"),
        *("--batch-size", "--max-examples", "--engine", "--memory-budget", "--dtype", "--device"),
        *("--task", "--task-arg", "--data", "--trust", "--shard"),
    }


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_the_common_options_and_an_example(command):
    assert {"--quiet", "-q", "--verbose", "-v", "--debug"} <= options(command)
    assert f"Example: hessdiag {command}" in " ".join(COMMANDS[command].help.split())


@pytest.mark.parametrize(
    "command", ["analyze", "show", "diff", "inspect", "demo", "merge", "validate"]
)
def test_every_command_that_prints_results_has_json(command):
    assert "--json" in options(command)


def test_help_imports_no_heavy_module():
    heavy = ("torch", "scipy", "numpy", "h5py", "pandas", "matplotlib", "hessdiag.analysis")
    source = (
        "import sys\n"
        "from hessdiag_cli.__main__ import main\n"
        "try: main()\n"
        f"finally: print(*[m for m in {heavy} if m in sys.modules], file=sys.stderr)\n"
    )
    helped = python("-m", "hessdiag_cli", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert all(command in helped.stdout for command in COMMANDS)
    for arguments in (["--help"], ["analyze", "--help"], ["diff", "--help"]):
        shown = python("-c", source, *arguments)
        assert (shown.returncode, shown.stderr.split()) == (0, [])


def test_a_wrong_option_exits_2_on_stderr_without_importing_torch():
    wrong = python("-m", "hessdiag_cli", "analyze", "model.pt", "--no-such-option")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--no-such-option" in wrong.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TaskError("x"), 2),
        (errors.StoreError("x"), 2),
        (errors.SelfCheckFailed("x"), 2),
        (errors.MissingExtra("x"), 2),
        (errors.OutOfResources("x"), 5),
        (MemoryError(), 5),
        (torch.OutOfMemoryError(), 5),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError(), 70),
    ],
)
def test_each_error_has_its_exit_code(error, code):
    assert exit_code(error) == code


def test_signals_end_an_analysis_with_130_and_143_and_leave_nothing_behind(tmp_path):
    (tmp_path / "hessdiag_task.py").write_text(SLOW_TASK)
    torch.save(nn.Linear(30, 20).state_dict(), tmp_path / "model.pt")
    before = {path.name for path in tmp_path.iterdir()}
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143}
    command = [sys.executable, "-B", "-m", "hessdiag_cli", "analyze", "model.pt"]
    command += ["--engine", "recompute", "-o"]
    running = {
        number: subprocess.Popen(
            [*command, f"{number.name}.h5"],
            env=environment(),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in expected
    }
    try:
        for number, process in running.items():
            for line in process.stderr:
                if line.startswith("row 1/"):  # at work: the self-checks are over
                    break
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
            assert process.returncode == expected[number]
            assert out == ""
            assert "Traceback" not in err
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert {path.name for path in tmp_path.iterdir()} == before
