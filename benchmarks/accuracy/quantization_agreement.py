"""Measures how far each weight scheme's answers depart from the plain model's, on the bundled trained demo model.

Both models read the same prompts and the plain model's own answer (`illava.analysis.agreement`), so no label is
needed. The demo model is tiny (width 128): rounding weighs more there than in a published model, whose widths average
it out. On CPU each scheme's products are computed in the model's dtype.

    python benchmarks/accuracy/quantization_agreement.py --json benchmarks/results/quantization_agreement_cpu_fp32.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.common.machine import write_json  # noqa: E402
from illava import VLM, Request, SamplingParams  # noqa: E402
from illava.analysis.agreement import measure_agreement  # noqa: E402
from illava.plan import EMPTY_PLAN  # noqa: E402
from illava.weight_files import Quantization, count_stored  # noqa: E402
from pipeline import read_media  # noqa: E402

MODEL, CLIPS = ROOT / "configs" / "demo" / "model", ROOT / "configs" / "demo" / "clips"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    told = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 256 << 20}
    plain, counts = VLM.from_pretrained(str(MODEL), **told), count_stored(MODEL)
    requests = _requests(options.new_tokens)
    schemes = {}
    for scheme in get_args(Quantization):
        vlm = VLM.from_pretrained(str(MODEL), quantization=scheme, **told)
        found = measure_agreement(vlm, requests, EMPTY_PLAN, reference=plain)
        num_tokens = sum(one.num_tokens for one in found)
        schemes[scheme] = {
            "top1_ratio": sum(one.num_same for one in found) / num_tokens,
            "kl_nats": sum(one.kl_nats * one.num_tokens for one in found) / num_tokens,
            "num_tokens": num_tokens,
            "computed_with": vlm.backends["weights"],
            "weights_bytes_bf16": counts.num_bytes(2, scheme) if counts else None,
        }
    result = {"benchmark": "quantization_agreement", "model": "configs/demo/model", "schemes": schemes}
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)


def _requests(new_tokens: int) -> list[Request]:
    lines = (CLIPS / "questions.jsonl").read_text("utf-8").splitlines()
    asked = [json.loads(line) for line in lines]
    media = {name: read_media(str(CLIPS / name), str(MODEL), num_frames=8) for name in {one["uri"] for one in asked}}
    sampling = SamplingParams(max_new_tokens=new_tokens)
    return [
        Request(f"{number}", (*_listed(media[one["uri"]]), one["question"]), sampling)
        for number, one in enumerate(asked)
    ]


def _listed(found: object) -> tuple:
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


if __name__ == "__main__":
    main()
