"""A causal language model from a configuration: nothing is fetched, no code of it is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import TaskError, is_out_of_memory
from hessdiag.huggingface.describe import refusal
from hessdiag.huggingface.library import transformers

NOT_OURS = (
    "auto_map",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation_internal",
)
"""Entries that name code of others, kernels to fetch, or a type; the analysis has its own."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
COUNTS = ("layers", "n_layer", "experts")
"""How the names of entries end that count modules."""

MANY = 1000
SLACK = 1_000_000
PROBE = 6
"""Tokens of the row that shows whether a model looks ahead."""


def build_model(
    config: Mapping[str, Any], folder: Path, weights: Mapping[str, Tensor]
) -> nn.Module:
    """The network that a ``config.json`` describes, at random weights, on the CPU.

    Args:
        config: Parsed.
        folder: Of the file, for messages.
        weights: Of the directory: a configuration that asks for far more is not built.

    Raises:
        MissingExtra: transformers is not installed.
        TaskError: It is no causal language model of transformers, or cannot be built.
    """
    reason = refusal(config)
    if reason is not None:
        raise TaskError(_no_task(folder, reason))
    kind = str(config["model_type"])
    with transformers() as library, torch.random.fork_rng(devices=[]):
        version = library.__version__
        if kind not in library.CONFIG_MAPPING:
            own = " (it is code that the model brings along, which is never run)"
            reason = f"transformers {version} knows no model_type {kind!r}"
            raise TaskError(_no_task(folder, reason + own * ("auto_map" in config)))
        try:
            _check_counts(config, folder, weights)
            described = library.CONFIG_MAPPING[kind].from_dict(
                {key: value for key, value in config.items() if key not in NOT_OURS}
            )
            if type(described) not in library.AutoModelForCausalLM._model_mapping:
                raise TaskError(_no_task(folder, f"a {kind} is no causal language model"))
            _check_size(library, described, folder, weights)
            model: nn.Module = _from_config(library, described)
            _check_causal(model, folder)
        except TaskError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            raise TaskError(
                _no_task(folder, f"transformers {version} cannot build it ({reason})")
            ) from error
    return model


def vocabulary(model: Any) -> int:
    """How many tokens the model can both read and predict."""
    sizes = [model.get_input_embeddings().num_embeddings]
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        sizes.append(head.out_features)
    return int(min(sizes))


def longest(model: Any) -> int | None:
    """The most tokens in a row that the model takes; None without a limit."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "max_sequence_length"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _from_config(library: Any, described: Any) -> Any:
    """Attention goes through torch's own function, which an analysis sets to its math kernel."""
    try:
        model = library.AutoModelForCausalLM.from_config(described, attn_implementation="sdpa")
    except ValueError:
        model = library.AutoModelForCausalLM.from_config(described, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # its grouped product knows no float64
    model.config.use_cache = False
    return model.eval()


def _check_counts(config: Mapping[str, Any], folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse more layers than there can be before a loop over them begins."""
    for name, value in _entries(config):
        limit = len(weights) if name in LAYERS else max(len(weights), MANY)
        if isinstance(value, int) and name.endswith(COUNTS) and value > limit:
            raise TaskError(
                f"{folder / 'config.json'} says {name} = {str(value)[:20]}, and the directory "
                f"holds only {len(weights):,} tensors; they do not belong together"
            )


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        yield str(name), value
        if isinstance(value, Mapping):
            yield from _entries(value)


def _check_size(library: Any, described: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Count the values on the meta device, where they take no memory."""
    with torch.device("meta"):
        try:
            model = _from_config(library, described)
        except NotImplementedError:
            return  # it computes with its weights while it is built
    asked = sum(parameter.numel() for parameter in model.parameters())
    held = sum(tensor.numel() for tensor in weights.values())
    if asked > 2 * held + SLACK:
        raise TaskError(
            f"{folder / 'config.json'} describes a network of {asked:,} values, and the directory "
            f"holds {held:,}; they do not belong together"
        )


def _check_causal(model: Any, folder: Path) -> None:
    """Change the last token of a row: nothing before it may see that."""
    tokens = torch.zeros(2, min(PROBE, longest(model) or PROBE), dtype=torch.int64)
    tokens[1, -1] = vocabulary(model) - 1
    with torch.no_grad():
        first, second = model(input_ids=tokens).logits[:, :-1].float()
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
        raise TaskError(_no_task(folder, "its predictions depend on the tokens that come later"))


def _no_task(folder: Path, reason: str) -> str:
    return (
        f"{folder} is a Hugging Face directory that hessdiag cannot make a task from: {reason}.\n"
        "Write a task that builds the model and says its data and loss:\n  hessdiag init"
    )
