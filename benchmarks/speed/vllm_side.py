"""Runs vLLM's side of `engine_vs_vllm`, in an environment of its own that has vllm and not this project.

Reads one JSON object a line from stdin (``batch, frames, side, new_tokens, prompt_ids, seed``) and answers each with
one line on stdout, behind a mark: seconds of the batch, and the prompt and new tokens it counted.
"""

from __future__ import annotations

import json
import os
import sys
import time

MARK = "vllm_side:"

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402


def answer(llm: LLM, request: dict) -> dict:
    """Generate for one batch of random clips, which both sides draw from the same seed."""
    rng = np.random.default_rng(request["seed"])
    shape = (request["batch"], request["frames"], request["side"], request["side"], 3)
    prompts = [
        {"prompt_token_ids": request["prompt_ids"], "multi_modal_data": {"video": clip}}
        for clip in rng.integers(0, 256, shape, dtype=np.uint8)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True)
    began_s = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return {
        "total": time.perf_counter() - began_s,
        "prompt_tokens": len(outputs[0].prompt_token_ids),
        "new_tokens": len(outputs[0].outputs[0].token_ids),
    }


def main() -> None:
    model, dtype = sys.argv[1:]
    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=8192,
        limit_mm_per_prompt={"image": 0, "video": 1},
        enforce_eager=True,
        max_num_seqs=32,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        skip_mm_profiling=True,  # the cache has its size already; it would encode 40 frames
    )
    print(MARK, json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(MARK, json.dumps(answer(llm, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
