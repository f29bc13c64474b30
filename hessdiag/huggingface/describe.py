"""What a ``config.json`` says of its network, told without transformers and without running it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PREFIX = "hf:"
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""How the class names of causal language models end."""

PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,80}")
"""What a name of a stranger may be to be shown as it is."""


def describe(config: Mapping[str, Any]) -> str:
    """The task's name, ``hf:gpt2``."""
    return f"{PREFIX}{config.get('model_type')}"


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why no task can be made from a directory's configuration; None if it may be.

    Whether transformers knows the kind of model is seen only when it is built.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or not PLAIN.fullmatch(kind):
        return "its config.json names no model_type"
    if config.get("quantization_config"):
        return "its weights are quantised; dequantise the model and save_pretrained it"
    classes = config.get("architectures") or []
    named = [str(name) for name in classes] if isinstance(classes, list) else [str(classes)]
    if named and not any(name.endswith(CAUSAL) for name in named):
        shown = [name if PLAIN.fullmatch(name) else repr(name)[:60] for name in named[:4]]
        return f"its network is a {', '.join(shown)}, not a causal language model"
    if config.get("is_encoder_decoder") is True:
        return f"its network ({kind}) is an encoder with a decoder, not a causal language model"
    return None
