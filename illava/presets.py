"""Lists the shipped plans by name, as plain dicts; `illava.plan.preset` builds a plan from them.

Source: arXiv 2412.06263v1 and the README of hulianyuyy/iLLaVA@4068149.
"""

from __future__ import annotations

from typing import Any


def _paper_plan(vision: list[int], num_merged: int, decoder: int, keep: float, *, score: str) -> dict[str, Any]:
    return {
        "steps": [
            {
                "stage": "vision_block",
                "layers": vision,
                "reducer": {"kind": "illava", "num_merged": num_merged},
            },
            {
                "stage": "decoder_layer",
                "layers": [decoder],
                "reducer": {"kind": "illava", "keep_ratio": keep, "score": score, "per": "prompt"},
            },
        ]
    }


def _with_frame_budget(plan: dict[str, Any], layout: str, keep_per_frame: int) -> dict[str, Any]:
    """Pooling restores the grid in the geometric layout: reduce to the count the released pooling leaves."""
    if layout == "released":
        return plan
    vision, decoder = plan["steps"]
    budget = {"stage": "decoder_input", "reducer": {"kind": "illava", "keep_per_frame": keep_per_frame}}
    return {"steps": [vision, budget, decoder]}


def _draw(decoder: int) -> dict[str, Any]:
    return _paper_plan([2, 3, 4, 5, 6, 7, 8], 80, decoder, 0.50, score="released")


def _video() -> dict[str, Any]:
    return _paper_plan([3, 4, 5, 6], 92, 2, 0.70, score="released")


def _small() -> dict[str, Any]:
    return _paper_plan([2, 3, 4, 5], 24, 1, 0.70, score="released")


def _tome_small_video() -> dict[str, Any]:
    """What cost the tiny demo model's clips nothing that could be measured: similar patches, then the last tokens."""
    last = {"kind": "illava", "keep_ratio": 0.30, "score": "causal_normalised", "per": "prompt"}
    return {
        "steps": [
            {"stage": "vision_block", "layers": [2, 3, 4, 5], "reducer": {"kind": "tome", "num_merged": 24}},
            {"stage": "decoder_layer", "layers": [2], "reducer": last},
        ]
    }


def _shares(
    vision: list[int], keep: float, decoder: list[int], decoder_keep: float, *, kind: str = "illava"
) -> dict[str, Any]:
    """Shares instead of counts, for towers whose number of patches depends on the picture."""
    last = {"kind": kind, "keep_ratio": decoder_keep, "score": "released", "per": "prompt"}
    return {
        "steps": [
            {"stage": "vision_block", "layers": vision, "reducer": {"kind": kind, "keep_ratio": keep}},
            {"stage": "decoder_layer", "layers": decoder, "reducer": last},
        ]
    }


def _pyramid(layers: list[int]) -> dict[str, Any]:
    return {
        "steps": [{"stage": "decoder_layer", "layers": layers, "reducer": {"kind": "pyramiddrop", "keep_ratio": 0.5}}]
    }


def _ward(blocks: list[int], keep: float, decoder_keep: float | None, layout: str) -> dict[str, Any]:
    """Equal cuts of each frame or tile to ``keep`` in all, and one before the LLM; sizes in both attentions.

    On two tiny models two cuts lost less than four to as many tokens, tokens that differ from their surroundings and
    so count more lost less than equal or attended ones, and joins within a frame less than joins across frames
    (docs/benchmarks.md). Layout ``released`` has no true places to count; then the tower's attention alone knows sizes.
    """
    return _ward_plan(blocks, {"keep_ratio": round(keep ** (1 / len(blocks)), 3)}, decoder_keep, layout)


def _ward_small(num_merged: int, decoder_keep: float | None, layout: str) -> dict[str, Any]:
    """Two cuts of the tiny demo model's 196 patches, and the share of a frame's 49 tokens that comes next to theirs."""
    return _ward_plan([3, 5], {"num_merged": num_merged}, decoder_keep, layout)


def _ward_plan(blocks: list[int], budget: dict[str, Any], decoder_keep: float | None, layout: str) -> dict[str, Any]:
    ward = {"kind": "ward", "contrast": 1.0}
    steps: list[dict[str, Any]] = [{"stage": "vision_block", "layers": blocks, "reducer": ward | budget}]
    if decoder_keep is not None:
        before_llm = ward | {"keep_ratio": decoder_keep, "per": "frame"}
        steps.append({"stage": "decoder_input", "reducer": before_llm})
    return {"steps": steps} | _size_bias(layout)


def _ward_document(layout: str) -> dict[str, Any]:
    """The tower whole, since glyphs need it; before the LLM what lies within an error, whatever its count.

    At 0.1 the tiny demo model lost nothing that could be measured, and a page of text keeps four times as many tokens
    as a blank picture (benchmarks/README.md).
    """
    bound = {"kind": "ward", "max_merge_error": 0.1}
    return {"steps": [{"stage": "decoder_input", "reducer": bound}]} | _size_bias(layout)


def _size_bias(layout: str) -> dict[str, bool]:
    return {} if layout == "released" else {"size_bias": True}


# The frame budget is what the released pooling leaves of the pseudo-grid: 19 -> 10 x 10, 13 -> 7 x 7, 10 -> 5 x 5.
PRESETS: dict[str, Any] = {
    "none": lambda layout: {"steps": []},
    "illava-paper": lambda layout: _paper_plan([3, 4, 5, 6], 92, 2, 0.70, score="paper"),
    "illava-image": lambda layout: _paper_plan([5, 6, 7, 8], 92, 8, 0.70, score="released"),
    "illava-video": lambda layout: _with_frame_budget(_video(), layout, 100),
    "illava-draw": lambda layout: _draw(8),
    "illava-draw-video": lambda layout: _with_frame_budget(_draw(2), layout, 49),
    # No release for LLaVA-NeXT: illava-image's layers, and the equal cut that comes nearest to half: 576 -> 288.
    "illava-next-image": lambda layout: _paper_plan([5, 6, 7, 8], 72, 8, 0.70, score="released"),
    # Shares of whole 2x2 groups, in the README; the block numbers of Qwen2.5-VL are its full-attention blocks.
    "illava-qwen2-vl": lambda layout: _shares([12, 13, 14, 15], 0.84, [6, 7, 8], 0.90),
    "illava-qwen2.5-vl": lambda layout: _shares([7, 15, 23], 0.80, [6, 7, 8], 0.90),
    # Qwen2-VL's shares, in the decoder behind full-attention layers (3, 7, ...): before the others nothing can rank.
    "illava-qwen3.5": lambda layout: _shares([12, 13, 14, 15], 0.84, [4, 8], 0.85),
    "illava-2026": lambda layout: _shares([5, 6, 7, 8], 0.90, [15, 17, 19, 21], 0.85, kind="illava_2026"),
    # The paper's layers in a decoder of 32 layers, and the same shares of one of 28 (Qwen2-7B).
    "pyramiddrop": lambda layout: _pyramid([8, 16, 24]),
    "pyramiddrop-28": lambda layout: _pyramid([7, 14, 21]),
    # Ours. An image's count before the LLM is the tower's; a video's grid is restored and pooled, so it is cut there.
    "ward-image-50": lambda layout: _ward([6, 8], 0.50, None, layout),
    "ward-image-25": lambda layout: _ward([6, 8], 0.25, None, layout),
    "ward-video-50": lambda layout: _ward([6, 8], 0.50, 0.50, layout),
    "ward-video-25": lambda layout: _ward([6, 8], 0.25, 0.25, layout),
    "ward-qwen2-vl-50": lambda layout: _ward([13, 15], 0.50, None, layout),
    "ward-qwen2-vl-25": lambda layout: _ward([13, 15], 0.25, None, layout),
    "ward-qwen2.5-vl-50": lambda layout: _ward([7, 15, 23], 0.50, None, layout),
    "ward-qwen2.5-vl-25": lambda layout: _ward([7, 15, 23], 0.25, None, layout),
    "ward-document": _ward_document,
    "illava-small": lambda layout: _small(),
    "illava-small-video": lambda layout: _with_frame_budget(_small(), layout, 25),
    "tome-small-video": lambda layout: _tome_small_video(),
    # 196 -> 100 and 196 -> 44 patches; of a clip's frame 49 -> 25 and 49 -> 13 tokens before the LLM.
    "ward-small-image-50": lambda layout: _ward_small(48, None, layout),
    "ward-small-image-25": lambda layout: _ward_small(76, None, layout),
    "ward-small-video-50": lambda layout: _ward_small(48, 0.51, layout),
    "ward-small-video-25": lambda layout: _ward_small(76, 0.26, layout),
}
