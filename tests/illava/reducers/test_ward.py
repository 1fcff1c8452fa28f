"""Ward against its rounds done slowly, and against one join at a time."""

from __future__ import annotations

import math

import pytest
import torch

from illava.plan import ReductionPlan
from illava.reducers import Evidence, Ward
from illava.reducers.ops import agglomeration, contrast
from illava.reducers.ops.contrast import local_contrast
from illava.reduction.vision import VisionReduction
from illava.tokens import Tokens, merged_sizes, pad
from tests.illava.reducers.test_properties import LargestTensor
from tests.support.closeness import assert_close
from tests.support.reducer_cases import assign_each, dense, groups_matrix, ragged, segments

pytestmark = pytest.mark.numeric

SHAPES = ((2, 4, 5), (1, 3, 3), (1, 1, 1), (1, 1, 2), (1, 5, 9))


def on_grid(hidden_ND):
    return ((torch.nn.functional.normalize(hidden_ND.float(), dim=1) * 4096).round() / 4096).double()


def slow_cost(a, b):
    """What joining two groups adds to the squared error; a group is (mean, weight, members)."""
    return a[1] * b[1] / (a[1] + b[1]) * float(((a[0] - b[0]) ** 2).sum())


def slow_join(groups):
    weight = sum(g[1] for g in groups)
    return sum(g[1] * g[0] for g in groups) / weight, weight, sorted(m for g in groups for m in g[2])


def slow_round(groups, left):
    """A group joins its nearest one, or that one and the third which that would rather join; the cheapest do."""
    if len(groups) == left:
        return groups
    everyone = range(len(groups))
    near = [min((j for j in everyone if j != i), key=lambda j, i=i: slow_cost(groups[i], groups[j])) for i in everyone]
    price = {}
    for i, j in enumerate(near):
        if near[j] != i:
            price[i] = slow_cost(groups[i], slow_join([groups[j], groups[near[j]]]))
        elif j < i:
            price[i] = slow_cost(groups[i], groups[j])
    root = list(everyone)
    for i in sorted(price, key=lambda i: price[i])[: len(groups) - left]:
        root[i] = near[i]
    for _ in everyone:
        root = [root[r] for r in root]
    return [slow_join([g for g, r in zip(groups, root, strict=True) if r == own]) for own in sorted(set(root))]


def slow_contrast(point_ND, size_N, coord_N3):
    """Squared distance of each point to the mean of the others of its frame, by size over distance cubed."""
    found = []
    for n, (frame, row, col) in enumerate(coord_N3.tolist()):
        total, mean = 0.0, torch.zeros_like(point_ND[0])
        for m, (other, down, right) in enumerate(coord_N3.tolist()):
            if m != n and other == frame:
                share = float(size_N[m]) / math.dist((row, col), (down, right)) ** 3
                total, mean = total + share, mean + share * point_ND[m]
        found.append(float((point_ND[n] - mean / (total or 1.0)).square().sum()) + 2**-10)
    return torch.tensor(found)


def slow_ward(hidden_ND, weights, kept, of_means=None):
    """``of_means``: the weights in the means, where they are others than in the costs."""
    num, of_means = len(weights), of_means or weights
    groups = [(x, w, [n]) for n, (x, w) in enumerate(zip(on_grid(hidden_ND), weights, strict=True))]
    if kept < num:
        rounds = next(r for r in range(3, 30 * num) if (kept / num) ** (1 / r) >= 15 / 16)
        for r in range(1, rounds + 1):
            groups = slow_round(groups, kept if r == rounds else round(num * (kept / num) ** (r / rounds)))
    points = on_grid(hidden_ND)
    found = {}
    for *_, members in groups:
        mean = sum(of_means[m] * points[m] for m in members) / sum(of_means[m] for m in members)
        distance = {m: round(float(((points[m] - mean) ** 2).sum()) * 2**16) for m in members}
        found[min(members, key=lambda m: (distance[m], m))] = members
    return groups_matrix(found, of_means, num)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.3}, {"keep_ratio": 0.8}, {"num_merged": 5}, {"keep_per_frame": 1}])
def test_rounds_are_those_of_the_slow_way(budget, alpha):
    tokens, evidence = ragged(50, SHAPES)
    reducer = Ward(alpha=alpha, **budget)
    blocks = assign_each(reducer, tokens, evidence, "vision_block")
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        (n,) = own_tokens.lengths
        score = own.attention_received_T
        weights = (own.size_T * (score / score.mean()) ** alpha).tolist()
        assert_close(block, slow_ward(own_tokens.hidden_TD, weights, reducer.num_kept(n)))
        assert torch.equal((block > 0).sum(0), torch.ones(n, dtype=torch.long)), "each token is in one group"


@pytest.mark.parametrize("exponents", [(1.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.3}, {"num_merged": 5}])
def test_contrast_weighs_costs_and_its_fourth_power_means(budget, exponents):
    exponent, alpha = exponents
    tokens, evidence = ragged(53, SHAPES)
    reducer = Ward(contrast=exponent, alpha=alpha, **budget)
    blocks = assign_each(reducer, tokens, evidence, "vision_block")
    for block, (own_tokens, own) in zip(blocks, segments(tokens, evidence), strict=True):
        (n,) = own_tokens.lengths
        score = own.attention_received_T
        by_size = own.size_T * (score / score.mean()) ** alpha
        of_edges = slow_contrast(on_grid(own_tokens.hidden_TD), own.size_T, own_tokens.coord_T3) ** exponent
        weights, of_means = (by_size * of_edges).tolist(), (by_size * of_edges**4).tolist()
        assert_close(block, slow_ward(own_tokens.hidden_TD, weights, reducer.num_kept(n), of_means))


def test_a_bar_keeps_its_top_where_contrast_counts():
    """Two flat areas that meet: with equal weights their tokens nearest to the mean speak, with contrast the border."""
    row_N, col_N = torch.arange(64) // 8, torch.arange(64) % 8
    gen = torch.Generator().manual_seed(6)
    hidden_ND = torch.where((row_N < 3)[:, None], torch.randn(16, generator=gen), torch.randn(16, generator=gen))
    hidden_ND += 0.02 * torch.randn(64, 16, generator=gen)
    tokens = Tokens(hidden_ND, (64,), torch.stack([torch.zeros(64).long(), row_N, col_N], 1))
    spoken = {}
    for exponent in (0.0, 1.0):
        kept_K = Ward(keep_ratio=0.05, contrast=exponent).assign(tokens, Evidence(), "vision_output").kept_K
        spoken[exponent] = {int(row) for row in row_N[kept_K]}
    assert spoken[1.0] == {2, 3}
    assert not spoken[0.0] <= {2, 3}


@pytest.mark.parametrize("frame", [0, -1])
def test_newlines_surround_nothing(frame):
    """Row separators of a tiled picture have the frame of its grid, a clip's has none; both have no place."""
    coord_T3 = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(5), torch.arange(6))
    coord_T3[5::6] = torch.tensor([frame, -1, -1])
    point_ND = torch.nn.functional.normalize(torch.randn(2, 16, generator=torch.Generator().manual_seed(7)), dim=1)
    is_newline_T = coord_T3[:, 1] < 0
    contrast_T = local_contrast(point_ND[is_newline_T.long()][None], torch.ones(30), coord_T3, (30,))
    assert (contrast_T[~is_newline_T] == 2**-10).all(), "a blank page has no contrast"
    assert contrast_T[is_newline_T] == pytest.approx(1 + 2**-10, abs=1e-4)


def test_contrast_with_what_it_does_not_fit_is_refused_in_words():
    for per in ("span", "prompt"):
        with pytest.raises(ValueError, match="take per: medium or per: frame"):
            Ward(keep_ratio=0.3, contrast=1, per=per)
    with pytest.raises(ValueError, match="give a count"):
        Ward(max_merge_error=0.1, contrast=1)


def test_contrast_of_a_long_segment_is_that_of_its_blocks(monkeypatch):
    tokens, evidence = ragged(54, ((3, 5, 6), (1, 4, 4)))
    lengths = tokens.lengths
    point_SND = pad(torch.nn.functional.normalize(tokens.hidden_TD.float(), dim=1), lengths, 0.0)
    whole_T = local_contrast(point_SND, evidence.size_T, tokens.coord_T3, lengths)
    monkeypatch.setattr(contrast, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(contrast, "_CPU_CELLS", 1)
    assert (local_contrast(point_SND, evidence.size_T, tokens.coord_T3, lengths) - whole_T).abs().max() <= 2**-16


def one_join_at_a_time(point_ND, weight_N, kept):
    """The whole squared error of the thorough way."""
    points, weights = list(point_ND.double()), weight_N.double().tolist()
    x, w = torch.stack(points), torch.tensor(weights, dtype=torch.float64)
    cost = w[:, None] * w / (w[:, None] + w) * (x[:, None] - x).square().sum(-1)
    cost.fill_diagonal_(torch.inf)
    total = 0.0
    for _ in range(len(x) - kept):
        i, j = divmod(int(cost.argmin()), len(x))
        total += float(cost[i, j])
        x[i], w[i] = (w[i] * x[i] + w[j] * x[j]) / (w[i] + w[j]), w[i] + w[j]
        x[j] = torch.inf
        cost[j] = cost[:, j] = torch.inf
        row = w[i] * w / (w[i] + w) * (x[i] - x).square().sum(-1)
        row[i] = torch.inf
        cost[i] = cost[:, i] = row
    return total


def error_of(point_ND, weight_N, matrix_KN):
    group_N = (matrix_KN > 0).float().argmax(0)
    return float((weight_N[:, None] * (point_ND - (matrix_KN @ point_ND)[group_N]).square()).sum())


def pictures():
    """Token grids of several kinds, 12 x 12."""
    gen = torch.Generator().manual_seed(3)
    coarse = torch.randn(1, 32, 5, 5, generator=gen)
    smooth_ND = torch.nn.functional.interpolate(coarse, size=(12, 12), mode="bicubic")[0].flatten(1).T
    clusters_ND = torch.randn(9, 32, generator=gen)[torch.randint(0, 9, (144,), generator=gen)]
    page_ND = torch.randn(144, 32, generator=gen)
    page_ND[:90] = page_ND[0]
    return {
        "smooth": smooth_ND + 0.1 * torch.randn(144, 32, generator=gen),
        "clusters": clusters_ND + 0.1 * torch.randn(144, 32, generator=gen),
        "noise": torch.randn(144, 32, generator=gen),
        "few directions": torch.randn(144, 4, generator=gen),
        "a blank page with some text": page_ND,
    }


@pytest.mark.parametrize("keep_ratio", [0.85, 0.5, 0.25, 0.12])
def test_the_whole_error_is_near_that_of_one_join_at_a_time(keep_ratio):
    for sizes in (torch.ones(144), torch.randint(1, 5, (144,), generator=torch.Generator().manual_seed(4)).float()):
        for name, hidden_ND in pictures().items():
            reducer = Ward(keep_ratio=keep_ratio)
            tokens = Tokens(hidden_ND, (144,), torch.zeros(144, 3, dtype=torch.long))
            matrix_KN = dense(reducer.assign(tokens, Evidence(size_T=sizes), "vision_output"))
            point_ND = on_grid(hidden_ND).float()
            least = one_join_at_a_time(point_ND, sizes, reducer.num_kept(144))
            assert error_of(point_ND, sizes, matrix_KN) <= 1.05 * least + 1e-5, name


def test_the_order_of_tokens_does_not_matter():
    tokens, evidence = ragged(51, ((1, 6, 7),))
    order = torch.randperm(42, generator=torch.Generator().manual_seed(5))
    turned = Tokens(tokens.hidden_TD[order], (42,), tokens.coord_T3[order])
    reducer = Ward(keep_ratio=0.3, alpha=0.5)
    evidence = Evidence(attention_received_T=evidence.attention_received_T, size_T=evidence.size_T)
    other = Evidence(attention_received_T=evidence.attention_received_T[order], size_T=evidence.size_T[order])
    first, second = (dense(reducer.assign(*given, "vision_block")) for given in ((tokens, evidence), (turned, other)))
    back = torch.zeros_like(second)
    back[:, order] = second
    assert_close(first[first.argmax(1).argsort()].sort(0).values, back[back.argmax(1).argsort()].sort(0).values)
    groups = [{frozenset(row.nonzero().flatten().tolist()) for row in matrix} for matrix in (first, back)]
    assert groups[0] == groups[1]


def test_sizes_add_up_over_two_cuts_and_weigh_what_joins():
    tokens, evidence = ragged(52, ((1, 6, 6), (2, 2, 5)))
    assignment = Ward(keep_ratio=0.5).assign(tokens, evidence, "vision_block")
    size_K = merged_sizes(assignment, evidence.size_T)
    assert size_K[:18].sum() == evidence.size_T[:36].sum()
    assert size_K[18:].sum() == evidence.size_T[36:].sum()
    # of two equally near pairs the one of smaller tokens joins
    point_TD = torch.eye(4)
    pairs = Tokens(point_TD, (4,), torch.zeros(4, 3, dtype=torch.long))
    for sizes, gone in (([1, 1, 9, 9], {0, 1}), ([9, 9, 1, 1], {2, 3})):
        found = dense(Ward(num_merged=1).assign(pairs, Evidence(size_T=torch.tensor(sizes).float()), "vision_block"))
        (joined,) = [set(row.nonzero().flatten().tolist()) for row in found if (row > 0).sum() > 1]
        assert joined == gone


def test_attended_tokens_stay_apart():
    tokens, evidence = ragged(53, ((1, 8, 8),))
    attended = torch.arange(64) % 8 == 0
    evidence = Evidence(attention_received_T=torch.where(attended, 1.0, 1e-4), size_T=torch.ones(64))
    for alpha, apart in ((0.0, False), (1.0, True)):
        matrix_KN = dense(Ward(keep_ratio=0.3, alpha=alpha).assign(tokens, evidence, "vision_block"))
        most = matrix_KN[:, attended].amax(0)  # its share of the token that it is in
        assert bool((most > 0.9).all()) == apart
    unseen = Evidence(attention_received_T=torch.zeros(64), size_T=torch.ones(64))
    for alpha in (0.5, 2.0):  # no weight is nothing, and products of weights are still numbers
        spotted = Evidence(attention_received_T=(torch.arange(64) == 9).float(), size_T=torch.ones(64))
        for measured in (unseen, spotted):
            weights_E = Ward(keep_ratio=0.3, alpha=alpha).assign(tokens, measured, "vision_block").weight_E
            assert (weights_E > 0).all()
            assert (weights_E <= 1).all()
    assert Ward(num_merged=1).evidence("vision_block") == {"sizes"}
    assert Ward(num_merged=1, alpha=0.5).evidence("decoder_input") == {"sizes", "attention_received"}
    assert Ward(num_merged=1, alpha=0.5).evidence("decoder_layer") == {"sizes", "causal_normalised_attention"}


def test_equal_tokens_join_first():
    hidden_ND = pictures()["a blank page with some text"]
    hidden_ND[:90] *= torch.linspace(0.5, 2.0, 90)[:, None]  # in one direction: equal but for their lengths
    tokens = Tokens(hidden_ND, (144,), torch.zeros(144, 3, dtype=torch.long))
    matrix_KN = dense(Ward(num_merged=89).assign(tokens, Evidence(), "vision_block"))
    groups = sorted((row.nonzero().flatten().tolist() for row in matrix_KN), key=len)
    assert groups[:-1] == [[n] for n in range(90, 144)]
    assert groups[-1] == list(range(90))
    assert Ward(num_merged=89).assign(tokens, Evidence(), "vision_block").kept_K[0] == 0


def test_the_budget_is_met_whatever_ties_there_are():
    """Tokens at right angles, and one that is equally near to all of them, in every place."""
    for place in range(9):
        hidden_ND = torch.eye(8)
        hidden_ND = torch.cat([hidden_ND[:place], hidden_ND.sum(0, keepdim=True), hidden_ND[place:]])
        tokens = Tokens(hidden_ND, (9,), torch.zeros(9, 3, dtype=torch.long))
        for kept in range(1, 9):
            assignment = Ward(num_merged=9 - kept).assign(tokens, Evidence(), "vision_block")
            assert dense(assignment).shape == (kept, 9)
            assert torch.equal((dense(assignment) > 0).sum(0), torch.ones(9, dtype=torch.long))


def test_costs_that_rounding_made_unequal_both_ways_do_no_harm(monkeypatch):
    """Joins never go round in a circle, whatever a product's last bits say; here they say anything."""
    gen = torch.Generator().manual_seed(6)

    def arbitrary(points, square_SN, weight_SN):
        num = torch.tensor(tokens.lengths)[:, None]
        off = (torch.rand(weight_SN.shape, generator=gen) * (num - 1)).long() + 1
        near_SN = (torch.arange(weight_SN.shape[1]) + off) % num
        cost_SN = torch.rand(weight_SN.shape, generator=gen).mul(3).floor()
        return cost_SN.masked_fill(square_SN.isinf(), torch.inf), near_SN

    monkeypatch.setattr(agglomeration, "_nearest", arbitrary)
    tokens, _ = ragged(54, ((1, 5, 5), (1, 5, 5), (1, 2, 3)))
    points = agglomeration._ByChannels(pad(tokens.hidden_TD, tokens.lengths, 0.0))
    for left in range(1, 25):
        after = (left, left, min(left, 6))
        num_joins = tuple(n - k for n, k in zip(tokens.lengths, after, strict=True))
        into_SN = agglomeration._Ranked.of(points, torch.ones(3, 25), tokens.lengths).joins(num_joins)
        assert torch.equal(into_SN.gather(1, into_SN), into_SN)
        assert tuple(len(row[:n].unique()) for row, n in zip(into_SN, tokens.lengths, strict=True)) == after


def relative_error(hidden_ND, weight_N, matrix_KN):
    """The error of an assignment as `max_merge_error` counts it."""
    return (error_of(on_grid(hidden_ND), weight_N.double(), matrix_KN.double()) / float(weight_N.sum())) ** 0.5


@pytest.mark.parametrize("bound", [0.05, 0.3, 0.6, 0.9])
def test_an_error_budget_is_kept_and_used_up(bound):
    """One more join of the groups that are left would break it, whichever; or nearly so, since joins come by rounds."""
    kept = {}
    for name, hidden_ND in pictures().items():
        weight_N = torch.randint(1, 4, (144,), generator=torch.Generator().manual_seed(7)).float()
        tokens = Tokens(hidden_ND, (144,), torch.zeros(144, 3, dtype=torch.long))
        assignment = Ward(max_merge_error=bound).assign(tokens, Evidence(size_T=weight_N), "vision_block")
        matrix_KN, kept[name] = dense(assignment), assignment.num_kept
        assert relative_error(hidden_ND, weight_N, matrix_KN) <= bound + 1e-4, name
        group_N = (matrix_KN > 0).float().argmax(0)
        points = on_grid(hidden_ND)
        groups = [(points[group_N == k], weight_N[group_N == k].double()) for k in range(len(matrix_KN))]
        means = [((w[:, None] * x).sum(0) / w.sum(), float(w.sum()), []) for x, w in groups]
        more = min((slow_cost(a, b) for i, a in enumerate(means) for b in means[:i]), default=torch.inf)
        used = relative_error(hidden_ND, weight_N, matrix_KN) ** 2 * float(weight_N.sum())
        assert used + more > bound**2 * float(weight_N.sum()) - 1e-3, name
        fewest = Ward(num_merged=144 - kept[name] + 1) if kept[name] > 1 else None
        if fewest is not None:  # a budget of one token fewer would break it
            fewer_KN = dense(fewest.assign(tokens, Evidence(size_T=weight_N), "vision_block"))
            assert relative_error(hidden_ND, weight_N, fewer_KN) > 0.97 * bound, name
    assert kept["noise"] >= kept["smooth"]
    assert kept["noise"] >= kept["clusters"]


def test_an_error_budget_gives_each_picture_what_it_needs_and_a_ceiling_holds():
    """All equal: one token. A page of text: its glyphs stay. Side by side they keep what they keep alone."""
    blank_ND, page_ND = torch.ones(100, 32), pictures()["a blank page with some text"]
    noise_ND = torch.randn(30, 32, generator=torch.Generator().manual_seed(8))
    lengths = (100, 144, 1, 30)
    coord_T3 = torch.zeros(sum(lengths), 3, dtype=torch.long)
    tokens = Tokens(torch.cat([blank_ND, page_ND, noise_ND[:1], noise_ND]), lengths, coord_T3)
    reducer = Ward(max_merge_error=0.2)
    assignment = reducer.assign(tokens, Evidence(), "vision_output")
    assert assignment.lengths[0] == 1
    assert 45 <= assignment.lengths[1] <= 55
    assert assignment.lengths[2] == 1
    assert assignment.lengths[3] == 28  # two pairs of noise may join: 0.04 x 30 is 1.2, and a pair costs about 0.4
    parts = assign_each(reducer, tokens, Evidence(), "vision_output")
    assert tuple(map(len, parts)) == assignment.lengths
    assert_close(torch.block_diag(*parts), dense(assignment))
    capped = Ward(max_merge_error=0.2, max_tokens=20).assign(tokens, Evidence(), "vision_output")
    assert capped.lengths == (1, 20, 1, 20)
    counts = [
        Ward(max_merge_error=e).assign(tokens, Evidence(), "vision_output").num_kept for e in (0.1, 0.4, 0.7, 0.95)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] / 2


def test_an_error_takes_the_place_of_a_count_and_may_keep_all():
    reducer = Ward(max_merge_error=0.3)
    assert reducer.num_kept(50) is None
    assert reducer.may_keep_all
    assert not Ward(num_merged=3).may_keep_all
    for wrong in ({"max_merge_error": 0.3, "keep_ratio": 0.5}, {"max_tokens": 5, "keep_ratio": 0.5}, {}):
        with pytest.raises(ValueError, match=r"exactly one of|ceiling for max_merge_error"):
            Ward(**wrong)


def test_a_long_segment_is_compared_by_blocks(monkeypatch):
    tokens, evidence = ragged(55, ((1, 30, 40), (1, 4, 5)), dim=8)
    reducer = Ward(num_merged=300)
    with LargestTensor() as largest:
        found = reducer.assign(tokens, evidence, "decoder_input")
    assert largest.numel <= 2 * 1024 * 1200
    monkeypatch.setattr(agglomeration, "_BLOCK_ROWS", 100)
    in_small_blocks = reducer.assign(tokens, evidence, "decoder_input")
    assert torch.equal(found.kept_K, in_small_blocks.kept_K)
    assert torch.equal(found.source_E, in_small_blocks.source_E)


@pytest.mark.parametrize(("proportional", "biased"), [({}, True), ({"proportional_attention": False}, False)])
def test_blocks_behind_attend_by_log_size_unless_told_otherwise(proportional, biased):
    reducer = {"kind": "ward", "num_merged": 20, **proportional}
    plan = ReductionPlan.model_validate({"steps": [{"stage": "vision_block", "layers": [0], "reducer": reducer}]})
    tokens, _ = ragged(56, ((1, 6, 6),) * 2)
    reduction = VisionReduction(plan, tokens.lengths, tokens.coord_T3, num_blocks=2, has_cls=False)
    reduction.at(0, tokens.hidden_TD, None, None, scale=1.0)
    assert (reduction.key_bias_T is not None) == biased
    if biased:
        assert_close(reduction.key_bias_T.exp().view(2, 16).sum(1), torch.full((2,), 36.0))
