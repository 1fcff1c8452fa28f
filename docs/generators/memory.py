"""docs/choose-a-model.md's table of memory: weights by scheme, and what a card's key/value cache then holds.

Counted by `illava.memory_counts`, which a dry run uses too, from the widths of the published config.json files.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from docs.generators.markdown import GENERATED, table
from illava.memory_counts import CARDS_GB, MemoryCounts, fit, memory_counts
from illava.model_files import JsonSection, ModelFiles
from illava.weight_files import Quantization, WeightCounts

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "choose-a-model.md"
END = "<!-- end of what is generated -->"
SCHEMES: tuple[Quantization, ...] = ("none", "float8", "int8", "int4")
SHOWN: tuple[Quantization, ...] = ("none", "float8", "int4")  # per card; int8 takes what float8 takes


class Published(NamedTuple):
    """Names the widths of a published checkpoint: layers, width, MLP's width, heads, key/value heads, head width."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tower: dict[str, int]
    values: float  # of all weights, in 10^9


_SIGLIP, _CLIP = {"hidden_size": 1152, "intermediate_size": 4304}, {"hidden_size": 1024, "intermediate_size": 4096}
_QWEN2, _QWEN25 = {"embed_dim": 1280, "mlp_ratio": 4}, {"hidden_size": 1280, "intermediate_size": 3420}
CHECKPOINTS = {
    "llava-onevision-qwen2-0.5b-ov-hf": Published(24, 896, 4864, 14, 2, 64, 152_000, _SIGLIP, 0.894),
    "llava-onevision-qwen2-7b-ov-hf": Published(28, 3584, 18_944, 28, 4, 128, 152_128, _SIGLIP, 8.03),
    "llava-onevision-qwen2-72b-ov-hf": Published(80, 8192, 29_568, 64, 8, 128, 152_128, _SIGLIP, 73.2),
    "llava-v1.6-vicuna-7b-hf": Published(32, 4096, 11_008, 32, 32, 128, 32_064, _CLIP, 7.06),
    "llava-v1.6-vicuna-13b-hf": Published(40, 5120, 13_824, 40, 40, 128, 32_064, _CLIP, 13.4),
    "Qwen2-VL-2B-Instruct": Published(28, 1536, 8960, 12, 2, 128, 151_936, _QWEN2, 2.21),
    "Qwen2-VL-7B-Instruct": Published(28, 3584, 18_944, 28, 4, 128, 152_064, _QWEN2, 8.29),
    "Qwen2.5-VL-3B-Instruct": Published(36, 2048, 11_008, 16, 2, 128, 151_936, _QWEN25, 3.75),
    "Qwen2.5-VL-7B-Instruct": Published(28, 3584, 18_944, 28, 4, 128, 152_064, _QWEN25, 8.29),
    "Qwen3-VL-4B-Instruct": Published(36, 2560, 9728, 32, 8, 128, 151_936, _SIGLIP, 4.44),
    "Qwen3-VL-8B-Instruct": Published(36, 4096, 12_288, 32, 8, 128, 151_936, _SIGLIP, 8.77),
}


def page() -> str:
    """The whole page, with its table of memory made anew."""
    before, _, rest = PAGE.read_text("utf-8").partition(GENERATED)
    cards = [f"{card} GB" for card in CARDS_GB]
    head = ("checkpoint", *("bfloat16" if scheme == "none" else scheme for scheme in SCHEMES), "a token", *cards)
    made = table(head, [_row(name, published) for name, published in CHECKPOINTS.items()])
    return f"{before}{GENERATED}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


def weight_counts(one: Published) -> WeightCounts:
    """The decoder's linear layers by their widths; the rest is what is left of all weights."""
    queries, keys = one.heads * one.head_dim, one.kv_heads * one.head_dim
    linear = one.layers * one.width * (2 * queries + 2 * keys + 3 * one.inner)
    rows = one.layers * (queries + 2 * keys + 2 * one.width + 2 * one.inner)
    return WeightCounts(linear, rows, int(one.values * 1e9) - linear)


def counts_of(name: str, one: Published) -> MemoryCounts:
    """What the model takes beside its weights, in bfloat16."""
    text = {
        "num_hidden_layers": one.layers,
        "hidden_size": one.width,
        "intermediate_size": one.inner,
        "num_attention_heads": one.heads,
        "num_key_value_heads": one.kv_heads,
        "head_dim": one.head_dim,
        "vocab_size": one.vocabulary,
    }
    config = JsonSection(name, {"text_config": text, "vision_config": one.tower})
    found = memory_counts(ModelFiles(name, ROOT, config, JsonSection(name, {})), itemsize=2)
    if found is None:
        raise SystemExit(f"docs/generators/memory.py: {name} lacks a width")
    return found


def _row(name: str, one: Published) -> list[str]:
    weights, counts = weight_counts(one), counts_of(name, one)
    sizes = [f"{weights.num_bytes(2, scheme) / 1e9:.3g}" for scheme in SCHEMES]
    return [
        f"`{name}`",
        *sizes,
        f"{counts.kv_token_bytes / 1000:.0f}",
        *(_card(weights, counts, gb) for gb in CARDS_GB),
    ]


def _card(weights: WeightCounts, counts: MemoryCounts, gigabytes: int) -> str:
    """Thousands of cached tokens under each scheme that is shown; a dash where the model is too large."""
    said = []
    for scheme in SHOWN:
        card = fit(counts, weights.num_bytes(2, scheme), gigabytes * 10**9)
        said.append(f"{card.cache_bytes // counts.kv_token_bytes // 1000}" if card.fits else "-")
    return "-" if set(said) == {"-"} else " / ".join(said)
