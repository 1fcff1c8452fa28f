"""Checks on a GPU what no CPU has run: kernels against float64, models against the CPU, captured steps against eager.

The first part of `gpu_all.py`, which ends the run on a miss, and tests/gpu/. A miss that is gone under
``ILLAVA_KERNELS=torch`` is a kernel's, one that is gone under ``--eager`` is a captured step's. On CPU the same checks
run over the reference implementations, which tries the script.

    python benchmarks/speed/gpu_correctness.py --device cuda
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tables.family_matrix import SETTINGS, plan_of
from illava import VLM, Request, SamplingParams, VisualInput, load_preprocessor
from illava.attention.packed import chunk_attention, packed_attention, packed_attention_lse
from illava.attention.paged import paged_attention
from illava.attention.scores import attention_received, causal_attention_received
from illava.decoder.kv_cache import PagedCache
from illava.decoder.layer_ops import add_rms_norm, rms_norm, rotate, rotate_and_write, silu_mul
from illava.engine.sampling import draw_greedy
from illava.errors import ModelLoadError
from illava.plan import EMPTY_PLAN
from illava.reducers.ops.agglomeration import agglomerate
from illava.reducers.ops.contrast import local_contrast
from illava.requests import Generation
from tests.support.models.families import EXPERTS, MAKERS

HALF, FULL = (torch.bfloat16, 1e-2), (torch.float32, 1e-5)  # and how far a result may be off, relative to its norm
FEW_ANSWERS = 0.8  # of all tokens at least so many come before two answers part


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: how far apart two results are, and how far they may be."""

    name: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.error <= self.bound  # NaN does not

    def __str__(self) -> str:
        return f"{'ok  ' if self.holds else 'MISS'} {self.error:9.2e} <= {self.bound:.0e}  {self.name}"


def checks(device: torch.device) -> Iterator[Check]:
    """All checks, the quick ones first."""
    yield from attention_checks(device)
    yield from layer_checks(device)
    yield from merging_checks(device)
    yield from draw_checks(device)
    for dtype, bound in (HALF, FULL):
        yield from paged_checks(device, dtype, bound)
        yield from score_checks(device, dtype)
    for family in MAKERS:
        yield from model_checks(device, family)


def attention_checks(device: torch.device) -> Iterator[Check]:
    """Packed attention at every family's head width, and of chunks, in bfloat16, by each backend that can run there."""
    for word in ("auto", "cudnn", "sdpa", "math"):
        before = os.environ.get("ILLAVA_ATTENTION")
        os.environ["ILLAVA_ATTENTION"] = before if word == "auto" and before else word
        try:
            yield from _attention_checks(device, word)
        except ModelLoadError as refusal:
            print(f"not checked: {refusal}", flush=True)
        finally:
            os.environ.pop("ILLAVA_ATTENTION")
            if before is not None:
                os.environ["ILLAVA_ATTENTION"] = before


def _attention_checks(device: torch.device, word: str) -> Iterator[Check]:
    dtype, bound = HALF
    shapes = (
        (72, 16, 16, (729, 361, 729)),
        (80, 16, 16, (100, 64, 1)),
        (128, 28, 4, (1300, 7, 1)),
        (88, 16, 16, (300,)),
        (72, 16, 16, (361, 361, 361)),
    )
    for width, heads, groups, lengths in shapes:
        for causal in (False, True):
            q, k, v = (_draw(sum(lengths), n, width, device=device, dtype=dtype) for n in (heads, groups, groups))
            found = packed_attention(q, k, v, lengths, causal=causal, scale=width**-0.5)
            expected = _exact(q, k, v, lengths, lengths, causal=causal, scale=width**-0.5)
            yield Check(
                f"packed attention, {word}, {lengths} of width {width}, causal {causal}", _apart(found, expected), bound
            )
    queries, keys = (3, 100, 1), (700, 100, 64)
    q = _draw(sum(queries), 28, 128, device=device, dtype=dtype)
    k, v = _draw(2, sum(keys), 4, 128, device=device, dtype=dtype)
    found = chunk_attention(q, k, v, queries, keys, scale=0.09)
    expected = _exact(q, k, v, queries, keys, causal=True, scale=0.09)
    yield Check(f"attention of chunks, {word}, aligned to the ends", _apart(found, expected), bound)


def paged_checks(device: torch.device, dtype: torch.dtype, bound: float) -> Iterator[Check]:
    """Decode attention over scattered blocks; what no request holds is NaN."""
    lengths = (1, 17, 64, 65, 2113, 6400)
    for heads, groups, width in ((28, 4, 128), (14, 2, 64), (8, 1, 80)):
        num_blocks = [-(-n // 16) for n in lengths]
        order = torch.randperm(sum(num_blocks) + 3).tolist()
        table = torch.full((len(lengths), max(num_blocks) + 5), 10**6, dtype=torch.int32)
        pool = torch.full((2, sum(num_blocks) + 3, 16, groups, width), torch.nan, device=device, dtype=dtype)
        held = [_draw(2, n, groups, width, device=device, dtype=dtype) for n in lengths]
        for row, (length, count) in enumerate(zip(lengths, num_blocks, strict=True)):
            own = [order.pop() for _ in range(count)]
            table[row, :count] = torch.tensor(own)
            slots = torch.tensor([block * 16 + n for block in own for n in range(16)][:length], device=device)
            pool.flatten(1, 2)[:, slots] = held[row]
        q, scale = _draw(len(lengths), heads, width, device=device, dtype=dtype), width**-0.5
        length_B = torch.tensor(lengths, dtype=torch.int32, device=device)
        found = paged_attention(q, *pool, table.to(device), length_B, scale=scale, host_lengths=lengths)
        alone = (
            _exact(q[n : n + 1], *held[n], [1], [length], causal=True, scale=scale) for n, length in enumerate(lengths)
        )
        name = f"paged attention, {dtype}, {heads}/{groups} heads, width {width}"
        yield Check(name, _apart(found, torch.cat(list(alone))), bound)


def score_checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Attention received, which ranks tokens, of towers and under a causal mask."""
    for width in (72, 80):
        lengths, scale = (729, 361, 64, 1), width**-0.5
        q, k = _draw(2, sum(lengths), 16, width, device=device, dtype=dtype)
        pairs = zip(q.split(lengths), k.split(lengths), strict=True)
        expected = [_attention(a, b, scale=scale, causal=False).mean((0, 1)) for a, b in pairs]
        found = attention_received(q, k, lengths, scale=scale)
        yield Check(f"attention received, {dtype}, width {width}", _apart(found, torch.cat(expected)), 1e-4)
        _, lse = packed_attention_lse(q, k, q, lengths, causal=False, scale=scale)
        found = attention_received(q, k, lengths, scale=scale, lse_HT=lse)
        name = f"attention received by the attention's log-sum-exps, {dtype}, width {width}"
        yield Check(name if lse is not None else name + " (none here)", _apart(found, torch.cat(expected)), 1e-4)
    lengths = (500, 200)
    q, k = (_draw(sum(lengths), n, 128, device=device, dtype=dtype) for n in (28, 4))
    scope = torch.arange(sum(lengths), device=device) // 100 % 3 - 1
    parts = list(zip(q.split(lengths), k.split(lengths), scope.split(lengths), strict=True))
    found = causal_attention_received(q, k, lengths, scope, scale=0.09, normalised=False)
    expected = torch.cat([_received_in_scope(*part, scale=0.09) for part in parts])
    yield Check(f"causal attention received, {dtype}", _apart(found, expected), 1e-4)


def layer_checks(device: torch.device) -> Iterator[Check]:
    """The fused small operations of a decoder layer beside their references, in bfloat16: single roundings apart."""
    x, delta = _draw(2, 300, 3584, device=device, dtype=torch.bfloat16)
    norm = Qwen2RMSNorm(3584).to(device, torch.bfloat16)
    total, normed = add_rms_norm(norm, x, delta)
    yield Check("residual added", _apart(total, (x + delta).double()), 0.0)
    yield Check("norm", _apart(normed, norm(x + delta).double()), 1e-3)
    yield Check("norm alone", _apart(rms_norm(norm, x), norm(x).double()), 5e-3)
    joined = _draw(300, 36 * 128, device=device, dtype=torch.bfloat16)
    q, k, v = (part.unflatten(-1, (-1, 128)) for part in joined.split([28 * 128, 4 * 128, 4 * 128], -1))
    angle = torch.rand(300, 1, 64, device=device).repeat(1, 1, 2) * 6
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    cache = PagedCache(
        num_layers=1, num_kv_heads=4, head_dim=128, num_blocks=20, block_size=16, dtype=torch.bfloat16, device=device
    )
    slots = torch.randperm(320, device=device)[:300]
    expected = [rotate(q, cos, sin), rotate(k, cos, sin)]
    found = rotate_and_write(q, k, v, (cos, sin), (cache, slots))
    for name, one, other in zip(("queries rotated", "keys rotated"), found, expected, strict=True):
        yield Check(name, _apart(one, other.double()), 1e-3)
    held = [pool.flatten(0, 1)[slots] for pool in (cache.k_pool_PSGd, cache.v_pool_PSGd)]
    yield Check("keys written", _apart(held[0], expected[1].double()), 1e-3)
    yield Check("values written", _apart(held[1], v.double()), 0.0)
    gate, up = _draw(300, 2 * 18_944, device=device, dtype=torch.bfloat16).split(18_944, -1)
    found = silu_mul(torch.nn.SiLU(), gate, up)
    yield Check("gate times up", _apart(found, (torch.nn.functional.silu(gate) * up).double()), 1e-3)


def merging_checks(device: torch.device) -> Iterator[Check]:
    """`ward`: contrasts of the reference on the CPU; as many groups as it is told to leave, at its error."""
    lengths, kept = (729, 300, 730), (365, 30, 182)
    gen = torch.Generator().manual_seed(0)
    point_SND = torch.nn.functional.normalize(torch.randn(3, 730, 64, generator=gen), dim=-1).mul(4096).round() / 4096
    weight_SN = torch.randint(1, 5, (3, 730), generator=gen).float()
    found_SN, expected_SN = (
        agglomerate(point_SND.to(there), weight_SN.to(there), lengths, kept).cpu() for there in (device, "cpu")
    )
    for row, (n, k) in enumerate(zip(lengths, kept, strict=True)):
        left = [_merge_error(point_SND[row, :n], weight_SN[row, :n], g[row, :n], k) for g in (found_SN, expected_SN)]
        yield Check(f"merging {n} to {k}, error against the CPU's", abs(left[0] / left[1] - 1), 1e-3)
    size_T, place_T = (torch.cat([value[:n] for n in lengths]) for value in (weight_SN[0], torch.arange(730)))
    coord_T3 = torch.stack([torch.zeros_like(place_T), place_T // 28, place_T % 28], 1)
    found_T, expected_T = (
        local_contrast(*(value.to(there) for value in (point_SND, size_T, coord_T3)), lengths).cpu()
        for there in (device, "cpu")
    )
    yield Check("contrasts, farthest from the CPU's", float((found_T - expected_T).abs().max()), 2**-15)


def _merge_error(point_ND: Tensor, weight_N: Tensor, group_N: Tensor, num_groups: int) -> float:
    """The weighted squared distance of points to their groups' means; infinite where another number is left."""
    if group_N.unique().tolist() != list(range(num_groups)):
        return float("inf")
    member_KN = torch.nn.functional.one_hot(group_N, num_groups).T.double() * weight_N
    mean_KD = (member_KN @ point_ND.double()) / member_KN.sum(1, keepdim=True)
    return float((weight_N[:, None] * (point_ND - mean_KD[group_N]).square()).sum())


def draw_checks(device: torch.device) -> Iterator[Check]:
    """The greedy draw of a captured step beside its reference on the CPU; in bfloat16 many logits are equal."""
    logits = _draw(9, 152_064, device=device, dtype=torch.bfloat16)
    logits[3, 7] = float("nan")
    finite = [row for row in range(9) if row != 3]
    found, expected = draw_greedy(logits).cpu(), draw_greedy(logits.cpu())
    yield Check("greedy draw, rows that are not finite", float((found[1] != expected[1]).sum()), 0.0)
    yield Check("greedy draw, tokens", float((found[0] != expected[0])[finite].sum()), 0.0)
    told = [drawn[2, finite].int().view(torch.float32) for drawn in (found, expected)]
    yield Check("greedy draw, log-probabilities", _apart(told[0], told[1].double()), 1e-5)


def model_checks(device: torch.device, family: str) -> Iterator[Check]:
    """A tiny model of a family: device against CPU in float32, and on CUDA captured steps against eager ones."""
    with tempfile.TemporaryDirectory() as folder:
        MAKERS[family](Path(folder))
        media = _media(folder)
        for stage in (None, "vision_block", "decoder_layer"):
            name = f"{family}, " + ("no merging" if stage is None else f"merging at {stage}")
            expected = _answers(folder, "cpu", "float32", stage, media)
            found = _answers(folder, device, "float32", stage, media, decode_graphs=False)
            yield Check(f"{name}, float32: {device.type} against CPU", parted(found, expected), 1e-3)
            if device.type != "cuda" or family in EXPERTS:
                continue
            for dtype, bound in (("float32", 1e-4), ("bfloat16", 5e-2)):
                captured, eager = (
                    _answers(folder, device, dtype, stage, media, decode_graphs=graphs) for graphs in (True, False)
                )
                yield Check(f"{name}, {dtype}: captured against eager", parted(captured, eager), bound)
                replayed = _answers(folder, device, dtype, stage, media, decode_graphs=False, tower_graphs=True)
                yield Check(f"{name}, {dtype}: captured encodings against eager", parted(replayed, eager), bound)


def parted(found: Sequence[Generation], expected: Sequence[Generation]) -> float:
    """Largest difference of log-probabilities up to where two answers part; infinite where that is early."""
    worst, same, total = 0.0, 0, sum(len(one.token_ids) for one in expected)
    for one, other in zip(found, expected, strict=True):
        pairs = zip(one.token_ids, other.token_ids, one.token_logprobs or (), other.token_logprobs or (), strict=False)
        for token, other_token, logprob, other_logprob in pairs:
            if token != other_token:
                break
            worst, same = max(worst, abs(logprob - other_logprob)), same + 1
    return worst if same >= FEW_ANSWERS * total else float("inf")


def _media(folder: str) -> list[VisualInput]:
    preprocessor, rng = load_preprocessor(folder), np.random.default_rng(0)
    sides = ((40, 40), (64, 48), (56, 40))
    return [preprocessor.images([rng.integers(0, 256, (*side, 3), dtype=np.uint8)])[0] for side in sides]


def _answers(
    folder: str, device: Any, dtype: str, stage: str | None, media: list[VisualInput], **options: Any
) -> list[Generation]:
    limits = {"kv_cache_bytes": 64 << 20, "max_batch_requests": 8, "max_chunk_tokens": 40} | options
    vlm = VLM.from_pretrained(folder, device=device, dtype=dtype, **limits)
    vlm.family.stop_token_ids = frozenset()
    plan = EMPTY_PLAN if stage is None else plan_of(vlm.family, SETTINGS["illava"], stage)
    requests = [
        Request(f"r{n}", (mm_item, "what " * (n + 1)), SamplingParams(max_new_tokens=6 + n, logprobs=True))
        for n, mm_item in enumerate(media)
    ]
    done = vlm.generate(requests, plan=plan)
    vlm.engine.cache.check()
    return done


def _draw(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _apart(found: Tensor, expected: Tensor) -> float:
    """Distance of two results, relative to the norm of the second."""
    return float((found.double() - expected).norm() / expected.norm())


def _attention(q_NHd: Tensor, k_MGd: Tensor, *, scale: float, causal: bool) -> Tensor:
    """Attention of one segment after the softmax, in float64: [H, N, M]; a causal mask is aligned to the ends."""
    q_HNd, k_HMd = q_NHd.double().transpose(0, 1), k_MGd.double().transpose(0, 1)
    logit_HNM = q_HNd @ k_HMd.repeat_interleave(len(q_HNd) // len(k_HMd), 0).transpose(1, 2) * scale
    if causal:
        seen = torch.ones(logit_HNM.shape[1:], dtype=torch.bool, device=q_NHd.device)
        logit_HNM = logit_HNM.masked_fill(~seen.tril(seen.shape[1] - seen.shape[0]), float("-inf"))
    return logit_HNM.softmax(-1)


def _exact(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], *, causal: bool, scale: float
) -> Tensor:
    outputs = []
    for a, b, c in zip(q.split(list(queries)), k.split(list(keys)), v.split(list(keys)), strict=True):
        value_HMd = c.double().transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
        outputs.append((_attention(a, b, scale=scale, causal=causal) @ value_HMd).transpose(0, 1))
    return torch.cat(outputs)


def _received_in_scope(q: Tensor, k: Tensor, scope: Tensor, *, scale: float) -> Tensor:
    counted = (scope[:, None] == scope[None]) & (scope >= 0)
    received = (_attention(q, k, scale=scale, causal=True) * counted).mean(0).sum(0)
    return received / counted.sum(0).clamp(min=1)


def main() -> None:
    """Print every check; exit with 1 on a miss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    missed = []
    for check in checks(torch.device(parser.parse_args().device)):
        print(check, flush=True)
        missed += [] if check.holds else [check.name]
    print("MISSED: " + "; ".join(missed) if missed else "all hold")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
