"""FlashVID against its three steps done token by token."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from illava.reducers import Evidence, FlashVID
from illava.tokens import Tokens
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, dense, ragged, segments

pytestmark = pytest.mark.numeric

SHAPES = ((4, 3, 4), (1, 3, 3), (3, 2, 2), (2, 4, 5), (1, 1, 1))


def shared_out(count: int, sizes: list[int]) -> list[int]:
    taken = [0] * len(sizes)
    for _ in range(count):
        free = [f for f in range(len(sizes)) if taken[f] < sizes[f]]
        taken[min(free, key=lambda f: (taken[f] + 0.5) / sizes[f])] += 1
    return taken


def slow_density_peaks(means: list, count: int) -> list[int]:
    """The centre of each of some points."""
    own = range(len(means))
    gap = [[float((means[i] - means[j]).norm()) / len(means[0]) ** 0.5 for j in own] for i in own]
    near = [sorted(row)[: min(7, count)] for row in gap]
    density = [round(math.exp(-sum(d * d for d in row) / len(row)) * 2**16) for row in near]
    furthest = max(max(row) for row in gap)
    apart = []
    for i in own:
        denser = [gap[i][j] for j in own if density[j] > density[i] or (density[j] == density[i] and j < i)]
        apart.append(min(denser) if denser else furthest)
    score = [round(apart[i] * density[i]) for i in own]
    centres = sorted(own, key=lambda i: (-score[i], i))[:count]
    return [i if i in centres else min(centres, key=lambda c: gap[i][c]) for i in own]


def slow_picks(unit, worth: list[float], own: list[int], count: int) -> list[int]:
    """So many tokens of a frame that lie apart."""
    chosen: list[int] = []
    for _ in range(count):
        rest = [i for i in own if i not in chosen]
        others = {i: chosen or [j for j in own if j != i] for i in rest}
        gap = {i: min((1 - float(unit[i] @ unit[j]) for j in others[i]), default=0.0) for i in rest}
        chosen.append(max(rest, key=lambda i: gap[i] * worth[i]))
    return chosen


def slow_flashvid(hidden, frames: list[int], attention, reducer: FlashVID):
    """The mixing matrix of one video."""
    n, unit = len(hidden), torch.nn.functional.normalize(hidden, dim=1)
    kept = reducer.num_kept(n)
    num_picks = round(kept * reducer.pick_share)
    members = [[i for i in range(n) if frames[i] == f] for f in sorted(set(frames))]
    worth = attention.tolist()
    if reducer.event_relevance:
        pooled = [hidden[own].mean(0) for own in members]
        relevance = [sum(float(x @ mean) for mean in pooled) / len(pooled) for x in hidden]
        worth = [a * max(0.0, r) for a, r in zip(worth, relevance, strict=True)]

    picks = [
        pick
        for own, count in zip(members, shared_out(num_picks, [len(m) for m in members]), strict=True)
        for pick in slow_picks(unit, worth, own, count)
    ]
    links: dict[int, tuple[float, int]] = {}
    for before, own in pairwise(members):
        for i in own:
            found = [(float(unit[i] @ unit[j]), -j) for j in before if j not in picks]
            if i not in picks and found and max(found)[0] > reducer.threshold:
                links[i] = max(found)
    most = n - num_picks - (kept - num_picks)
    links = {i: links[i] for i in sorted(links, key=lambda i: (-links[i][0], i))[:most]}
    trees: dict[int, list[int]] = {}
    for i in range(n):
        root = i
        while root in links:
            root = -links[root][1]
        if i not in picks:
            trees.setdefault(root, []).append(i)
    roots = sorted(trees)
    parts = [[r for r in roots if frames[r] == f] for f in sorted({frames[r] for r in roots})]
    shares = shared_out(kept - num_picks, [len(part) for part in parts])
    if 0 in shares:
        parts, shares = [roots], [kept - num_picks]
    rows = {pick: {pick: 1.0} for pick in picks}
    for part, share in zip(parts, shares, strict=True):
        means = [hidden[trees[r]].mean(0) for r in part]
        centre_of = slow_density_peaks(means, share)
        for c in set(centre_of):
            together = [r for r, centre in zip(part, centre_of, strict=True) if centre == c]
            weights = {i: 1 / len(trees[r]) / len(together) for r in together for i in trees[r]}
            rows[part[c]] = weights
    matrix = torch.zeros(len(rows), n)
    for row, place in enumerate(sorted(rows)):
        for i, weight in rows[place].items():
            matrix[row, i] = weight
    return matrix


@pytest.mark.parametrize("options", [{}, {"event_relevance": True, "threshold": 0.2}, {"pick_share": 0.25}])
@pytest.mark.parametrize(("seed", "missing", "keep_ratio"), [(120, 0.0, 0.4), (121, 0.3, 0.25), (122, 0.2, 0.7)])
def test_picks_trees_and_clusters_are_those_of_the_slow_way(seed, missing, keep_ratio, options):
    tokens, evidence = ragged(seed, SHAPES, missing=missing)
    gen = torch.Generator().manual_seed(seed)
    shown = torch.randn(24, 12, generator=gen)[tokens.coord_T3[:, 1] * 5 + tokens.coord_T3[:, 2]]
    tokens.hidden_TD[:] = shown + 0.35 * tokens.hidden_TD + 0.5  # frames alike, cell by cell
    reducer = FlashVID.model_validate({"keep_ratio": keep_ratio, "threshold": 0.8, **options})
    blocks = assign_each(reducer, tokens, evidence, "decoder_input")
    joined = 0
    for block, (own, measured) in zip(blocks, segments(tokens, evidence), strict=True):
        frames = own.coord_T3[:, 0].tolist()
        assert_close(block, slow_flashvid(own.hidden_TD, frames, measured.attention_received_T, reducer))
        assert len(block) == reducer.num_kept(len(frames))
        joined += sum(len({frames[i] for i in row.nonzero().flatten().tolist()}) > 1 for row in block)
    assert joined


def test_a_still_video_is_told_once_and_what_moves_stays_itself():
    gen = torch.Generator().manual_seed(9)
    coord_T3 = torch.cartesian_prod(torch.arange(5), torch.arange(4), torch.arange(4))
    coord_T3 = torch.cat([coord_T3, torch.tensor([[-1, -1, -1]])])
    hidden_TD = torch.cat([torch.randn(16, 12, generator=gen).repeat(5, 1), torch.randn(1, 12, generator=gen)])
    moving = 16 * torch.arange(5) + torch.arange(5)  # another cell in every frame
    hidden_TD[moving] = 4 * torch.eye(12)[:5]
    attention_T = torch.full((81,), 0.01)
    attention_T[moving], attention_T[80] = 0.5, torch.inf  # a newline's, by the layouts' convention
    reducer = FlashVID(keep_ratio=0.3, pick_share=0.25)
    tokens, evidence = Tokens(hidden_TD, (81,), coord_T3), Evidence(attention_received_T=attention_T)
    matrix = dense(reducer.assign(tokens, evidence, "decoder_input"))
    assert len(matrix) == 24
    for place in [*moving.tolist(), 80]:
        (row,) = matrix[:, place].nonzero().flatten().tolist()
        assert matrix[row].nonzero().flatten().tolist() == [place]
    largest = max(len(coord_T3[row > 0][:, 0].unique()) for row in matrix)
    assert largest == 5, "a tree runs through the whole video"
