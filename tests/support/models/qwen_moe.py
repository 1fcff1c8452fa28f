"""Tiny random-weight Qwen3-VL-MoE folders, for tests: `tests.support.models.qwen.make_qwen3_vl` with experts.

4 experts, 2 a token. Neither of an expert's weights is square, so that a transposed one cannot pass for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.models.qwen import _qwen3_vision, _text, _tokenizer, _tokens, _write

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def make_qwen3_vl_moe(
    folder: str | Path, *, depth: int = 6, num_layers: int = 4, dense_layers: Sequence[int] = (), seed: int = 0
) -> Path:
    """Write a Qwen3-VL-MoE folder; ``dense_layers`` of the decoder have a plain MLP."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    tokenizer = _tokenizer()
    text = _text(tokenizer, num_layers) | {"head_dim": 16, **EXPERTS, "mlp_only_layers": list(dense_layers)}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=_qwen3_vision(depth), **_tokens(tokenizer))
    folder = _write(folder, tokenizer, Qwen3VLMoeForConditionalGeneration, config, name="Qwen3VL", seed=seed)
    _store_as_published(folder / "model.safetensors")
    return folder


def _store_as_published(path: Path) -> None:
    """Write experts with their inputs first, as the published files have them; transformers turns them on loading."""
    from safetensors.torch import load_file, save_file

    stored = load_file(path)
    turned = {key: w.transpose(1, 2).contiguous() if ".experts." in key else w for key, w in stored.items()}
    save_file(turned, path, {"format": "pt"})
