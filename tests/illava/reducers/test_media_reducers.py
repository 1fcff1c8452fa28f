"""Methods that decide from pixels and text before the tower, against the slow and obvious version of each."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from illava.reducers import (
    BoundedError,
    ClipCrop,
    ClipSegCrop,
    Evidence,
    FewerFrames,
    FreeVideoLLM,
    LowerResolution,
    PixelDedup,
    PixelPrune,
)
from illava.reduction.grid_representatives import destinations
from illava.tokens import Tokens, merge
from tests.support.closeness import assert_close
from tests.support.reducer_cases import dense, ragged, segments

pytestmark = pytest.mark.numeric

SCORER = {"model_id": "m"}


def picture(values: list[list[list[int]]], lengths=None) -> Tokens:
    """Cells of one pixel each from frames x rows x columns of grey values."""
    value_FRC = torch.tensor(values, dtype=torch.uint8)
    coord_T3 = torch.cartesian_prod(*(torch.arange(n) for n in value_FRC.shape)).view(-1, 3)
    return Tokens(value_FRC.reshape(-1, 1), lengths or (value_FRC.numel(),), coord_T3)


def random_picture(seed: int, shape=(3, 6, 7), levels=3) -> Tokens:
    gen = torch.Generator().manual_seed(seed)
    return picture((torch.randint(0, levels, shape, generator=gen) * 10).tolist())


def slow_pixel_prune(frame: list[list[int]], threshold: float) -> dict[tuple[int, int], tuple[int, int]]:
    """{place: the place it is reconstructed from}, in raster order."""
    known, representative = {}, {}
    for r, line in enumerate(frame):
        for c, x in enumerate(line):
            a, b, corner = (r, c - 1), (r - 1, c), (r - 1, c - 1)
            near = lambda p, q: abs(known[p] - known[q]) <= threshold  # noqa: E731
            if (r, c) == (0, 0):
                guess = None
            elif c == 0:
                guess = b
            elif r == 0:
                guess = a
            else:
                guess = b if near(corner, a) and not near(corner, b) else a
            if guess is not None and abs(x - known[guess]) <= threshold:
                known[r, c], representative[r, c] = known[guess], representative[guess]
            else:
                known[r, c], representative[r, c] = x, (r, c)
    return representative


@pytest.mark.parametrize("threshold", [0, 10])
@pytest.mark.parametrize("seed", range(6))
def test_pixel_prune_is_the_raster_scan(seed, threshold):
    tokens = random_picture(seed, levels=3 if threshold == 0 else 6)
    assignment = PixelPrune(threshold=threshold, skip_padding=False).assign(tokens, Evidence(), "media")
    representative_T = assignment.kept_K[destinations(assignment)]
    frames = tokens.hidden_TD.view(3, 6, 7).tolist()
    expected = []
    for f, frame in enumerate(frames):
        representative = slow_pixel_prune(frame, threshold)
        expected += [
            (f * 6 + representative[r, c][0]) * 7 + representative[r, c][1] for r in range(6) for c in range(7)
        ]
    assert representative_T.tolist() == expected
    assert 3 <= assignment.num_kept < 126
    gap_T = (tokens.hidden_TD.float() - tokens.hidden_TD.float()[representative_T]).abs()
    assert gap_T.max() <= threshold


def test_pixel_prune_keeps_noise_whole_and_a_blank_page_by_one_cell():
    noise = random_picture(0, levels=1)
    noise = Tokens(torch.arange(126, dtype=torch.uint8)[:, None] * 2, noise.lengths, noise.coord_T3)
    reducer = PixelPrune(skip_padding=False)
    assert torch.equal(dense(reducer.assign(noise, Evidence(), "media")), torch.eye(126))
    blank = picture(torch.full((2, 5, 5), 255).tolist())
    assert reducer.assign(blank, Evidence(), "media").kept_K.tolist() == [0, 25]


def test_padding_never_enters_but_for_a_tile_of_nothing_else():
    tokens = random_picture(3, (2, 4, 4), levels=25)
    padding = torch.zeros(2, 4, 4, dtype=torch.bool)
    padding[0, :, 2:] = True
    padding[1] = True
    assignment = PixelPrune().assign(tokens, Evidence(padding_T=padding.flatten()), "media")
    kept = set(assignment.kept_K.tolist())
    assert not {n for n in range(16) if n % 4 >= 2} & kept
    assert {n for n in kept if n >= 16} == {16}
    alone = picture(tokens.hidden_TD.view(2, 4, 4)[:1, :, :2].tolist())
    inner = PixelPrune(skip_padding=False).assign(alone, Evidence(), "media").kept_K.tolist()
    assert sorted(n for n in kept if n < 16) == [(n // 2) * 4 + n % 2 for n in inner]


def slow_dedup(frames: list[list[int]], threshold: float) -> list[int]:
    """The owner of every cell, frames laid end to end."""
    last, representatives = {}, []
    for f, frame in enumerate(frames):
        still = [p in last and abs(x - frames[last[p] // len(frame)][p]) <= threshold for p, x in enumerate(frame)]
        if all(still):
            still[0] = False
        for p in range(len(frame)):
            if not still[p]:
                last[p] = f * len(frame) + p
            representatives.append(last[p])
    return representatives


@pytest.mark.parametrize("threshold", [0, 10])
def test_pixel_dedup_compares_with_what_was_last_kept(threshold):
    for seed in range(6):
        tokens = random_picture(seed, (7, 3, 4), levels=4)
        assignment = PixelDedup(threshold=threshold).assign(tokens, Evidence(), "media")
        representative_T = assignment.kept_K[destinations(assignment)]
        assert representative_T.tolist() == slow_dedup(tokens.hidden_TD.view(7, 12).tolist(), threshold)


def test_a_slow_drift_is_not_taken_for_standing_still_and_a_frame_never_vanishes():
    drift = picture([[[10 * f, 0]] for f in range(5)])
    assignment = PixelDedup(threshold=10).assign(drift, Evidence(), "media")
    assert assignment.kept_K.tolist() == [0, 1, 2, 4, 6, 8]  # every frame keeps its first cell: 2 and 6 for their times
    still = PixelDedup().assign(picture([[[5, 6]]] * 3), Evidence(), "media")
    assert still.kept_K.tolist() == [0, 1, 2, 4]


def test_tiles_of_an_image_are_no_sequence():
    tokens = picture([[[5, 6]]] * 3, lengths=(2, 2, 2))
    assert PixelDedup().assign(tokens, Evidence(), "media").num_kept == 6


@pytest.mark.parametrize(("total", "keep", "expected"), [(8, 0.5, [1, 3, 5, 7]), (5, 0.4, [1, 3]), (3, 0.1, [1])])
def test_fewer_frames_are_evenly_spread(total, keep, expected):
    tokens = picture(torch.zeros(total, 2, 2).int().tolist())
    assignment = FewerFrames(keep_ratio=keep).assign(tokens, Evidence(), "media")
    assert sorted(set(tokens.coord_T3[assignment.kept_K, 0].tolist())) == expected
    assert assignment.num_kept == 4 * len(expected)
    by_count = FewerFrames(num_frames=len(expected)).assign(tokens, Evidence(), "media")
    assert torch.equal(by_count.kept_K, assignment.kept_K)


def slow_by_bytes(sizes: list[int], count: int) -> list[int]:
    """Frames by systematic sampling: shares found by bisection of c in min(1, c b), then each middle looked up."""
    low, high = 0.0, float(count)
    for _ in range(200):
        scale = (low + high) / 2
        low, high = (scale, high) if sum(min(1.0, scale * b) for b in sizes) < count else (low, scale)
    end, kept = 0.0, []
    for frame, size in enumerate(sizes):
        begin, end = end, end + min(1.0, low * size)
        if any(begin <= middle + 0.5 < end for middle in range(count)):
            kept.append(frame)
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_fewer_frames_by_packets_spread_over_the_bytes(seed):
    gen = torch.Generator().manual_seed(seed)
    tokens = picture(torch.zeros(11, 2, 2).int().tolist())
    sizes = (torch.rand(11, generator=gen) ** 4 * 9_973 + 7).int()  # primes: no middle lies at an end of a share
    evidence = Evidence(packet_bytes_T=sizes.long().repeat_interleave(4))
    for count in range(1, 11):
        kept_K = FewerFrames(num_frames=count, by="packets").assign(tokens, evidence, "media").kept_K
        assert tokens.coord_T3[kept_K, 0].unique().tolist() == slow_by_bytes(sizes.tolist(), count)
        assert len(kept_K) == 4 * count
        same = Evidence(packet_bytes_T=torch.full((44,), 123))
        by_same = FewerFrames(num_frames=count, by="packets").assign(tokens, same, "media")
        assert torch.equal(by_same.kept_K, FewerFrames(num_frames=count).assign(tokens, Evidence(), "media").kept_K)


def test_keeping_all_is_the_identity():
    tokens, evidence = ragged(1)
    whole = torch.eye(sum(tokens.lengths))
    for reducer in (FewerFrames(num_frames=99), LowerResolution(keep_ratio=0.5), BoundedError(epsilon=1e-6)):
        assert_close(dense(reducer.assign(tokens, evidence, "media")), whole)


def slow_box(relevance_RC: torch.Tensor, shapes: list[tuple[int, int]]) -> set[tuple[int, int]]:
    rows, cols = relevance_RC.shape
    best, found = -1.0, set()
    for height, width in shapes:
        for top in range(rows - height + 1):
            for left in range(cols - width + 1):
                mass = float(relevance_RC[top : top + height, left : left + width].double().sum())
                if mass > best + 1e-9:
                    best = mass
                    found = {(r, c) for r in range(top, top + height) for c in range(left, left + width)}
    return found


@pytest.mark.parametrize("crop", [ClipCrop, ClipSegCrop])
@pytest.mark.parametrize("keep", [0.1, 0.35, 0.7])
def test_a_crop_is_the_box_of_largest_relevance(crop, keep):
    tokens = random_picture(0, (4, 5, 6))
    relevance_T = torch.rand(120, generator=torch.Generator().manual_seed(1)) ** 4
    assignment = crop(keep_ratio=keep, scorer=SCORER).assign(tokens, Evidence(text_relevance_T=relevance_T), "media")
    kept = {tuple(place) for place in tokens.coord_T3[assignment.kept_K].tolist()}
    budget = math.floor(30 * keep)
    shapes = [(h, w) for h in range(1, 6) for w in range(1, 7) if h * w <= budget]
    shapes.sort(key=lambda shape: shape[0])
    for f, frame in enumerate(relevance_T.view(4, 5, 6)):
        assert {(r, c) for g, r, c in kept if g == f} == slow_box(frame, shapes)


def test_free_videollm_is_three_paths():
    tokens = random_picture(0, (9, 6, 8))
    relevance = torch.rand(9, 6, 8, generator=torch.Generator().manual_seed(2))
    relevance[6] += 1
    reducer = FreeVideoLLM(num_slow=1, num_middle=2, crop=0.5, fast_grid=(2, 2), scorer=SCORER)
    assignment = reducer.assign(tokens, Evidence(text_relevance_T=relevance.flatten()), "media")
    kept = {tuple(place) for place in tokens.coord_T3[assignment.kept_K].tolist()}
    expected = {(f, r, c) for f in range(9) for r in (1, 4) for c in (2, 6)}
    for f in (2, 6):  # middle: floor(1/2 9/2), floor(3/2 9/2) = 2, 6; slow: 6
        box = slow_box(relevance[f], [(3, 4)])
        left = min(c for _, c in box)
        expected |= {(f, r, c) for r, c in box if (c - left) % 2 == 0}
    assert kept == expected


def slow_bounded(hidden: torch.Tensor, epsilon: float) -> list[int]:
    """The owner of every token: all distances anew for every number of centres."""
    centres = [int((hidden - hidden.mean(0)).pow(2).sum(1).argmin())]
    while True:
        distance = torch.stack([(hidden - hidden[c]).pow(2).sum(1) for c in centres])
        representative = torch.tensor(centres)[distance.argmin(0)]
        restored = torch.stack([hidden[representative == o].mean(0) for o in representative])
        if (hidden - restored).norm() / hidden.norm() < epsilon:
            return representative.tolist()
        centres.append(int(distance.min(0).values.argmax()))


@pytest.mark.parametrize("epsilon", [0.1, 0.4, 0.8])
def test_the_error_is_under_the_bound_by_as_few_tokens_as_the_slow_search_finds(epsilon):
    tokens, _ = ragged(4)
    assignment = BoundedError(epsilon=epsilon).assign(tokens, Evidence(), "decoder_input")
    merged_KD, row_T = merge(assignment, tokens.hidden_TD), destinations(assignment)
    start = 0
    for (own, _), kept in zip(segments(tokens, ragged(4)[1]), assignment.lengths, strict=True):
        representative = slow_bounded(own.hidden_TD, epsilon)
        cut = slice(start, start + len(representative))
        assert (assignment.kept_K[row_T[cut]] - start).tolist() == representative
        assert kept == len(set(representative))
        error = (own.hidden_TD - merged_KD[row_T[cut]]).norm() / own.hidden_TD.norm()
        assert error < epsilon
        start = cut.stop


def test_separators_are_kept_and_a_larger_bound_keeps_no_more():
    tokens, _ = ragged(5, ((1, 6, 6),))
    place = torch.cat([tokens.coord_T3, torch.tensor([[0, -1, -1]] * 3)])
    with_separators = Tokens(torch.cat([tokens.hidden_TD, torch.ones(3, 12)]), (39,), place)
    counts = []
    for epsilon in (0.05, 0.3, 0.6, 0.9, 0.999):
        assignment = BoundedError(epsilon=epsilon).assign(with_separators, Evidence(), "decoder_input")
        assert {36, 37, 38} <= set(assignment.kept_K.tolist())
        counts.append(assignment.num_kept)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (FewerFrames, "exactly one of keep_ratio, num_frames"),
        (lambda: FewerFrames(keep_ratio=0.5, num_frames=2), "exactly one of keep_ratio, num_frames"),
        (lambda: LowerResolution(keep_ratio=1.0), "less than 1"),
        (lambda: PixelPrune(threshold=300), "less than or equal to 255"),
        (lambda: ClipCrop(keep_ratio=0.5), "scorer"),
        (lambda: BoundedError(epsilon=0), "greater than 0"),
    ],
)
def test_refused_in_words(build, message):
    with pytest.raises(ValidationError, match=message):
        build()
