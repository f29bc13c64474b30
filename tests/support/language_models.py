"""Tiny causal language models: their directories, and their forward written out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from hessdiag.huggingface.build import build_model

VOCABULARY = 11
WIDTH = 8
HEADS = 2
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCABULARY,
    "n_embd": WIDTH, "n_layer": 1, "n_head": HEADS, "n_positions": 12, "bos_token_id": 0,
    "eos_token_id": 0, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY,
    "hidden_size": WIDTH, "intermediate_size": 10, "num_hidden_layers": 1,
    "num_attention_heads": HEADS, "num_key_value_heads": 1, "max_position_embeddings": 12,
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {"gpt2": GPT2, "llama": LLAMA}


def make_directory(path: Path, name: str, **changes: object) -> Path:
    """A directory as ``save_pretrained`` writes it, with weights that are nothing special."""
    config = CONFIGS[name] | changes
    path.mkdir(parents=True, exist_ok=True)
    size = torch.zeros(10**6)  # so that the configuration is not taken for a stranger's
    model = build_model(config, path, {str(i): size for i in range(100)})
    save_file(stored(model), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tied tensor once, at random values of a usual size."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: (0.4 * torch.randn(value.shape, generator=draw) + 1.0 * ("norm" in name))
        for name, value in model.named_parameters()
    }


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean over rows and positions of minus the log of the next token's probability."""
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    return -logs[:, :-1].gather(2, tokens[:, 1:, None]).mean()


def gpt2_logits(p: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """GPT-2 with one layer, by its paper."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ p[f"{name}.weight"] + p[f"{name}.bias"]

    positions = torch.arange(tokens.shape[1])
    x = p["transformer.wte.weight"][tokens] + p["transformer.wpe.weight"][positions]
    layer = "transformer.h.0"
    query, key, value = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").split(WIDTH, -1)
    x = x + linear(attention(query, key, value), f"{layer}.attn.c_proj")
    hidden = linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
    bent = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    x = x + linear(bent, f"{layer}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ p["transformer.wte.weight"].T


def llama_logits(p: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Llama with one layer and shared keys, by its paper."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]

    size = WIDTH // HEADS
    # The library makes the frequencies in float32; they are constants of the loss.
    steps = torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size
    angles = torch.arange(tokens.shape[1])[:, None] * (1.0 / 10000.0**steps).double()
    angles = torch.cat([angles, angles], -1)

    def rotate(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, size)).transpose(1, 2)
        first, second = heads.chunk(2, -1)
        turned = heads * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
        return turned.transpose(1, 2).flatten(2)

    layer = "model.layers.0"
    x = p["model.embed_tokens.weight"][tokens]
    normed = norm(x, f"{layer}.input_layernorm")
    query, key, value = (normed @ p[f"{layer}.self_attn.{n}_proj.weight"].T for n in "qkv")
    key, value = rotate(key).repeat(1, 1, HEADS), value.repeat(1, 1, HEADS)
    mixed = attention(rotate(query), key, value)
    x = x + mixed @ p[f"{layer}.self_attn.o_proj.weight"].T
    normed = norm(x, f"{layer}.post_attention_layernorm")
    gate, up = (normed @ p[f"{layer}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
    x = x + (functional.silu(gate) * up) @ p[f"{layer}.mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ p["lm_head.weight"].T


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention in heads."""
    size = WIDTH // HEADS
    q, k, v = (x.unflatten(-1, (HEADS, size)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(size)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


LOGITS = {"gpt2": gpt2_logits, "llama": llama_logits}


def hessian(name: str, weights: dict[str, Tensor], block: list[str], tokens: Tensor) -> Tensor:
    """The block's dense Hessian of the hand-written loss, by double backward, in float64."""
    p = {key: value.double() for key, value in weights.items()}
    for key in block:
        p[key].requires_grad_(True)
    chosen = [p[key] for key in block]
    loss = next_token_loss(LOGITS[name](p, tokens), tokens)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, chosen, create_graph=True)]
    )
    rows = [torch.autograd.grad(g, chosen, retain_graph=True) for g in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
