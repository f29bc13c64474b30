"""``analyze`` from the command line: streams, files, exit codes and the document it prints."""

import json
import sys

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import processes
from hessdiag import open_run
from hessdiag.demos import DEMOS
from hessdiag_cli.__main__ import Stopped, main

TASK = '''
from pathlib import Path
import torch, torch.nn.functional as F
from torch import nn
from hessdiag import Task

CALLS = []

def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(23, 4, generator=generator)
    return [(x[:16], x[:16, :3].argmax(1)), (x[16:], x[16:, :3].argmax(1))]

def task(hidden=5):
    """A network of 43 parameters, or as many as --task-arg hidden=N makes."""
    net = nn.Sequential(nn.Linear(4, int(hidden)), nn.Tanh(), nn.Linear(int(hidden), 3))
    return Task(net, data(), nn.CrossEntropyLoss())

def fragile(calls):
    """One whose loss breaks after so many calls, as a lost device would."""
    def loss(model, batch):
        CALLS.append(1)
        Path("calls").write_text(str(len(CALLS)))
        if len(CALLS) > int(calls):
            raise RuntimeError("device\\nlost")
        return F.cross_entropy(model(batch[0]), batch[1])
    return Task(task().model, data(), loss)

def dropout():
    net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.Linear(5, 3))
    return Task(net, data(), nn.CrossEntropyLoss(), mode="train")
'''


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a checkpoint and its task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HESSDIAG_TASK", raising=False)
    monkeypatch.delitem(sys.modules, "hessdiag_task", raising=False)
    torch.save(network().state_dict(), "model.pt")
    (tmp_path / "hessdiag_task.py").write_text(TASK)
    return tmp_path


@pytest.fixture
def hessdiag(here, monkeypatch, capsys):
    """``hessdiag("analyze", …)`` -> exit code, stdout, stderr; through the real entry point."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hessdiag", *map(str, arguments)])
        capsys.readouterr()
        with processes.kept_handlers(), pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, " ".join(err.replace("│", " ").split())

    return run


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".pt")


def test_the_checkpoint_alone_is_enough_and_the_table_goes_to_stdout(here, hessdiag):
    code, out, err = hessdiag("analyze", "model.pt")
    assert code == 0
    assert [name for name in files(here) if "h5" in name] == ["model.h5"]
    rows = [line.split()[0] for line in out.splitlines() if line[:1].isalnum()]
    assert {"0", "2", "whole"} <= set(rows)
    assert "The worst block is " in out
    assert max(map(len, out.splitlines())) <= 100
    assert "\x1b" not in out + err
    assert err.startswith("task hessdiag_task.py:task (hessdiag_task.py of the working directory)")
    assert "row 1/6 whole: 43 of 43 products" in err
    assert err.endswith("stored in model.h5")


def test_quiet_says_nothing_on_stderr_and_json_is_one_document_that_show_and_the_file_repeat(
    hessdiag,
):
    code, out, err = hessdiag("analyze", "model.pt", "--json", "-q", "-o", "run.h5")
    assert (code, err) == (0, "")
    document = json.loads(out, parse_constant=pytest.fail)
    assert document["format"] == "hessdiag-run"
    assert [block["name"] for block in document["blocks"]] == ["0", "2", "whole"]
    assert hessdiag("show", "run.h5", "--json") == (0, out, "")
    assert json.loads(open_run("run.h5").to_json()) == document


def test_a_second_identical_analysis_is_reprinted_without_work(here, hessdiag, monkeypatch):
    first = hessdiag("analyze", "model.pt", "--json")
    before = (here / "model.h5").read_bytes()
    monkeypatch.setattr("hessdiag.analysis.run_selfchecks", lambda *a, **k: pytest.fail("worked"))
    again = hessdiag("analyze", "model.pt", "--json", "--engine", "recompute", "--device", "cpu")
    assert again[:2] == first[:2]
    assert (here / "model.h5").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "field"),
    [
        (("--seed", "7"), "seed"),
        (("--curvature", "ggn"), "curvature"),
        (("--weight-decay", "0.1"), "weight_decay"),
        (("--blocks", "whole"), "blocks"),
        (("--exact-limit", "30"), "exact_limit"),
        (("--max-examples", "9"), "max_examples"),
    ],
)
def test_a_different_analysis_over_a_run_is_refused_by_field_and_needs_force(
    here, hessdiag, option, field
):
    assert hessdiag("analyze", "model.pt", "-q", "--blocks", "2")[0] == 0
    before = (here / "model.h5").read_bytes()
    asked = ("analyze", "model.pt", "-q", "--blocks", "2", *option)
    code, out, err = hessdiag(*asked)
    assert (code, out) == (2, "")
    assert f" {field}" in err.split("another analysis:")[1].split("differ")[0]
    assert "--force" in err
    assert (here / "model.h5").read_bytes() == before
    assert hessdiag(*asked, "--force")[0] == 0
    assert (here / "model.h5").read_bytes() != before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.pt"], "gone.pt does not exist"),
        (["hessdiag_task.py"], "not a checkpoint"),
        (["model.pt", "--no-such-option"], "No such option"),
        (["model.pt", "--steps", "many"], "--steps"),
        (["model.pt", "--steps", "0"], "steps is 0"),
        (["model.pt", "--variants", "adma"], "unknown variant 'adma'"),
        (["model.pt", "--curvature", "fisher"], "hessian, ggn"),
        (["model.pt", "--blocks", "zzz*"], "no layer matches 'zzz*'"),
        (["model.pt", "--blocks", "all=zzz*"], "no parameter matches 'zzz*'"),
        (["model.pt", "--damping", "nan"], "damping is nan"),
        (["model.pt", "--task", "gone.py"], "gone.py"),
        (["model.pt", "--task", "hessdiag_task.py:gone"], "no 'gone'"),
        (["model.pt", "--task", "demo:gone"], "demo:mlp"),
        (["model.pt", "--task-arg", "hidden"], "not key=value"),
        (["model.pt", "--task-arg", "hidden=6"], "0.weight (file 5×4, model 6×4)"),
        (["model.pt", "--task", "hessdiag_task.py:dropout"], "'1' (Dropout)"),
        (["model.pt", "-o", "no/such/folder.h5"], "does not exist"),
        (["model.pt", "-o", "hessdiag_task.py", "--force"], "not a hessdiag run"),
    ],
)
def test_what_cannot_be_used_exits_2_with_one_message_and_writes_nothing(
    here, hessdiag, arguments, says
):
    before = files(here)
    code, out, err = hessdiag("analyze", "-q", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
    assert files(here) == before


def test_a_bare_state_dict_without_a_task_gets_a_panel_to_act_on(here, hessdiag):
    (here / "hessdiag_task.py").unlink()
    code, out, err = hessdiag("analyze", "model.pt")
    assert (code, out) == (2, "")
    assert "model.pt is a state dict" in err
    assert "0.weight 5×4 float32" in err
    assert "hessdiag init" in err
    assert "hessdiag analyze model.pt --task FILE.py" in err


def test_a_task_file_beside_a_checkpoint_elsewhere_is_never_run(here, hessdiag, monkeypatch):
    (here / "hessdiag_task.py").write_text("raise RuntimeError('a downloaded file ran')")
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    code, _, err = hessdiag("analyze", here / "model.pt")
    assert code == 2
    assert "no task was found" in err


def test_a_pickled_module_needs_trust_and_names_what_it_would_import(here, hessdiag):
    torch.save(network(), here / "module.pt")
    code, _, err = hessdiag("analyze", "module.pt", "-q")
    assert code == 2
    assert "torch.nn.modules.linear.Linear" in err
    assert "--trust" in err
    assert hessdiag("analyze", "module.pt", "-q", "--trust")[0] == 0


def test_a_checkpoint_with_prefixes_is_read_with_a_notice_and_gives_the_same_numbers(
    here, hessdiag
):
    plain = json.loads(hessdiag("analyze", "model.pt", "--json", "-q")[1])
    state = {f"module._orig_mod.{k}": v for k, v in network().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, here / "wrapped.pt")
    code, out, err = hessdiag("analyze", "wrapped.pt", "--json")
    assert code == 0
    assert "removed 'module.' and '_orig_mod.' from the names" in err
    kappas = [
        [block["variants"]["raw"]["kappa"] for block in document["blocks"]]
        for document in (plain, json.loads(out))
    ]
    assert kappas[0] == kappas[1]


@pytest.mark.parametrize(
    ("blocks", "names"),
    [
        ("layer", ["0", "2", "whole"]),
        ("parameter", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("whole", ["whole"]),
        ("2*,whole", ["2", "whole"]),
        ("weights=*.weight", ["weights"]),
        ("2,biases=*.bias", ["2", "biases"]),
    ],
)
def test_blocks_are_those_that_were_asked_for(hessdiag, blocks, names):
    code, out, _ = hessdiag("analyze", "model.pt", "--json", "-q", "--blocks", blocks)
    assert code == 0
    assert [block["name"] for block in json.loads(out)["blocks"]] == names


def test_a_block_that_fails_exits_4_is_told_everywhere_and_is_tried_again(here, hessdiag):
    def asked(calls):
        more = ("--engine", "recompute", "--blocks", "2,0", "--exact-limit", "0")
        task = ("--task", "hessdiag_task.py:fragile", "--task-arg", f"calls={calls}")
        sys.modules.pop("hessdiag_task", None)
        one = ("--variants", "raw")
        return hessdiag("analyze", "model.pt", "-q", "--json", *task, *more, *one)

    code, out, _ = asked(10**6)
    assert code == 0
    products = [b["variants"]["raw"]["products"] for b in json.loads(out)["blocks"]]
    (here / "model.h5").unlink()
    # After the rows come H_e and its neurons; a third of the calls before the end is in a row.
    code, out, err = asked(int((here / "calls").read_text()) * 2 // 3)
    reasons = [b["variants"]["raw"]["skipped"] for b in json.loads(out)["blocks"]]
    assert (code, err) == (4, "")
    assert reasons[0] is None
    assert "device lost" in reasons[1]
    assert open_run("model.h5")["0"].variants["raw"]["skipped"] == reasons[1]
    assert "device lost" in " ".join(hessdiag("show", "model.h5")[1].split())
    assert hessdiag("validate", "model.h5")[0] == 0
    code, out, _ = asked(10**6)
    assert code == 0
    assert [b["variants"]["raw"]["products"] for b in json.loads(out)["blocks"]] == products


def test_the_file_holds_the_document_number_by_number(hessdiag):
    arguments = ("--max-examples", "20", "--damping", "1e-3", "--json", "-q")
    document = json.loads(hessdiag("analyze", "model.pt", *arguments)[1])
    axes = {"kappa_quantile": "quantile", "profile": "threshold", "forecast": "horizon"}
    compared = 0
    with h5py.File("model.h5") as file:
        summary = file["summary"]
        assert dict(file.attrs)["encoding-type"] == "hessdiag-run"
        assert dict(file.attrs)["encoding-version"] == "1.0.0"
        assert summary["block"].asstr()[:].tolist() == ["0", "2", "whole"]
        for row, block in enumerate(document["blocks"]):
            for path, value in leaves(block["variants"]["raw"]):
                at, name = (row, 0), "_".join(path)
                if path[0] in axes:
                    keys = summary[axes[path[0]]][:]
                    at = (*at, int(np.argmin(np.abs(keys - float(path[1])))))
                    name = "_".join((path[0], *path[2:]))
                if isinstance(value, dict):
                    for key, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
                        same_number(summary[name + suffix][at], value[key])
                    status = summary[f"{name}_status"].asstr()[at]
                    assert status == (value["status"] or "")
                    compared += 1
                elif isinstance(value, bool):
                    assert summary[name].dtype == np.int8
                    assert summary[name][at] == value
                elif isinstance(value, int | float):
                    same_number(summary[name][at], value)
            assert file[f"spectra/raw/{row}"].attrs["block"] == block["name"]
            size = block["variants"]["raw"]["size"]
            assert file[f"spectra/raw/{row}/eigenvalue"].shape == (size,)
            for field in ("norm", "norm_low", "norm_high", "diagonal"):
                assert file[f"rows/raw/{row}/{field}"].shape == (size,)
        assert compared > 200
        for name in ("config", "environment", "fingerprint", "warnings"):
            json.loads(file[f"provenance/{name}"].asstr()[()])

        def described(_name, item):
            if isinstance(item, h5py.Dataset):
                assert item.attrs["units"]
                assert item.attrs["long_name"]
                assert item.is_scale or all(len(axis) for axis in item.dims)

        file.visititems(described)


def test_xarray_opens_every_group_without_help_and_without_warnings(hessdiag):
    xarray = pytest.importorskip("xarray")
    document = json.loads(hessdiag("analyze", "model.pt", "--json", "-q")[1])
    with xarray.open_dataset("model.h5", engine="h5netcdf", group="summary") as summary:
        kappa = summary["kappa"].sel(block="2", variant="raw").item()
        assert kappa == document["blocks"][1]["variants"]["raw"]["kappa"]["value"]
        gain = summary["forecast_positive"].sel(block="2", variant="raw", horizon=100).item()
        assert (
            gain == document["blocks"][1]["variants"]["raw"]["forecast"]["100"]["positive"]["value"]
        )
    for group in ("spectra/raw/1", "rows/raw/2", "provenance"):
        with xarray.open_dataset("model.h5", engine="h5netcdf", group=group) as part:
            part.load()


@pytest.fixture
def series(here):
    """Three checkpoints of one training, the last not named after its step."""
    for seed, name in enumerate(("step-0.pt", "step-100.pt")):
        torch.save(network(seed).state_dict(), here / name)
    torch.save({"model": network(2).state_dict(), "step": 250}, here / "last.pt")
    return ("step-0.pt", "step-100.pt", "last.pt")


def test_several_checkpoints_give_a_run_each_and_one_table_over_steps(here, hessdiag, series):
    code, out, err = hessdiag("analyze", *series)
    assert code == 0
    assert [n for n in files(here) if "h5" in n] == ["last.h5", "step-0.h5", "step-100.h5"]
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert [name for name in rows if name.isalnum()] == [
        "Sequential",
        "step",
        "0",
        "100",
        "250",
        "at",
        "helps",
    ]
    assert "The worst block" not in out
    assert err.count("task hessdiag_task.py:task") == 1
    assert "checkpoint 2/3 step-100.pt" in err
    assert "stored in last.h5" in err


def test_each_of_several_is_what_it_is_alone(here, hessdiag, series):
    (here / "out").mkdir()
    code, out, err = hessdiag("analyze", *series, "-o", "out", "--json", "-q")
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (found["format"], found["version"]) == ("hessdiag-runs", "1.0.0")
    assert [(r["checkpoint"], r["step"]) for r in found["runs"]] == [
        ("step-0.pt", 0),
        ("step-100.pt", 100),
        ("last.pt", 250),
    ]
    assert [n for n in files(here / "out") if "parts" not in n] == [
        "last.h5",
        "step-0.h5",
        "step-100.h5",
    ]
    assert open_run("out/last.h5").provenance.config["step"] == 250
    for name, together in zip(series, found["runs"], strict=True):
        alone = json.loads(
            hessdiag("analyze", name, "-o", "alone.h5", "--force", "--json", "-q")[1]
        )
        for block, same in zip(alone["blocks"], together["blocks"], strict=True):
            for tree in (*block["variants"].values(), *same["variants"].values()):
                assert tree.pop("seconds") > 0
            assert block == same


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "gone"], "-o gone is not a directory"),
        (["-o", "step-0.pt"], "-o step-0.pt is not a directory"),
        (["copy/step-0.pt"], "step-0.pt and copy/step-0.pt would both be stored in step-0.h5"),
        (["gone.pt"], "gone.pt does not exist"),
        (["gone.pt"], "at gone.pt, checkpoint 4 of 4; nothing was analysed"),
        (["other.pt"], "other.pt does not fit the task's model"),
        (["foreign.pt"], "foreign.h5 exists and is not a hessdiag run"),
    ],
)
def test_what_cannot_be_used_among_several_ends_all_before_any_work(
    here, hessdiag, series, arguments, says
):
    (here / "copy").mkdir()
    for name in ("copy/step-0.pt", "foreign.pt"):
        torch.save(network().state_dict(), here / name)
    torch.save(nn.Linear(2, 2).state_dict(), here / "other.pt")
    (here / "foreign.h5").write_text("mine")
    before = files(here)
    code, out, err = hessdiag("analyze", "-q", *series, *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert files(here) == before


@pytest.mark.parametrize(("error", "exit_code"), [(MemoryError(), 5), (Stopped(130), 130)])
def test_an_end_at_one_of_several_keeps_the_runs_before_it(
    here, hessdiag, series, monkeypatch, error, exit_code
):
    import hessdiag.analysis as analysis

    real, calls = analysis.analyze, []

    def failing(*arguments, **options):
        calls.append(options["checkpoint"].path.name)
        if len(calls) == 2:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(analysis, "analyze", failing)
    code, out, err = hessdiag("analyze", "-q", *series)
    assert (code, out) == (exit_code, "")
    assert calls == ["step-0.pt", "step-100.pt"]
    assert "at step-100.pt, checkpoint 2 of 3; the finished run is stored in step-0.h5" in err
    assert [n for n in files(here) if "h5" in n] == ["step-0.h5"]
    assert open_run("step-0.h5").provenance.config["checkpoint"] == "step-0.pt"


def test_a_block_that_fails_in_one_of_several_does_not_stop_the_others(
    here, hessdiag, series, monkeypatch
):
    import hessdiag.analysis as analysis

    real = analysis.analyze

    def partial(task, *, checkpoint, **options):
        run = real(task, checkpoint=checkpoint, **options)
        if checkpoint.path.name == "step-0.pt":
            run.provenance.environment["failed"] = ["0"]
        return run

    monkeypatch.setattr(analysis, "analyze", partial)
    code, out, _ = hessdiag("analyze", "-q", *series)
    assert code == 4
    assert "250" in out
    assert "last.h5" in files(here)


def test_the_checkpoints_of_several_may_belong_to_different_built_in_tasks(here, hessdiag):
    (here / "hessdiag_task.py").unlink()
    for name in ("convnet", "transformer"):
        model = DEMOS[name]().model
        content = {"model": model.state_dict(), "hessdiag": {"task": f"demo:{name}"}}
        torch.save(content, here / f"{name}.pt")
    options = ("--blocks", "head", "--max-examples", "40", "--json", "-q")
    code, out, _ = hessdiag("analyze", "convnet.pt", "transformer.pt", *options)
    assert code == 0
    assert [r["task"] for r in json.loads(out)["runs"]] == ["demo:convnet", "demo:transformer"]


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict) and "status" not in value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def same_number(stored, told):
    assert np.isnan(stored) if told is None else stored == told


def test_what_the_users_code_prints_is_no_part_of_the_result(here, hessdiag):
    (here / "talk.py").write_text(
        "import torch\nfrom torch import nn\nfrom hessdiag import Task\nprint('imported')\n"
        "def task():\n"
        "    model = nn.Linear(2, 1)\n"
        "    torch.save(model.state_dict(), 'talk.pt')\n"
        "    def loss(model, batch):\n"
        "        print('called')\n"
        "        return model(batch).square().mean()\n"
        "    return Task(model, [torch.ones(3, 2)], loss)\n"
    )
    torch.save(torch.nn.Linear(2, 1).state_dict(), here / "talk.pt")
    code, out, err = hessdiag("analyze", "talk.pt", "--task", "talk.py", "--json")
    assert code == 0
    assert json.loads(out)["format"] == "hessdiag-run"
    assert "imported" in err
    assert "called" in err
    code, out, err = hessdiag("inspect", "talk.pt", "--task", "talk.py", "--json", "--estimate")
    assert code == 0
    assert json.loads(out)["estimate"]
    assert "called" in err
