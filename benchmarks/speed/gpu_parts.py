"""Holds the parts of benchmarks/speed/gpu_all.py: each measures one thing on a built model and fills in its result as
it goes.

A part that is stopped by its budget keeps what it had by then, so results are put in place round by round.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.device_clock import DeviceClock, seconds_each, summary
from benchmarks.speed.engine_vs_transformers import PROMPT, STAGES, Stock, time_ours
from benchmarks.speed.gpu_correctness import checks
from benchmarks.speed.roofline import Ceilings, default_ceilings, measure
from benchmarks.throughput.null_model import null_job
from illava import VLM, Preprocessor, Request, SamplingParams, VisualInput
from illava.analysis.peak_memory import PeakMemory
from illava.attention.backend import kernels_on
from illava.attention.packed import packed_attention
from illava.attention.paged import paged_attention
from illava.attention.scores import attention_received, causal_attention_received
from illava.errors import ModelLoadError
from illava.families.tower_graphs import CudaCapture, TowerGraphs
from illava.plan import EMPTY_PLAN, ReductionPlan
from pipeline.config.schema import JobConfig
from pipeline.execution.rows import RunInfo
from pipeline.execution.runner import run_job
from pipeline.execution.worker import VLMWorker
from pipeline.records import LoadedItem, LoadStats, MediaItem

STOCK_EVERY = 4  # rounds; stock is slow, and its spread is small


@dataclass(slots=True)
class Bench:
    """What the parts share.

    Attributes:
        ends_s: when the part that is under way has to end, on the host's clock.
    """

    vlm: VLM
    model: Any
    preprocessor: Preprocessor
    clock: DeviceClock
    plan: ReductionPlan
    preset: str
    num_frames: int
    new_tokens: int
    num_rounds: int
    num_jobs: int
    ceilings: Ceilings | None = None
    ends_s: float = 0.0

    @property
    def device(self) -> torch.device:
        return self.vlm.family.decoder.device

    def videos(self, num: int, *, seed: int = 0) -> list[VisualInput]:
        """Clips of noise at the model's size; no two alike."""
        side, rng = self.preprocessor.geometry.tile_px, np.random.default_rng(seed)
        clips = (rng.integers(0, 256, (self.num_frames, side, side, 3), dtype=np.uint8) for _ in range(num))
        return [self.preprocessor.video(clip) for clip in clips]

    def rounds(self, most: int) -> Iterator[int]:
        """Round numbers, while another one as long as the longest so far fits before the part's end."""
        longest_s = 0.0
        for number in range(most):
            start_s = time.monotonic()
            if number and start_s + longest_s > self.ends_s:
                return
            yield number
            longest_s = max(longest_s, time.monotonic() - start_s)


Part = Callable[[Bench, dict[str, Any]], None]


def correctness(bench: Bench, result: dict[str, Any]) -> None:
    """Kernels, models and captured steps against what they should give; ``missed`` names what is wrong."""
    result["held"], result["missed"] = [], []
    for check in checks(bench.device):
        result["held" if check.holds else "missed"].append(str(check))
        if not check.holds:
            print(check, flush=True)


def machine_ceilings(bench: Bench, result: dict[str, Any]) -> None:
    """Matrix product and memory copy, at best."""
    bench.ceilings = default_ceilings(bench.device, bench.vlm.family.decoder.dtype)
    result |= asdict(bench.ceilings)


def kernels(bench: Bench, result: dict[str, Any]) -> None:
    """Our kernels beside their torch references at this model's shapes: seconds, and how far apart they are."""
    tower = bench.vlm.family.tower._blocks[0].self_attn
    decoder, dtype = bench.vlm.family.decoder, bench.vlm.family.decoder.dtype
    heads = decoder.layers[0].self_attn.q_proj.out_features // decoder.head_dim
    tokens, grid = (6_400, bench.preprocessor.geometry.grid**2) if bench.device.type == "cuda" else (100, 49)
    draw = partial(torch.randn, device=bench.device, dtype=dtype)
    for batch in (1, 8, 32):
        blocks = -(-tokens // 16)
        k_pool, v_pool = draw(2, batch * blocks, 16, decoder.num_kv_heads, decoder.head_dim).unbind()
        table = torch.randperm(batch * blocks, device=bench.device).to(torch.int32).view(batch, blocks)
        length = torch.full((batch,), tokens, dtype=torch.int32, device=bench.device)
        args = draw(batch, heads, decoder.head_dim), k_pool, v_pool, table, length
        options = {"scale": decoder.scale, "host_lengths": [tokens] * batch}
        result[f"paged_decode_{batch}"] = _beside_reference(bench, partial(paged_attention, *args, **options))
    q, k = draw(2, bench.num_frames * grid, tower.num_heads, tower.head_dim).unbind()
    lengths = (grid,) * bench.num_frames
    result["attention_received"] = _beside_reference(
        bench, partial(attention_received, q, k, lengths, scale=tower.scale)
    )
    q, k = draw(tokens, heads, decoder.head_dim), draw(tokens, decoder.num_kv_heads, decoder.head_dim)
    scope = torch.zeros(tokens, dtype=torch.int64, device=bench.device)
    causal = partial(causal_attention_received, q, k, (tokens,), scope, scale=decoder.scale, normalised=True)
    result["causal_attention_received"] = _beside_reference(bench, causal)


def _beside_reference(bench: Bench, work: Callable[[], Tensor]) -> dict[str, Any]:
    """The kernel that serves here and the reference: seconds of each, ratio, and the largest difference."""
    own, own_s = work(), seconds_each(bench.clock, work, repeats=5, rounds=5)
    with forced("ILLAVA_KERNELS", "torch"):
        reference, reference_s = work(), seconds_each(bench.clock, work, repeats=2, rounds=3)
    return {
        "seconds": own_s,
        "reference_seconds": reference_s,
        "speedup": reference_s["median"] / own_s["median"],
        "largest_difference": float((own.float() - reference.float()).abs().max()),
        "largest_value": float(reference.float().abs().max()),
    }


def attention(bench: Bench, result: dict[str, Any]) -> None:
    """Each backend of packed attention at this model's shapes: seconds of a call, and which word is the fastest.

    Frames before and after a plan's cuts, and a prompt alone; ``ILLAVA_ATTENTION`` takes the word.
    """
    tower, decoder = bench.vlm.family.tower._blocks[0].self_attn, bench.vlm.family.decoder
    of_tower = tower.num_heads, tower.num_heads, tower.head_dim
    of_decoder = (
        decoder.layers[0].self_attn.q_proj.out_features // decoder.head_dim,
        decoder.num_kv_heads,
        decoder.head_dim,
    )
    whole, cut, prompt = (729, 361, 6_327) if bench.device.type == "cuda" else (49, 25, 100)
    shapes = {
        "frames": (of_tower, (whole,) * bench.num_frames, False),
        "frames after the cuts": (of_tower, (cut,) * bench.num_frames, False),
        "a prompt": (of_decoder, (prompt,), True),
        "a prompt after the cuts": (of_decoder, (prompt * 4 // 11,), True),
    }
    for name, ((heads, groups, width), lengths, causal) in shapes.items():
        draw = partial(torch.randn, device=bench.device, dtype=decoder.dtype)
        q, k, v = (draw(sum(lengths), n, width) for n in (heads, groups, groups))
        work = partial(packed_attention, q, k, v, lengths, causal=causal, scale=width**-0.5)
        result[name] = found = {}
        for word in ("varlen", "cudnn", "sdpa"):
            with forced("ILLAVA_ATTENTION", word):
                try:
                    found[word] = seconds_each(bench.clock, work, repeats=5, rounds=5)
                except ModelLoadError as error:
                    found[word] = {"refused": str(error)}
        ran = {word: seconds["median"] for word, seconds in found.items() if "median" in seconds}
        found["fastest"] = min(ran, key=ran.__getitem__)


@contextmanager
def forced(variable: str, word: str) -> Iterator[None]:
    """Let an environment variable choose kernels or attention within the block."""
    before = os.environ.get(variable)
    os.environ[variable] = word
    kernels_on.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
        kernels_on.cache_clear()


def tower_graphs(bench: Bench, result: dict[str, Any]) -> None:
    """Encoding one video as a CUDA graph beside operation by operation, without merging and under the plan."""
    family, (video,) = bench.vlm.family, bench.videos(1)
    try:
        graphs = TowerGraphs(family.encoder, CudaCapture(bench.device))
    except ModelLoadError as error:
        result["refused"] = str(error)
        return
    for name, plan in (("empty", EMPTY_PLAN), ("plan", bench.plan)):
        eager = partial(family.encoder.encode, [video], plan, trace=False)
        with torch.inference_mode():
            eager_s = seconds_each(bench.clock, eager, repeats=2, rounds=5)
            if graphs.encode([video], plan) is None:
                result[name] = {"refused": list(graphs.refused.values())[-1]}
                continue
            replayed_s = seconds_each(bench.clock, partial(graphs.encode, [video], plan), repeats=2, rounds=5)
        speedup = eager_s["median"] / replayed_s["median"]
        result[name] = {"eager_seconds": eager_s, "replayed_seconds": replayed_s, "speedup": speedup}


def memory(bench: Bench, result: dict[str, Any]) -> None:
    """Key/value bytes of one item, the largest batch that the pool admits, and the peak of tower and prefill."""
    engine, sampling = bench.vlm.engine, SamplingParams(max_new_tokens=bench.new_tokens, min_new_tokens=2)
    (video,) = bench.videos(1)
    block_bytes = 2 * engine.cache.k_pool_PSGd[0].nbytes
    for name, plan in (("empty", EMPTY_PLAN), ("plan", bench.plan)):
        engine.submit(Request(name, (video, PROMPT), sampling), plan)
        with PeakMemory(bench.device) as peak:
            engine.step()
        held = engine.cache.num_blocks - engine.cache.num_free_blocks
        engine.cancel_all()
        largest = engine.cache.num_blocks // held
        result[name] = {"kv_bytes": held * block_bytes, "largest_batch": largest, "peak_bytes": peak.num_bytes}
    result["kv_ratio"] = result["plan"]["kv_bytes"] / result["empty"]["kv_bytes"]
    result["largest_batch_ratio"] = result["plan"]["largest_batch"] / result["empty"]["largest_batch"]


def batch_of(size: int) -> Part:
    """Stock generate, our engine without graphs, without merging and under the plan, interleaved, at one batch size."""

    def part(bench: Bench, result: dict[str, Any]) -> None:
        videos, stock = bench.videos(size), Stock(bench.vlm, bench.model, now=bench.clock)
        sides: dict[str, Callable[[int], dict[str, Any]]] = {
            "stock": partial(stock.time, videos),
            "empty": lambda n: time_ours(bench.vlm, videos, n, EMPTY_PLAN, now=bench.clock),
            "plan": lambda n: time_ours(bench.vlm, videos, n, bench.plan, now=bench.clock),
        }
        if bench.vlm.engine.graphs is not None:
            sides["eager"] = partial(_without_graphs, bench, videos)
        for name in list(sides):  # warm up: compile, capture every bucket on the way, choose algorithms
            try:
                sides[name](bench.new_tokens if name == "empty" else 3)
            except torch.OutOfMemoryError as error:
                result.setdefault("out_of_memory", {})[name] = str(error).splitlines()[0]
                bench.vlm.cancel_all()
                torch.cuda.empty_cache()
                del sides[name]
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in bench.rounds(bench.num_rounds):
            for name, side in sides.items():
                if name in ("empty", "plan") or number % STOCK_EVERY == 0:
                    seen[name].append(side(bench.new_tokens))
            result |= _compared(seen)

    return part


def _without_graphs(bench: Bench, videos: list[VisualInput], new_tokens: int) -> dict[str, Any]:
    phase = bench.vlm.engine.decode_phase
    graphs, phase.graphs = phase.graphs, None
    phase.drop()
    try:
        return time_ours(bench.vlm, videos, new_tokens, EMPTY_PLAN, now=bench.clock)
    finally:
        phase.graphs = graphs
        phase.drop()


def _compared(seen: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    for rounds in seen.values():
        for one in rounds:
            one["first_token"] = one["tower"] + one["prefill"]
    stages = (*STAGES, "first_token")
    found = {
        name: {stage: summary([one[stage] for one in rounds]) for stage in stages} for name, rounds in seen.items()
    }
    ratios = {
        f"{side}_vs_{base}": {stage: found[base][stage]["median"] / found[side][stage]["median"] for stage in stages}
        for base, side in (("stock", "empty"), ("stock", "plan"), ("empty", "plan"), ("eager", "empty"))
        if base in found and side in found
    }
    return {"seconds": found, "speedup": ratios}


def pipeline(bench: Bench, result: dict[str, Any]) -> None:
    """The job's own scheduler, worker, rows and sink around this model, with a loader that only hands out frames."""
    size, plans = bench.vlm.engine.config.max_batch_requests, {"empty": EMPTY_PLAN, "plan": bench.plan}
    result["batch"], result["items"] = size, bench.num_jobs
    for name, plan in plans.items():
        sampling = SamplingParams(max_new_tokens=bench.new_tokens, min_new_tokens=bench.new_tokens)
        videos = bench.videos(bench.num_jobs, seed=1)
        requests = [Request(str(n), (video, PROMPT), sampling) for n, video in enumerate(videos)]
        busy_s, start = bench.vlm.device_busy_s, bench.clock()
        bench.vlm.generate(requests, plan=plan)
        bare_s = bench.clock() - start
        bare = {
            "captions_per_hour": 3600 * bench.num_jobs / bare_s,
            "busy": (bench.vlm.device_busy_s - busy_s) / bare_s,
        }
        through = _through_pipeline(bench, videos, name)
        rate = through["captions_per_hour"] / bare["captions_per_hour"]
        result[name] = {"bare": bare, "pipeline": through, "pipeline_vs_bare": rate}


def _through_pipeline(bench: Bench, videos: list[VisualInput], name: str) -> dict[str, Any]:
    workers, places = [], count()

    def make_worker(config: JobConfig, run_info: RunInfo) -> VLMWorker:
        workers.append(VLMWorker(config, run_info, vlm=bench.vlm))
        return workers[0]

    class FramesAtHand:
        """Clips in memory, one an item."""

        def load(self, item: MediaItem) -> LoadedItem:
            video = videos[next(places) % len(videos)]
            seconds = tuple(float(n) for n in range(len(video.tiles)))
            return LoadedItem(item, (video,), seconds, LoadStats(decoder="null"))

        def close(self) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        fields = null_job(Path(folder), len(videos), executor="local").model_dump(mode="json")
        fields["sampling"]["max_new_tokens"] = bench.new_tokens  # all are drawn: nothing stops this model
        fields["model"]["max_batch_requests"] = bench.vlm.engine.config.max_batch_requests
        if name == "plan":
            fields["reduction"] = {"preset": bench.preset, "layout": "geometric"}
        busy_s = bench.vlm.device_busy_s
        run = run_job(
            JobConfig.model_validate(fields), worker_factory=make_worker, loader_factory=lambda *_: FramesAtHand()
        )
    if run.exit_code:
        raise RuntimeError(f"the job ended with exit code {run.exit_code}")
    usage = workers[0].usage()
    wall_s = usage.wall_s - usage.start_s
    busy_s = bench.vlm.device_busy_s - busy_s
    return {"captions_per_hour": 3600 * len(videos) / wall_s, "busy": busy_s / wall_s}


def roofline(bench: Bench, result: dict[str, Any]) -> None:
    """Counted work of each stage at batch 1 over this machine's ceilings."""
    ceilings = bench.ceilings or default_ceilings(bench.device, bench.vlm.family.decoder.dtype)
    (video,) = bench.videos(1)
    plans = {"empty": EMPTY_PLAN, "plan": bench.plan}
    result |= measure(bench.vlm.engine, video, plans, ceilings, rounds=3)
