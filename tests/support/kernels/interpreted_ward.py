"""The kernels of `ward` against their torch references, under the interpreter; test_ward_kernels.py runs it."""

import pytest
import torch

from illava.attention.backend import kernels_on
from illava.reducers import Evidence, Ward
from illava.reducers.ops.agglomeration import agglomerate
from illava.reducers.ops.contrast import local_contrast
from illava.tokens import Tokens

SHAPES = {
    "ragged, wider than a block": ((37, 1, 70), (9, 1, 45)),
    "one keeps all, one keeps one, one is empty": ((20, 0, 33), (20, 0, 1)),
}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setenv("ILLAVA_KERNELS", "triton")
    kernels_on.cache_clear()


def both(*args):
    """What the kernel says, and what the reference says, of the points there are."""
    found = agglomerate(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILLAVA_KERNELS", "torch")
        kernels_on.cache_clear()
        expected = agglomerate(*args)
    kernels_on.cache_clear()
    return ([partition(row[:n].tolist()) for row, n in zip(value, args[2], strict=True)] for value in (found, expected))


def partition(groups):
    """Each point's first companion. Which of two ends the other's chain may hang on a last bit, and changes nothing."""
    return [groups.index(group) for group in groups]


def points(lengths, *, width=24, seed=0):
    """Points on the grid that `Ward` puts them on."""
    gen = torch.Generator().manual_seed(seed)
    point_SND = torch.randn(len(lengths), max(lengths), width, generator=gen)
    point_SND = torch.nn.functional.normalize(point_SND, dim=-1).mul(4096).round().div(4096)
    for row, n in enumerate(lengths):
        point_SND[row, n:] = 0
    return point_SND


@pytest.mark.parametrize("weights", ["equal", "sizes", "by attention"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_groups_are_those_of_the_reference(shape, weights):
    lengths, kept = SHAPES[shape]
    gen = torch.Generator().manual_seed(1)
    size_SN = torch.ones(len(lengths), max(lengths))
    if weights != "equal":
        size_SN = torch.randint(1, 6, size_SN.shape, generator=gen).float()
    if weights == "by attention":
        size_SN *= torch.rand(size_SN.shape, generator=gen).add(0.1).sqrt()
    found, expected = both(points(lengths), size_SN, lengths, kept)
    assert found == expected
    assert tuple(len(set(row)) for row in found) == kept


def test_ties_are_those_of_the_reference():
    """Points at right angles, equal ones, and one that is equally near to all: costs are exact, and many are equal."""
    corner_ND, blank_ND = torch.eye(16), torch.zeros(16, 16)
    blank_ND[:, 0] = 1
    blank_ND[11:] = torch.eye(16)[11:]
    centre_ND = torch.eye(16)
    centre_ND[5] = 0.25
    point_SND = torch.stack([corner_ND, blank_ND, centre_ND])
    for kept in (15, 6, 1):
        found, expected = both(point_SND, torch.ones(3, 16), (16,) * 3, (kept,) * 3)
        assert found == expected
    found, expected = both(torch.eye(70)[None], torch.ones(1, 70), (70,), (66,))  # ties between blocks of columns
    assert found == expected


def grid_place(number):
    """Frame, row and column on frames of 4 x 6."""
    return torch.tensor([number // 24, number % 24 // 6, number % 6])


def test_the_contrasts_are_those_of_the_reference(monkeypatch):
    """Ragged segments, wider than a block; several frames in one; one token alone in its frame; no place twice."""
    lengths, gen = (70, 1, 25), torch.Generator().manual_seed(3)
    coord_T3 = torch.stack([grid_place(n) for length in lengths for n in range(length)])
    coord_T3[7:50:7] = torch.tensor([1, -1, -1])  # newlines
    size_T = torch.randint(1, 6, (96,), generator=gen).float()
    point_SND = points(lengths, width=100)
    found = local_contrast(point_SND, size_T, coord_T3, lengths)
    monkeypatch.setenv("ILLAVA_KERNELS", "torch")
    kernels_on.cache_clear()
    expected = local_contrast(point_SND, size_T, coord_T3, lengths)
    assert (found - expected).abs().max() <= 2**-16
    for alone in (7, 70, 95):  # a newline, alone at all, alone in its frame: the distance to the origin
        assert found[alone] == pytest.approx(1, abs=2**-9)
    assert found[:70].std() > 0.01, "so a row in another's place would be seen"


def test_a_cut_of_ward_goes_through_the_kernel_and_is_the_reference(monkeypatch):
    """Whole 2x2 groups reach it as tokens of four times the width; nothing else about them differs."""
    lengths, gen = (48, 30), torch.Generator().manual_seed(2)
    tokens = Tokens(torch.randn(78, 32, generator=gen), lengths, torch.stack([grid_place(n) for n in range(78)]))
    evidence = Evidence(attention_received_T=torch.rand(78, generator=gen), size_T=torch.ones(78))
    reducer = Ward(keep_ratio=0.4, alpha=0.5, contrast=1)
    found = reducer.assign(tokens, evidence, "vision_block")
    monkeypatch.setenv("ILLAVA_KERNELS", "torch")
    kernels_on.cache_clear()
    expected = reducer.assign(tokens, evidence, "vision_block")
    assert found.lengths == expected.lengths
    for name in ("kept_K", "source_E", "size_G"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_what_is_no_number_ends_nothing():
    """A model that overflowed gives as many tokens as the budget says, whatever they are."""
    point_SND = points((40, 20))
    point_SND[0, 7] = float("nan")
    point_SND[1] = float("nan")
    for row, n, kept in zip(
        agglomerate(point_SND, torch.ones(2, 40), (40, 20), (10, 3)), (40, 20), (10, 3), strict=True
    ):
        assert len(row[:n].unique()) == kept
