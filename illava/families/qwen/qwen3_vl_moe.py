"""Supports Qwen3-VL-MoE: Qwen3-VL in all but the language model's MLPs, which are mixtures of experts.

A router sends each token to a few experts, by that token alone. So whatever else is packed beside a token, and whatever
a reduction took away, the experts that serve it stay; `Decoder.finish` runs Hugging Face's own block.

Source: transformers 5.23, models/qwen3_vl_moe.
"""

from __future__ import annotations

from transformers import Qwen3VLMoeForConditionalGeneration

from illava.families.qwen.qwen3_vl import Qwen3VL


class Qwen3VLMoe(Qwen3VL):
    """Holds one loaded Qwen3-VL-MoE model."""

    model_class = Qwen3VLMoeForConditionalGeneration
