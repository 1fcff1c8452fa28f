"""VidCom2 against the formula frame by frame."""

from __future__ import annotations

import math

import pytest
import torch

from illava.reducers import VidCom2
from tests.support.reducer_cases import assign_each, kept_places, ragged, segments

pytestmark = pytest.mark.numeric

SHAPES = ((4, 3, 4), (1, 3, 3), (6, 2, 2), (2, 5, 5))


def slow_vidcom2(hidden, frames: list[int], num_kept: int) -> list[int]:
    n, dim = hidden.shape
    variance = hidden.var(0, unbiased=False)
    quiet = sorted(range(dim), key=lambda c: variance[c].item())[: dim // 2]
    y = torch.nn.functional.normalize(hidden[:, quiet], dim=1)

    def likeness(i: int, members: list[int]) -> float:
        gap = (y[i] - y[members].mean(0)).square().sum().item()
        return sum(math.exp(-gap / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    frame_members = {f: [i for i in range(n) if frames[i] == f] for f in sorted(set(frames))}
    video = [likeness(i, list(range(n))) for i in range(n)]
    total = [video[i] + likeness(i, frame_members[frames[i]]) for i in range(n)]
    mean = {f: sum(video[i] for i in m) / len(m) for f, m in frame_members.items()}
    top = max(-v for v in mean.values())
    weight = {f: math.exp((-v - top) / 0.01) for f, v in mean.items()}
    share = {f: w / sum(weight.values()) for f, w in weight.items()}
    base = num_kept / n
    quota = {f: len(m) * min(1.0, base * (1 + share[f] - 1 / len(share))) for f, m in frame_members.items()}

    queue = {f: sorted(m, key=lambda i: total[i]) for f, m in frame_members.items()}
    taken = {f: 0 for f in queue}
    for _ in range(num_kept):  # one token a frame first, then Sainte-Lague
        open_frames = [f for f in queue if taken[f] < len(queue[f])]
        best = min(open_frames, key=lambda f: -1.0 if taken[f] == 0 else (taken[f] + 0.5) / quota[f])
        taken[best] += 1
    return sorted(i for f in queue for i in queue[f][: taken[f]])


@pytest.mark.parametrize("keep_ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(("seed", "missing"), [(110, 0.0), (111, 0.3)])
def test_unusual_frames_keep_more(keep_ratio, seed, missing):
    tokens, evidence = ragged(seed, SHAPES, missing=missing)
    reducer = VidCom2(keep_ratio=keep_ratio)
    blocks = assign_each(reducer, tokens, evidence, "decoder_input")
    for block, (own, _) in zip(blocks, segments(tokens, evidence), strict=True):
        expected = slow_vidcom2(own.hidden_TD, own.coord_T3[:, 0].tolist(), reducer.num_kept(own.lengths[0]))
        assert kept_places(block) == expected


def test_the_odd_frame_out_gets_the_largest_share():
    tokens, evidence = ragged(112, ((5, 4, 4),))
    frames = tokens.coord_T3[:, 0]
    tokens.hidden_TD[:] = tokens.hidden_TD[0] + 0.1 * tokens.hidden_TD
    tokens.hidden_TD[frames == 3] *= -1
    kept = VidCom2(keep_ratio=0.5).assign(tokens, evidence, "decoder_input").kept_K
    counts = torch.bincount(frames[kept], minlength=5)
    assert counts.argmax() == 3
    assert counts.sum() == 40
