"""Supports Qwen3.5 and Qwen3.6, dense: Qwen3-VL's tower without deepstack, a decoder of two kinds of layers.

Three Gated DeltaNet layers, which keep a state and no keys (`illava.decoder.gated_delta`), stand before each layer of
gated full attention with partly rotated heads; `illava.decoder.decoder` runs both. Prompts, positions and times between
frames are Qwen3-VL's.

Source: transformers 5.23, models/qwen3_5.
"""

from __future__ import annotations

from transformers import Qwen3_5ForConditionalGeneration

from illava.families.qwen.qwen3_vl import Qwen3VL


class Qwen35(Qwen3VL):
    """Holds one loaded Qwen3.5 model."""

    model_class = Qwen3_5ForConditionalGeneration
