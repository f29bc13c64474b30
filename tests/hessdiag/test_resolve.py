"""The first rule that applies gives the task; finding runs nothing, loading says what failed."""

from pathlib import Path

import pytest
import torch

from hessdiag.checkpoint import Checkpoint
from hessdiag.errors import OptionError, TaskError
from hessdiag.resolve import find, no_task_message, parse_value, resolve

GOOD = """
import torch
from hessdiag.task import Task
def task(width: int = 2):
    return Task(torch.nn.Linear(width, 1), [torch.ones(1, width)], lambda m, b: m(b).mean(),
                name=f"width {width!r}")
fixed = task()
number = 3
"""
FATAL = "raise RuntimeError('user code ran')\n"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(GOOD)
    return tmp_path


def named(task: str) -> Checkpoint:
    """A checkpoint that asks for a task."""
    return Checkpoint(Path("m.pt"), "state dict", {"w": torch.ones(1)}, task=task)


def found(here: Path, reference: str | None = None, **options):
    return find(reference, cwd=here, environ=options.pop("environ", {}), **options)


def test_each_rule_gives_way_to_the_one_before(here):
    environ = {"HESSDIAG_TASK": "env.mod"}
    (here / "hessdiag.toml").write_text('task = "a.py"\n')
    (here / "pyproject.toml").write_text('[tool.hessdiag]\ntask = "b.py:net"\n')
    for name in ("a.py", "b.py", "hessdiag_task.py"):
        (here / name).write_text(FATAL)

    def rule(reference=None, environ=None):
        hit = found(here, reference, environ=environ or {}, checkpoint=named("demo:mlp"))
        return hit.reference, hit.source

    assert rule("mine.py", environ) == ("mine.py:task", "--task")
    assert rule(None, environ) == ("env.mod:task", "the environment's HESSDIAG_TASK")
    assert rule() == ("a.py:task", "hessdiag.toml of the working directory")
    (here / "hessdiag.toml").write_text("[gate]\n")
    assert rule() == ("b.py:net", "pyproject.toml of the working directory")
    (here / "pyproject.toml").unlink()
    assert rule() == ("hessdiag_task.py:task", "hessdiag_task.py of the working directory")
    (here / "hessdiag_task.py").unlink()
    assert rule() == ("demo:mlp", "the checkpoint")
    assert found(here) is None


def test_a_task_beside_a_checkpoint_elsewhere_is_never_found(here, tmp_path):
    elsewhere = tmp_path / "download"
    elsewhere.mkdir()
    (elsewhere / "hessdiag_task.py").write_text(FATAL)
    checkpoint = Checkpoint(elsewhere / "m.pt", "state dict", {"w": torch.ones(2)})
    with pytest.raises(TaskError, match="no task was found"):
        resolve(None, cwd=here, environ={}, checkpoint=checkpoint)


@pytest.mark.parametrize("asked", ["evil.mod", "evil.py:task", "/etc/x.py"])
def test_a_checkpoint_can_only_ask_for_a_built_in_task(here, asked):
    (here / "evil.py").write_text(FATAL)
    with pytest.raises(TaskError, match="only built-in tasks"):
        found(here, checkpoint=named(asked))


def test_an_unknown_demo_has_a_near_miss(here):
    with pytest.raises(TaskError, match="did you mean demo:convnet"):
        found(here, "demo:convnt")


def test_a_demo_loads(here):
    assert found(here, "demo:mlp").load().name == "demo:mlp"


@pytest.mark.parametrize(
    ("reference", "name"), [("mine.py", "width 2"), ("mine.py:fixed", "width 2")]
)
def test_a_file_gives_a_task_or_a_function_of_it(here, reference, name):
    assert found(here, reference).load().name == name


def test_a_relative_path_is_that_of_the_working_directory(here, monkeypatch):
    (here / "sub").mkdir()
    (here / "sub" / "t.py").write_text("from helper import task\n")
    (here / "sub" / "helper.py").write_text(GOOD)
    (here / "hessdiag.toml").write_text('task = "sub/t.py"\n')
    monkeypatch.chdir("/")
    assert found(here).load().name == "width 2"


def test_a_module_of_the_working_directory_gives_a_task(here):
    (here / "pkg_of_test").mkdir()
    (here / "pkg_of_test" / "__init__.py").write_text("")
    (here / "pkg_of_test" / "mod.py").write_text(GOOD)
    assert found(here, "pkg_of_test.mod:fixed").load().name == "width 2"


def test_the_search_path_is_left_as_it_was(here):
    import sys

    before = list(sys.path)
    found(here, "mine.py").load()
    assert sys.path == before


def test_task_arguments_are_parsed_and_given(here):
    assert found(here, "mine.py", task_args={"width": "5"}).load().name == "width 5"
    with pytest.raises(TaskError, match=r"widht.*did you mean width.*its arguments: width"):
        found(here, "mine.py", task_args={"widht": "5"}).load()
    with pytest.raises(TaskError, match="takes no --task-arg"):
        found(here, "mine.py:fixed", task_args={"width": "5"}).load()


def test_values_become_numbers_and_booleans_where_they_are():
    texts = ("3", "-2", "1e-3", "true", "False", "mlp", "nan", "")
    values = [parse_value(text) for text in texts]
    assert values == [3, -2, 1e-3, True, False, "mlp", "nan", ""]
    assert [type(value) for value in values[:4]] == [int, int, float, bool]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\n\nx = 1 / 0\n", r"bad\.py:3: ZeroDivisionError: division by zero"),
        ("def task(:\n", r"bad\.py:1: SyntaxError"),
        ("def task():\n    import no_such_module_x\n", r"bad\.py:2: ModuleNotFoundError"),
        ("import sys\nsys.exit(0)\n", r"bad\.py:2: SystemExit"),
        (
            "import json\ndef task():\n    return json.loads('{')\n",
            r"bad\.py:3: JSONDecodeError",
        ),
        (
            "import hessdiag.task as t\ndef task():\n    return t.Task(3, [], print)\n",
            r"bad\.py:3: the task's model must be",
        ),
        ("def task():\n    return 3\n", "returned a int; it must return a hessdiag.Task"),
        ("task = 3\n", "is a int; it must be a hessdiag.Task"),
        ("def tusk():\n    pass\n", r"has no 'task'; it defines tusk .did you mean tusk"),
    ],
)
def test_an_error_of_the_users_file_says_where_and_what(here, text, message):
    (here / "bad.py").write_text(text)
    hit = found(here, "bad.py")
    with pytest.raises(TaskError, match=message):
        hit.load()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mne.py", "there is no file mne.py.*did you mean mine.py"),
        ("a b", "which is not FILE.py"),
        ("dir/mod", "which is not FILE.py"),
        ("mine.py:a-b", "which is not FILE.py"),
        ("", "which is not FILE.py"),
    ],
)
def test_a_reference_that_cannot_be_one_is_refused_at_once(here, reference, message):
    with pytest.raises(TaskError, match=message):
        found(here, reference)


def test_a_module_that_is_not_there_is_named(here):
    with pytest.raises(TaskError, match="no module 'no_such_package_x'"):
        found(here, "no_such_package_x.mod").load()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("hessdiag.toml", "task = \n", r"hessdiag\.toml is not valid TOML.*line 1"),
        ("pyproject.toml", "[tool.hessdiag\n", r"pyproject\.toml is not valid TOML"),
        ("hessdiag.toml", "task = 3\n", "must be a string"),
        ("hessdiag.toml", 'task = "gone.py"\n', "no file gone.py .hessdiag.toml"),
    ],
)
def test_a_configuration_that_is_wrong_is_one_clear_error(here, file, text, message):
    (here / file).write_text(text)
    with pytest.raises(TaskError, match=message):
        found(here)


def test_without_a_task_the_message_describes_the_file_and_says_what_works():
    weights = {f"layers.{i}.weight": torch.ones(3, i + 1) for i in range(9)}
    message = no_task_message(Checkpoint(Path("m.pt"), "state dict (torch zip)", weights))
    for part in (
        "m.pt is a state dict (torch zip) of 9 tensors with 135 values",
        "layers.1.weight",
        "3×2",
        "float32",
        "and 3 more",
        "hessdiag init",
        "hessdiag analyze m.pt --task FILE.py",
    ):
        assert part in message


def directory(config: dict, **changes) -> Checkpoint:
    """A Hugging Face directory that was read."""
    weights = {"transformer.wte.weight": torch.ones(2, 3)}
    return Checkpoint(Path("gpt"), "Hugging Face directory", weights, config=config, **changes)


GPT = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


def test_a_hugging_face_directory_comes_last(here):
    hit = found(here, checkpoint=directory(GPT), data=Path("t.npy"))
    assert (hit.reference, hit.source) == ("hf:gpt2", "the Hugging Face directory")
    assert found(here, checkpoint=directory(GPT, task="demo:mlp")).reference == "demo:mlp"
    (here / "hessdiag_task.py").write_text(FATAL)
    assert found(here, checkpoint=directory(GPT)).reference == "hessdiag_task.py:task"
    assert found(here, "demo:mlp", checkpoint=directory(GPT)).reference == "demo:mlp"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM, not"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder with a decoder"),
        ({}, "names no model_type"),
        ({"model_type": "gpt2\n\x1b[31m"}, "names no model_type"),
        ({"model_type": "bert", "architectures": ["\x1b[2J" * 900]}, r"is a '\\x1b\[2J"),
        (GPT | {"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_of_a_directory_that_makes_no_task_the_message_says_why(here, config, reason):
    assert found(here, checkpoint=directory(config)) is None
    with pytest.raises(TaskError, match=reason) as caught:
        resolve(None, cwd=here, environ={}, checkpoint=directory(config))
    assert "hessdiag init" in str(caught.value)
    assert "hessdiag analyze gpt --task FILE.py" in str(caught.value)


def test_data_for_a_task_that_brings_its_own_are_refused(here):
    with pytest.raises(OptionError, match=r"--data .* demo:mlp \(--task\) brings its own data"):
        found(here, "demo:mlp", data=Path("t.npy"))


def test_the_name_of_a_directorys_task_is_no_reference(here):
    with pytest.raises(TaskError, match="give that directory as the checkpoint"):
        found(here, "hf:gpt2")


def test_a_directorys_task_takes_length_and_nothing_else(here):
    hit = found(here, checkpoint=directory(GPT), task_args={"width": "3"})
    with pytest.raises(TaskError, match=r"hf:gpt2 does not take .*its arguments: length"):
        hit.load()


@pytest.mark.parametrize("place", ["a\0.py", "y" * 5000 + ".py", "~nobody-has-this-name/t.py"])
def test_what_no_path_can_be_is_a_task_error(here, place):
    with pytest.raises(TaskError, match="is no path of a file"):
        found(here, place)


@pytest.mark.parametrize("content", ["a = " + "[" * 50_000, "a = " + "9" * 10_000])
def test_toml_beyond_measure_is_a_task_error(here, content):
    (here / "hessdiag.toml").write_text(content)
    with pytest.raises(TaskError, match="not valid TOML"):
        found(here)


def test_an_error_that_cannot_say_what_it_is_still_has_its_class(here):
    (here / "t.py").write_text(
        "class Mute(Exception):\n    def __str__(self):\n        return 1 / 0\n\nraise Mute\n"
    )
    with pytest.raises(TaskError, match=r"t.py:5: Mute$"):
        found(here, "t.py").load()
