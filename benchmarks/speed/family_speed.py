"""Times tower and prefill in the other families: a preset against the empty plan and stock transformers.

As `reduction_speed`: one loaded model of random weights (`random_families`), all sides interleaved, medians of the
rounds after a warm-up on a small picture. The tower is the published one; the decoder has the published depth but is
narrower, so its ratio stands for the tokens it is spared, not for its published seconds. On CPU only ratios mean
something.

    python benchmarks/speed/family_speed.py --size qwen2-vl-2b --folder /tmp/qwen --rounds 3 --json OUT.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.machine import write_json
from benchmarks.common.random_families import SIZES, make_random_family
from illava import VLM, Request, SamplingParams, load_preprocessor, preset
from illava.families.llava.next import LlavaNext
from illava.families.loading import load_tokenizer, load_weights
from illava.families.qwen.qwen2_vl import Qwen2VL
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.preprocess import VisualInput

PROMPT = "describe the picture in two sentences"


def qwen_tower(vlm: VLM, model: Any, image: VisualInput) -> None:
    """Hugging Face's tower and merger over the image's patches."""
    grid = vlm.family.encoder.grid(image)
    model.get_image_features(vlm.family.encoder.patches(image), torch.tensor([[grid.times, grid.rows, grid.cols]]))


def next_tower(vlm: VLM, model: Any, image: VisualInput) -> None:
    """Hugging Face's tower, projector and layout over the image's tiles."""
    size = torch.tensor([image.original_size])
    model.get_image_features(vlm.family.encoder.pixels([image])[None], size)


# family, side of the picture in px, preset, stock's tower
SETTINGS: dict[str, tuple[Any, int, str, Callable[[VLM, Any, VisualInput], None]]] = {
    "qwen2-vl-2b": (Qwen2VL, 448, "illava-qwen2-vl", qwen_tower),
    "llava-next-7b": (LlavaNext, 672, "illava-next-image", next_tower),
}


def time_ours(vlm: VLM, image: VisualInput, plan: ReductionPlan) -> dict[str, float]:
    """Seconds in tower (projector and layout included) and prefill of one request, and its counts."""
    request = Request("bench", (image, PROMPT), SamplingParams(max_new_tokens=1, min_new_tokens=1))
    (done,) = vlm.generate([request], plan=plan)
    return {
        "tower_s": done.timing.vision_s,
        "prefill_s": done.timing.prefill_s,
        "patches": done.usage.num_patches,
        "vision_tokens_kept": done.usage.num_vision_tokens_kept,
        "decoder_tokens_kept": done.usage.num_decoder_tokens_kept,
    }


@torch.inference_mode()
def time_stock(
    vlm: VLM, model: Any, image: VisualInput, tower: Callable[[VLM, Any, VisualInput], None]
) -> dict[str, float]:
    """The same two stages by Hugging Face's own forward methods on the same weights; prefill over equal lengths."""
    started = time.perf_counter()
    tower(vlm, model, image)
    tower_s = time.perf_counter() - started
    family = vlm.family
    prompt = family.render((image, PROMPT), [family.num_vision_tokens(image)])
    embedded: Tensor = family.embed(torch.as_tensor(prompt.token_ids))[None]
    started = time.perf_counter()
    out = model.model.language_model(inputs_embeds=embedded, use_cache=True)
    model.lm_head(out.last_hidden_state[:, -1:])
    return {"tower_s": tower_s, "prefill_s": time.perf_counter() - started}


def measure(vlm: VLM, model: Any, preprocessor: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Interleave stock, empty plan and preset for the rounds asked for."""
    _, side_px, name, tower = SETTINGS[args.size]
    pixels = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    (image,), (small,) = preprocessor.images([pixels]), preprocessor.images([pixels[: side_px // 2]])
    sides: dict[str, Callable[[VisualInput], dict[str, float]]] = {
        "stock": lambda mm_item: time_stock(vlm, model, mm_item, tower),
        "empty": lambda mm_item: time_ours(vlm, mm_item, EMPTY_PLAN),
        "plan": lambda mm_item: time_ours(vlm, mm_item, preset(name)),
    }
    for timed in sides.values():
        timed(small)
    found: dict[str, list[dict[str, float]]] = {key: [] for key in sides}
    for _ in range(args.rounds):
        for key, timed in sides.items():
            found[key].append(timed(image))
    median = {key: {k: statistics.median(r[k] for r in rounds) for k in rounds[0]} for key, rounds in found.items()}
    stages = ("tower_s", "prefill_s")
    spread = {key: {k: max(r[k] for r in rs) / min(r[k] for r in rs) for k in stages} for key, rs in found.items()}
    ratios = {
        "tower_plan_speedup": median["empty"]["tower_s"] / median["plan"]["tower_s"],
        "prefill_plan_speedup": median["empty"]["prefill_s"] / median["plan"]["prefill_s"],
        "tower_empty_vs_stock": median["stock"]["tower_s"] / median["empty"]["tower_s"],
        "prefill_empty_vs_stock": median["stock"]["prefill_s"] / median["empty"]["prefill_s"],
    }
    return {"ratios": ratios, "median": median, "max_over_min": spread}


def main() -> None:
    """Write the folder where there is none, load, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--folder", type=Path, required=True, help="the model; is made where there is none (4 GB)")
    parser.add_argument("--rounds", type=int, default=3, help="0: only make the folder")
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        make_random_family(args.folder, args.size)
    if not args.rounds:
        return
    family, side_px, name, _ = SETTINGS[args.size]
    folder, shape = str(args.folder), SIZES[args.size]
    model_class = getattr(transformers, shape["model_class"])
    model = load_weights(model_class, folder, revision=None, dtype=torch.float32, device="cpu")
    preprocessor = load_preprocessor(folder)
    vlm = VLM(family(model, load_tokenizer(folder, revision=None), preprocessor), kv_cache_bytes=1 << 30)
    result = measure(vlm, model, preprocessor, args)
    setting = {"size": args.size, "preset": name, "layout": "geometric", "picture_px": side_px, "rounds": args.rounds}
    setting |= {"dtype": "float32", "decoder_layers": shape["text"]["num_hidden_layers"]}
    setting |= {"decoder_narrower_by": shape["text_narrower_by"]}
    for key, ratio in result["ratios"].items():
        print(f"{key:24s} {ratio:.2f}x")
    if args.json:
        write_json(args.json, {"benchmark": "family_speed", "setting": setting, **result})


if __name__ == "__main__":
    main()
