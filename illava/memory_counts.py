"""Counts what a model takes in a device's memory, from its JSON files: key/value cache and activations. Torch-free.

Activations are the tensors that live at once in the widest place of a tower call and of a prefill of the engine's
limits; they are an estimate, and attention is taken to keep no scores. What weights take is counted from the files
(`illava.weight_files`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from illava.engine.config import EngineConfig
from illava.model_files import JsonSection, ModelFiles

CARDS_GB = (24, 48, 80, 141)  # L4 and 4090; L40S and A6000; A100 and H100; H200
CONTEXT_BYTES = 700_000_000  # CUDA's own, with the libraries' kernels and workspaces
FREE_MEMORY_SHARE = 0.6  # of what the weights leave, for the key/value pool; the rest is for activations
_IN_RULE = 12  # rows of a head's width that live in the torch formula of a recurrent layer's rule
_RULE_CHUNK = 64  # tokens that it compares with each other, in three matrices
_BESIDE_MLP = 4  # hidden states at the model's width that live beside the MLP's: residual, normed, delta, rotary's


@dataclass(frozen=True, slots=True)
class MemoryCounts:
    """Holds what one model takes beside its weights.

    Attributes:
        kv_token_bytes: a token's keys and values in all layers.
        activation_bytes: at most at a time.
    """

    kv_token_bytes: int
    activation_bytes: int


@dataclass(frozen=True, slots=True)
class Fit:
    """Says whether a model runs on a card.

    Attributes:
        fits: weights, key/value pool and activations stand in its memory together.
        cache_bytes: of the pool; 0 where the weights alone are too large.
    """

    fits: bool
    cache_bytes: int


def memory_counts(files: ModelFiles, itemsize: int, config: EngineConfig | None = None) -> MemoryCounts | None:
    """Count for a dtype of so many bytes; None where the configuration leaves a width out."""
    limits = config or EngineConfig()
    text = files.config.section("text_config") if files.config.get("text_config") else files.config
    vision = files.config.section("vision_config") if files.config.get("vision_config") else None
    heads, layers = text.get("num_attention_heads"), text.get("num_hidden_layers")
    kv_heads = text.get("num_key_value_heads") or heads
    width, inner = text.get("hidden_size"), text.get("intermediate_size")
    head_dim = text.get("head_dim") or (width // heads if isinstance(width, int) and heads else None)
    if not all(isinstance(number, int) for number in (layers, kv_heads, head_dim, width, inner)):
        return None
    kinds = text.get("layer_types") or []
    layers -= sum(kind == "linear_attention" for kind in kinds)  # which keep a state of one size instead
    prefill = limits.max_prefill_tokens * (_BESIDE_MLP * width + 3 * inner)  # gate, up, and their product
    logits = limits.batch_limit("cuda") * int(text.get("vocab_size") or 152_064) * 3  # drawn from in float32
    tower = limits.max_vision_patches * _patch_values(vision)
    widest = max(max(prefill, tower) * itemsize, limits.max_prefill_tokens * _rule_bytes(text) if kinds else 0)
    return MemoryCounts(2 * layers * kv_heads * head_dim * itemsize, widest + logits * itemsize)


def _rule_bytes(text: JsonSection) -> int:
    """Bytes that live for each token in a recurrent layer's delta rule, which runs in float32 (`illava.decoder`)."""
    heads, width = text.get("linear_num_value_heads") or 0, text.get("linear_value_head_dim") or 0
    return int(heads * (_IN_RULE * width + 3 * _RULE_CHUNK) * 4)


def _patch_values(vision: JsonSection | None) -> int:
    """Numbers that live for each patch in a block of the tower."""
    if vision is None:
        return 0
    width: Any = vision.get("embed_dim") or vision.get("hidden_size") or 1152
    inner: Any = vision.get("intermediate_size") or int(width * (vision.get("mlp_ratio") or 4))
    return int(_BESIDE_MLP * width + 3 * inner)


def fit(
    counts: MemoryCounts, weights_bytes: int, card_bytes: int, *, cache_bytes: int | None = None, share: float = 1.0
) -> Fit:
    """Say whether a model fits a card, or a share of one, beside CUDA's own memory."""
    left = int(card_bytes * share) - CONTEXT_BYTES - weights_bytes
    pool = int(max(0, left) * FREE_MEMORY_SHARE) if cache_bytes is None else cache_bytes
    return Fit(pool > 0 and left - pool >= counts.activation_bytes, pool)
