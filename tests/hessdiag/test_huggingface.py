"""A Hugging Face directory becomes a task whose loss is float64 from end to end."""

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import hessdiag
import language_models as tiny
from hessdiag.blocks import find_blocks
from hessdiag.checkpoint import map_optimizer, match_weights, read_checkpoint
from hessdiag.errors import InputError, MissingExtra, TaskError
from hessdiag.huggingface.build import build_model, vocabulary
from hessdiag.huggingface.library import transformers
from hessdiag.huggingface.task import causal_lm_task, next_token_loss
from hessdiag.huggingface.tokens import as_rows, demo_tokens, read_tokens
from hessdiag.huggingface.trainer import decays, trainer_optimizer
from hessdiag.huggingface.wide import Wide

BLOCKS = {
    "gpt2": ("transformer.h.0.ln_1", ["weight", "bias"]),
    "llama": ("model.layers.0.input_layernorm", ["weight"]),
}
KINDS = pytest.mark.parametrize("name", list(BLOCKS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny.make_directory(root / name, name) for name in BLOCKS}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    draw = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(path, draw.integers(0, tiny.VOCABULARY, (3, 6)))
    return path


@KINDS
def test_the_hessian_is_that_of_the_model_written_out_by_hand(folders, tokens, name):
    checkpoint = read_checkpoint(folders[name])
    block, parts = BLOCKS[name]
    run = hessdiag.analyze(causal_lm_task(checkpoint, tokens), checkpoint=checkpoint, blocks=block)
    rows = torch.from_numpy(np.load(tokens))
    names = [f"{block}.{part}" for part in parts]
    weights = load_file(folders[name] / "model.safetensors")
    matrix = tiny.hessian(name, weights, names, rows)
    truth = torch.linalg.eigvalsh(matrix)
    loss = tiny.next_token_loss(
        tiny.LOGITS[name]({k: v.double() for k, v in weights.items()}, rows), rows
    )
    found = run[block].variants["raw"]
    assert found["loss"] == pytest.approx(float(loss), rel=1e-14)
    assert found["lambda_max"].status == "exact"
    eigenvalue = torch.from_numpy(np.array(found.spectrum["eigenvalue"])).sort().values
    assert torch.allclose(eigenvalue, truth, rtol=0, atol=1e-13 * float(truth.abs().max()))
    assert run.provenance.environment["checks"]["hidden_casts"] == {}
    assert run.provenance.config["task"] == f"hf:{name}"


def test_without_the_wide_mode_the_library_hides_float32(folders, tokens, monkeypatch):
    checkpoint = read_checkpoint(folders["llama"])
    monkeypatch.setattr("hessdiag.huggingface.task.Wide", torch.enable_grad)
    run = hessdiag.analyze(
        causal_lm_task(checkpoint, tokens), checkpoint=checkpoint, blocks=BLOCKS["llama"][0]
    )
    assert any("RMSNorm" in place for place in run.provenance.environment["checks"]["hidden_casts"])


def test_the_wide_mode_widens_and_never_narrows():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.ones(2)
        with Wide():
            wide = [
                x.float(), x.half(), x.bfloat16(), x.to(torch.float32), x.to(dtype=torch.float16),
                x.type(torch.float32), torch.softmax(x, 0, dtype=torch.float32),
                torch.zeros(2, dtype=torch.float32), torch.arange(2).float(),
                x.sum(dtype=torch.float32),
                torch.nn.functional.softmax(x, dim=0, dtype=torch.bfloat16),
                x.to("cpu", torch.float32),
            ]  # fmt: skip
            assert {t.dtype for t in wide} == {torch.float64}
            assert x.to(torch.int64).dtype == torch.int64
            assert x.to(torch.bool).dtype == torch.bool
        torch.set_default_dtype(torch.float32)
        with Wide():
            assert torch.ones(2, dtype=torch.float64).double().dtype == torch.float64
            assert torch.ones(2).to(torch.float64).dtype == torch.float64
            assert torch.ones(2).half().dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_a_tied_head_is_counted_once(folders, tokens):
    checkpoint = read_checkpoint(folders["gpt2"])
    assert "lm_head.weight" not in checkpoint.weights
    task = causal_lm_task(checkpoint, tokens)
    matched = match_weights(checkpoint, task.model)
    assert torch.equal(
        matched.weights["lm_head.weight"], checkpoint.weights["transformer.wte.weight"]
    )
    blocks = {block.name: block for block in find_blocks(task.model, ("layer",))}
    assert blocks["transformer.wte"].size == tiny.VOCABULARY * tiny.WIDTH
    assert blocks["whole"].size == sum(t.numel() for t in checkpoint.weights.values())
    assert blocks["lm_head"].skipped


def test_dropout_is_off(folders, tokens):
    task = causal_lm_task(read_checkpoint(folders["gpt2"]), tokens)
    assert task.mode == "eval"
    assert task.loss(task.model, task.data[0]) == task.loss(task.model, task.data[0])


def test_a_file_of_the_base_model_with_old_buffers_fits(folders, tmp_path):
    weights = load_file(folders["gpt2"] / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 12, 12)
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["gpt2"] / "config.json").read_text())
    checkpoint = read_checkpoint(tmp_path)
    model = build_model(checkpoint.config, tmp_path, checkpoint.weights)
    matched = match_weights(checkpoint, model)
    assert torch.equal(matched.weights["transformer.h.0.ln_1.bias"], bare["h.0.ln_1.bias"])
    assert matched.notices == [
        "put 'transformer.' before the names in the file",
        "left out 1 buffers that the model makes itself: h.0.attn.bias",
    ]


@KINDS
def test_the_trainers_groups_are_those_of_the_trainer(folders, name):
    checkpoint = read_checkpoint(folders[name])
    model = build_model(checkpoint.config, checkpoint.path, checkpoint.weights)
    with transformers() as library:
        wanted = set(library.Trainer.get_decay_parameter_names(None, model))
    names = [n for n, _ in model.named_parameters()]
    assert {n for n, decayed in decays(model).items() if decayed} == wanted & set(names)
    assert 0 < len(wanted & set(names)) < len(names)


@KINDS
@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_the_trainers_stored_state_finds_its_parameters(folders, tmp_path, name, decay):
    """The state's own values say whose it is: every gradient is another constant."""
    checkpoint = read_checkpoint(folders[name])
    model = build_model(checkpoint.config, checkpoint.path, checkpoint.weights)
    named = list(model.named_parameters())
    last = [any(w in n for w in ("ln_", "norm", "bias")) for n, _ in named]
    groups = [
        {"params": [p for (_, p), no in zip(named, last, strict=True) if no == later],
         "weight_decay": 0.0 if later else decay}
        for later in (False, True)
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    for index, (_, p) in enumerate(named):
        p.grad = torch.full_like(p, float(index + 1))
    optimizer.step()
    for file in folders[name].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    read = read_checkpoint(tmp_path)
    task = causal_lm_task(read, _tokens(tmp_path))
    state = map_optimizer(read.optimizer, task.model, task.optimizer)
    assert (state.class_name, state.mapped_by, state.unmappable) == ("AdamW", "optimizer", None)
    for index, (n, _) in enumerate(named):
        value = state.state[n]["exp_avg"]
        assert torch.allclose(value, torch.full_like(value, 0.1 * (index + 1)))


def _tokens(folder: Path) -> Path:
    np.save(folder / "t.npy", np.arange(12).reshape(2, 6) % tiny.VOCABULARY)
    return folder / "t.npy"


def test_the_decayed_group_comes_first_whatever_the_file_says(folders):
    checkpoint = read_checkpoint(folders["gpt2"])
    model = build_model(checkpoint.config, checkpoint.path, checkpoint.weights)
    both = list(model.parameters())
    stored = torch.optim.AdamW(
        [{"params": both[:1], "weight_decay": 0.0}, {"params": both[1:2], "weight_decay": 0.1}]
    ).state_dict()
    groups = trainer_optimizer(stored)(model).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in groups[0]["params"]][:2] == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
    ]
    assert map_optimizer(stored, model, trainer_optimizer(stored)).unmappable


@pytest.mark.parametrize(
    "group",
    [
        {"scale_parameter": True, "lr": 1e-3},
        {"ns_steps": 5, "lr": 1e-3},
        {"dampening": 0, "weight_decay": "much"},
        {"dampening": 0, "weight_decay": float("nan")},
        {"dampening": 0, "weight_decay": -1.0},
    ],
)
def test_state_that_no_optimizer_of_the_trainer_wrote_is_not_mapped(folders, tokens, group):
    checkpoint = read_checkpoint(folders["gpt2"])
    raw = {"state": {}, "param_groups": [{"params": [0]} | group] * 2}
    task = causal_lm_task(replace(checkpoint, optimizer=raw), tokens)
    assert task.optimizer is None
    assert map_optimizer(raw, task.model, task.optimizer).unmappable


def test_without_data_the_shipped_text_is_taken_and_said(folders, tmp_path):
    folder = tiny.make_directory(tmp_path / "bytes", "gpt2", vocab_size=256)
    task = causal_lm_task(read_checkpoint(folder))
    assert task.notices[0].startswith("demo text, not your data")
    assert torch.equal(torch.cat(list(task.data)).flatten(), demo_tokens()[: 174 * 12])
    assert bytes(demo_tokens().tolist()).decode("ascii").startswith("Alice was beginning")
    with pytest.raises(InputError, match=r"vocabulary is 0 to 10; give tokens of its own"):
        causal_lm_task(read_checkpoint(folders["gpt2"]))


def test_every_table_says_demo_text(tmp_path):
    folder = tiny.make_directory(tmp_path / "bytes", "gpt2", vocab_size=256)
    checkpoint = read_checkpoint(folder)
    run = hessdiag.analyze(
        causal_lm_task(checkpoint), checkpoint=checkpoint, blocks="*ln_f", max_examples=2
    )
    assert "demo text, not your data" in str(run)
    assert "demo text, not your data" in " ".join(run.provenance.warnings)


def test_tokens_of_every_kind_are_read(tmp_path):
    wanted = torch.tensor([[1, 2, 3], [4, 5, 6]])
    np.save(tmp_path / "a.npy", wanted.numpy().astype(np.uint16))
    torch.save(wanted.to(torch.int32), tmp_path / "a.pt")
    (tmp_path / "a.txt").write_bytes(b"\x00\xffA")
    assert torch.equal(read_tokens(tmp_path / "a.npy"), wanted)
    assert torch.equal(read_tokens(tmp_path / "a.pt"), wanted)
    assert read_tokens(tmp_path / "a.txt").tolist() == [0, 255, 65]


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (lambda p: np.save(p, np.ones(4)), "a.npy", "integer tokens, not float64"),
        (lambda p: np.save(p, np.ones(4, bool)), "a.npy", "integer tokens, not bool"),
        (lambda p: np.save(p, np.array([{}])), "a.npy", "is no array of numpy"),
        (lambda p: p.write_bytes(b"nonsense"), "a.npy", "is no array of numpy"),
        (lambda p: p.write_bytes(b""), "a.npy", "is no array of numpy"),
        (lambda p: np.save(p, np.full(2, 2**64 - 1, np.uint64)), "a.npy", "which is none"),
        (lambda p: np.save(p, np.ones((1, 2, 3), int)), "a.npy", r"shape \(1, 2, 3\)"),
        (lambda p: np.save(p, np.int64(3)), "a.npy", r"shape \(\)"),
        (lambda p: torch.save({"a": 1}, p), "a.pt", "one tensor, not a dict"),
        (lambda p: torch.save(torch.ones(3), p), "a.pt", "integer tokens, not float32"),
        (lambda p: torch.save(Path("x"), p), "a.pt", "would import pathlib"),
        (lambda p: p.write_text("1,2"), "a.csv", r"must end in \.npy, \.pt, \.txt"),
        (lambda p: None, "a.npy", "cannot be read: No such file"),
        (lambda p: None, "a.pt", "cannot be read: No such file"),
        (lambda p: p.mkdir(), "a.txt", "cannot be read: Is a directory"),
    ],
)
def test_data_that_are_no_tokens_are_refused(tmp_path, write, name, message):
    write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read_tokens(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[0, 11]], "token 11, and the model's vocabulary is 0 to 10"),
        ([[0, -1]], "token -1"),
        ([[0] * 13], "rows of 13 tokens, and this model takes at most 12"),
        ([[0]], "too few tokens"),
        ([0], "too few tokens"),
        ([], "too few tokens"),
    ],
)
def test_tokens_that_do_not_fit_the_model_are_refused(folders, tmp_path, content, message):
    np.save(tmp_path / "t.npy", np.array(content, dtype=np.int64))
    with pytest.raises(InputError, match=message):
        causal_lm_task(read_checkpoint(folders["gpt2"]), tmp_path / "t.npy")


def test_one_sequence_is_cut_into_rows_and_the_rest_is_left_out_with_a_notice(folders, tmp_path):
    np.save(tmp_path / "t.npy", np.arange(29) % tiny.VOCABULARY)
    checkpoint = read_checkpoint(folders["gpt2"])
    task = causal_lm_task(checkpoint, tmp_path / "t.npy")
    assert [tuple(batch.shape) for batch in task.data] == [(2, 12)]
    assert task.data[0].flatten().tolist() == [i % tiny.VOCABULARY for i in range(24)]
    assert task.notices == ("the last 5 tokens of t.npy fill no row and are left out",)
    assert task.batch_size(task.data[0]) == 2 * 11
    shorter = causal_lm_task(checkpoint, tmp_path / "t.npy", length=5)
    assert [tuple(batch.shape) for batch in shorter.data] == [(5, 5)]
    for length in (1, 13):
        with pytest.raises(InputError, match="takes 2 to 12"):
            causal_lm_task(checkpoint, tmp_path / "t.npy", length=length)


def test_rows_have_a_sensible_length_where_the_model_has_no_limit():
    assert as_rows(torch.arange(300), length=None, longest=None, source="").shape == (2, 128)
    assert as_rows(torch.arange(9), length=None, longest=None, source="").shape == (1, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt-5000"}, "knows no model_type 'gpt-5000'"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "code.Net"}},
         "code that the model brings along, which is never run"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": ["gpt2"]}, "names no model_type"),
        ({"architectures": ["BertForMaskedLM"]}, "a BertForMaskedLM, not a causal"),
        ({"is_encoder_decoder": True}, "an encoder with a decoder"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": "vit"}, "a vit is no causal language model"),
        ({"n_layer": 10**9}, r"n_layer = 1000000000, and the directory holds only 16 tensors"),
        ({"n_layer": 17}, "n_layer = 17"),
        ({"text_config": {"decoder_layers": 10**30}}, "decoder_layers = 10000000000000000000, and"),
        ({"n_embd": 2**20, "n_head": 2}, "they do not belong together"),
        ({"n_embd": "many"}, "cannot build it"),
        ({"n_head": 3}, "cannot build it"),
        ({"n_embd": -8}, "cannot build it"),
    ],
)  # fmt: skip
def test_a_configuration_of_no_causal_model_is_refused_with_what_to_do(folders, changes, message):
    checkpoint = read_checkpoint(folders["gpt2"])
    with pytest.raises(TaskError, match=message) as caught:
        build_model(checkpoint.config | changes, checkpoint.path, checkpoint.weights)
    assert "hessdiag init" in str(caught.value) or "do not belong together" in str(caught.value)


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    config = {
        "model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 8, "vocab_size": 9, "initializer_range": 1.0,
    }  # fmt: skip
    weights = {str(i): torch.zeros(1000) for i in range(30)}
    with pytest.raises(TaskError, match="depend on the tokens that come later"):
        build_model(config, tmp_path, weights)
    build_model(config | {"is_decoder": True}, tmp_path, weights)


def test_a_mixture_of_experts_runs_in_float64(tmp_path, monkeypatch):
    config = tiny.LLAMA | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2,
    }  # fmt: skip
    weights = {str(i): torch.zeros(1000) for i in range(30)}
    model = build_model(config, tmp_path, weights).double()
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    loss = next_token_loss(model, torch.arange(8).reshape(2, 4))
    assert loss.dtype == torch.float64
    assert torch.autograd.grad(loss, model.lm_head.weight)[0].dtype == torch.float64


def test_the_vocabulary_is_what_can_be_both_read_and_predicted(folders):
    checkpoint = read_checkpoint(folders["llama"])
    model = build_model(checkpoint.config, checkpoint.path, checkpoint.weights)
    assert vocabulary(model) == tiny.VOCABULARY
    model.lm_head = torch.nn.Linear(tiny.WIDTH, 7)
    assert vocabulary(model) == 7


def test_code_of_others_and_kernels_to_fetch_are_never_asked_for(folders):
    checkpoint = read_checkpoint(folders["gpt2"])
    asked = {"auto_map": {"AutoModelForCausalLM": "evil--code.Net"}, "dtype": "bfloat16",
             "attn_implementation": "kernels-community/flash-attn"}  # fmt: skip
    model = build_model(checkpoint.config | asked, checkpoint.path, checkpoint.weights)
    assert model.config._attn_implementation == "sdpa"
    assert next(model.parameters()).dtype == torch.float32


def test_the_library_is_borrowed_offline_and_given_back(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    modules = sys.modules.get("torchvision", "absent")
    with transformers() as library:
        hub = importlib.import_module("huggingface_hub.constants")
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
        assert hub.HF_HUB_OFFLINE is True
        assert library.__name__ == "transformers"
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    assert "TRANSFORMERS_OFFLINE" not in os.environ
    assert hub.HF_HUB_OFFLINE is False
    assert sys.modules.get("torchvision", "absent") is modules


def test_a_torchvision_for_another_torch_is_kept_from_the_library(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('made for another torch')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with transformers():
        assert sys.modules["torchvision"] is None
    assert "torchvision" not in sys.modules


def test_without_the_library_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'hessdiag\[hf\]'"):
        causal_lm_task(read_checkpoint(folders["gpt2"]))


def test_building_leaves_the_random_state_alone(folders):
    checkpoint = read_checkpoint(folders["gpt2"])
    before = torch.get_rng_state()
    build_model(checkpoint.config, checkpoint.path, checkpoint.weights)
    assert torch.equal(torch.get_rng_state(), before)


def test_gauss_newton_goes_through_the_library_too(folders, tokens):
    checkpoint = read_checkpoint(folders["llama"])
    task = causal_lm_task(checkpoint, tokens)
    run = hessdiag.analyze(task, checkpoint=checkpoint, blocks=BLOCKS["llama"][0], curvature="ggn")
    assert run.blocks[0].variants["raw"]["lambda_min"].low >= -1e-12
    assert run.provenance.environment["checks"]["hidden_casts"] == {}
