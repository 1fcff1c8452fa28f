"""Times tower and prefill: a plan against the empty plan, and the empty plan against stock transformers.

One loaded model with random weights at true shapes; all sides interleaved in one run; medians of the rounds. Random
weights say nothing about quality. On CPU only the ratios mean something.

    python benchmarks/speed/reduction_speed.py --size so400m-0.5b --frames 8 --rounds 3 --json OUT.json
    python benchmarks/speed/reduction_speed.py --dtype bfloat16 --frames 1 --rounds 5 --without-stock --json OUT.json
    python benchmarks/speed/reduction_speed.py --preset ward-image-50 --image 768 --without-stock --json OUT.json

The second is for a CPU without bfloat16 arithmetic, where matrix products take three to four times as long. The third
reads a square picture in tiles in place of a video.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.machine import write_json
from benchmarks.common.random_onevision import SIZES, make_random_onevision
from illava import VLM, Preprocessor, Request, SamplingParams, load_preprocessor, preset
from illava.families.llava.onevision import LlavaOnevision
from illava.plan import EMPTY_PLAN, ReductionPlan

PROMPT = "describe the {} in two sentences"


def time_ours(
    vlm: VLM, frames: np.ndarray, preprocessor: Preprocessor, plan: ReductionPlan, *, is_image: bool
) -> dict[str, float]:
    """Seconds in tower (projector and layout included) and prefill of one request, and its counts."""
    sampling = SamplingParams(max_new_tokens=1, min_new_tokens=1)
    media = preprocessor.images(frames) if is_image else (preprocessor.video(frames),)
    request = Request("bench", (*media, PROMPT.format("picture" if is_image else "video")), sampling)
    (done,) = vlm.generate([request], plan=plan)
    return {
        "tower_s": done.timing.vision_s,
        "prefill_s": done.timing.prefill_s,
        "vision_tokens_kept": done.usage.num_vision_tokens_kept,
        "decoder_tokens_kept": done.usage.num_decoder_tokens_kept,
    }


@torch.inference_mode()
def time_stock(vlm: VLM, model: Any, frames: np.ndarray, preprocessor: Preprocessor) -> dict[str, float]:
    """The same two stages through Hugging Face's own forward methods, on the same weights (SDPA attention)."""
    family, dtype = vlm.family, vlm.family.decoder.dtype
    video = preprocessor.video(frames)
    prompt = family.render((video, PROMPT.format("video")), [family.num_vision_tokens(video)])
    started = time.perf_counter()
    scale = torch.tensor(preprocessor.rescale_factor, dtype=torch.float32)
    pixels = torch.from_numpy(video.tiles).permute(0, 3, 1, 2).float() * scale
    pixels = (pixels - torch.tensor(preprocessor.mean).view(3, 1, 1)) / torch.tensor(preprocessor.std).view(3, 1, 1)
    found = model.model.get_video_features(pixels.to(dtype)[None])
    features = found.pooler_output if hasattr(found, "pooler_output") else found
    features = torch.cat([*features]) if isinstance(features, (list, tuple)) else features.flatten(0, 1)
    tower_s = time.perf_counter() - started
    newline = model.model.image_newline[None].to(features.dtype)
    start, length = prompt.spans[0]
    embedded = model.get_input_embeddings()(torch.tensor(prompt.token_ids))
    embedded[start : start + length] = torch.cat([features, newline]) if len(features) < length else features
    started = time.perf_counter()
    out = model.model.language_model(inputs_embeds=embedded[None], use_cache=True)
    model.lm_head(out.last_hidden_state[:, -1:])
    return {"tower_s": tower_s, "prefill_s": time.perf_counter() - started}


def measure(vlm: VLM, model: Any, preprocessor: Preprocessor, args: argparse.Namespace) -> dict[str, Any]:
    """Interleave stock, empty plan and plan for the rounds asked for; the first round warms up and is dropped."""
    side, is_image = args.image or preprocessor.geometry.tile_px, args.image is not None
    shape = (1 if is_image else args.frames, side, side, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    plan = preset(args.preset, layout=args.layout)
    side_names = ("empty", "plan") if args.without_stock else ("stock", "empty", "plan")
    sides: dict[str, list[dict[str, float]]] = {side: [] for side in side_names}
    for _ in range(args.rounds + 1):
        if not args.without_stock:
            sides["stock"].append(time_stock(vlm, model, frames, preprocessor))
        sides["empty"].append(time_ours(vlm, frames, preprocessor, EMPTY_PLAN, is_image=is_image))
        sides["plan"].append(time_ours(vlm, frames, preprocessor, plan, is_image=is_image))
    kept = {name: rounds[1:] for name, rounds in sides.items()}
    median = {
        name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for name, rounds in kept.items()
    }
    spread = {
        name: {key: max(r[key] for r in rounds) / min(r[key] for r in rounds) for key in ("tower_s", "prefill_s")}
        for name, rounds in kept.items()
    }
    pairs = {"{}_plan_speedup": ("empty", "plan"), "{}_empty_vs_stock": ("stock", "empty")}
    ratios = {
        name.format(stage): median[slower][f"{stage}_s"] / median[faster][f"{stage}_s"]
        for name, (slower, faster) in pairs.items()
        for stage in ("tower", "prefill")
        if slower in median
    }
    return {"ratios": ratios, "median": median, "max_over_min": spread}


def main() -> None:
    """Build the model, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="so400m-0.5b")
    parser.add_argument("--preset", default="illava-video")
    parser.add_argument("--layout", choices=["geometric", "released"], default="geometric")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument(
        "--image", type=int, metavar="PX", help="side of a picture, in place of a video; --without-stock"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--without-stock", action="store_true", help="leave stock transformers out, a third of the time"
    )
    parser.add_argument("--json", help="write the result here")
    args = parser.parse_args()
    if args.image is not None and not args.without_stock:
        parser.error("--image: stock is timed on a video alone, so give --without-stock, too")
    with tempfile.TemporaryDirectory() as folder:
        make_random_onevision(folder, args.size)
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=args.dtype).eval()
        preprocessor = load_preprocessor(folder)
        vlm = VLM(LlavaOnevision(model, AutoTokenizer.from_pretrained(folder), preprocessor))
        result = measure(vlm, model, preprocessor, args)
    setting = {key: getattr(args, key) for key in ("size", "preset", "layout", "frames", "image", "rounds", "dtype")}
    if args.image is not None:
        setting["frames"] = None
    for name, ratio in result["ratios"].items():
        print(f"{name:24s} {ratio:.2f}x")
    if args.json:
        write_json(args.json, {"benchmark": "reduction_speed", "setting": setting, **result})


if __name__ == "__main__":
    main()
