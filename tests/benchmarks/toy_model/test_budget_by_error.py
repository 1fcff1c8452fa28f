"""The error-bounded preset gives documents what they need and blank pictures little, told neither from the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.toy_model.data.mixture import make
from benchmarks.toy_model.data.scenes import draw_scene
from illava import VLM, Request, SamplingParams, load_preprocessor

MODEL = str(Path(__file__).resolve().parents[3] / "configs" / "demo" / "model")


def test_documents_keep_twice_the_tokens_of_blank_scenes():
    preprocessor = load_preprocessor(MODEL)
    vlm = VLM.from_pretrained(MODEL, dtype="float32", device="cpu", kv_cache_bytes=16 << 20)
    pictures = {
        "document": [make(kind, seed, split="test").frames[0] for kind in ("table", "lines") for seed in (9100, 9101)],
        "blank": [draw_scene(np.random.default_rng(seed), [])[0] for seed in (9100, 9101, 9102, 9103)],
    }
    requests = [
        Request(f"{kind} {n}", (preprocessor.images([pixels])[0], "What?"), SamplingParams(max_new_tokens=1))
        for kind, drawn in pictures.items()
        for n, pixels in enumerate(drawn)
    ]
    kept: dict[str, list[int]] = {kind: [] for kind in pictures}
    for request, done in zip(requests, vlm.generate(requests, plan="ward-document"), strict=True):
        kept[request.request_id.split()[0]].append(done.usage.num_vision_tokens_kept)
        assert done.usage.num_vision_tokens == 406
        assert done.usage.content is None, "no kind of content was told"
    assert sum(kept["document"]) >= 2 * sum(kept["blank"]), kept
    assert max(kept["document"]) < 406 / 2, "and save more than half of them"
