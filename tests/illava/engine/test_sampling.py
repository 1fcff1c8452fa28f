"""Draws that depend on their own row and seed alone."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from illava.engine import batching
from illava.engine.nucleus import FIRST, limited
from illava.engine.penalties import History
from illava.engine.sampling import (
    SamplingBatch,
    check_sampling,
    draw_tokens,
    own_first_tokens,
    uniform_draw,
)
from illava.errors import RequestError
from illava.requests import SamplingParams, derive_seed
from tests.support.operations import Operations

pytestmark = pytest.mark.numeric

GREEDY = SamplingParams()
LOUD = SamplingParams(logprobs=True)
HOT = SamplingParams(temperature=0.8, top_p=0.9)
CPU = torch.device("cpu")
HISTORIES = [History((1, 2, 2, 7), (3, 3, 5)), History(), History((4,), (0, 0, 0, 9, 4)), History((11,))]
PENALISED = {
    "repetition": {"repetition_penalty": 1.4},
    "rewarded repetition": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 0.7},
    "frequency": {"frequency_penalty": -0.3},
    "all three": {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.2},
}


def sample(logits, params, draws):
    batch = SamplingBatch.of(params, logits.device)
    tokens, finite = draw_tokens(logits, batch, [draws[row] for row in batch.random]).tolist()
    return tokens, [bool(flag) for flag in finite]


def test_drawing_waits_for_nothing():
    with FakeTensorMode():  # raises on whatever a device would have to be asked for
        batch = SamplingBatch.of([HOT, GREEDY, HOT], torch.device("cpu"))
        drawn = draw_tokens(torch.randn(3, 50), batch, [0.1, 0.7])
        told = draw_tokens(torch.randn(3, 50), SamplingBatch.of([LOUD] * 3, torch.device("cpu")), [])
        every = SamplingParams(
            temperature=1.0, top_k=4, min_p=0.1, repetition_penalty=1.2, frequency_penalty=0.1, logprobs=True
        )
        of_all = SamplingBatch.of(
            [every, GREEDY, HOT], CPU, histories=lambda row: HISTORIES[row], choice_ids=[((1, 2), (3,)), (), ()]
        )
        all_told = draw_tokens(torch.randn(3, 50), of_all, [0.1, 0.7])
        of_all.count(all_told[0])
        draw_tokens(torch.randn(3, 50), of_all, [0.1, 0.7])
    assert (tuple(drawn.shape), tuple(told.shape), tuple(all_told.shape)) == ((2, 3), (3, 3), (5, 3))


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(stop=("x",)), SamplingParams(loop_tokens=256, on_loop="cut")], ids=str
)
def test_greedy_rows_cost_what_they_cost_before_there_were_other_keys(params):
    """The largest logit and whether all are finite, and nothing else: stop texts and loops are the host's."""
    logits, token_B = torch.randn(3, 50), torch.zeros(3, dtype=torch.long)
    batch = SamplingBatch.of([params] * 3, CPU)
    with Operations() as drawing:
        draw_tokens(logits, batch, [])
        batch.count(token_B)
    with Operations() as before:
        wanted = logits.float()
        torch.stack([wanted.argmax(-1), wanted.isfinite().all(-1).long()])
    assert sorted(drawing.names) == sorted(before.names)


def test_random_rows_without_limits_cost_no_more_than_before():
    """Of 27c8a0a: the nucleus alone. An operation more would show in the count of another key's cost."""
    counts = {}
    for name, changes in {"plain": {}, "limited": {"top_k": 5}, "penalised": {"presence_penalty": 0.1}}.items():
        batch = SamplingBatch.of([SamplingParams(temperature=0.8, top_p=0.9, **changes)] * 3, CPU)
        with Operations() as drawing:
            draw_tokens(torch.randn(3, 50), batch, [0.1] * 3)
        counts[name] = drawing.names
    assert "aten.where.self" not in counts["plain"]
    assert "aten.split.Tensor" in counts["limited"]
    assert "aten.scatter_add.default" in counts["penalised"]


def test_greedy_takes_the_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, [GREEDY, GREEDY], [0.9, 0.9]) == ([1, 0], [True, True])


def test_a_draw_follows_the_cumulative_probability_of_the_nucleus():
    probability = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    params = SamplingParams(temperature=1.0, top_p=0.8)  # nucleus .5, .25, .15: mass .9
    cases = {0.0: 1, 0.54: 1, 0.56: 3, 0.83: 3, 0.84: 2, 0.9999999: 2}
    for draw, token in cases.items():
        assert sample(probability.log(), [params], [draw])[0] == [token]


def test_shares_follow_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0])
    draws = [uniform_draw(3, "item", step) for step in range(4000)]
    params = SamplingParams(temperature=2.0)
    tokens, _ = sample(logits.expand(4000, 3), [params] * 4000, draws)
    share = torch.bincount(torch.tensor(tokens), minlength=3) / 4000
    torch.testing.assert_close(share, (logits / 2).softmax(0), atol=0.03, rtol=0)


def test_a_rows_draw_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    params = [HOT, GREEDY, SamplingParams(temperature=1.5), HOT, GREEDY, SamplingParams(temperature=1e-30)]
    draws = [uniform_draw(0, str(row), 4) for row in range(6)]
    together, _ = sample(logits, params, draws)
    alone = [sample(logits[n : n + 1], [params[n]], [draws[n]])[0][0] for n in range(6)]
    assert together == alone
    assert together[5] == logits[5].argmax()


@pytest.mark.parametrize("changes", PENALISED.values(), ids=PENALISED)
def test_penalties_are_those_of_the_field(changes):
    logits = torch.randn(4, 12)
    params = SamplingParams(**changes)
    batch = SamplingBatch.of([params] * 4, CPU, histories=lambda row: HISTORIES[row])
    found = batch.penalties.apply(logits)
    for row, history in enumerate(HISTORIES):
        read = torch.tensor([[*history.prompt, *history.answer]], dtype=torch.long)
        expected = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(read, logits[row : row + 1].clone())[0]
        for token in set(history.answer):
            expected[token] -= params.presence_penalty + params.frequency_penalty * history.answer.count(token)
        torch.testing.assert_close(found[row], expected)


def test_what_was_drawn_counts_from_the_next_token_on():
    logits = torch.zeros(2, 6)
    params = [SamplingParams(frequency_penalty=1.0), GREEDY]
    batch = SamplingBatch.of(params, CPU, histories=lambda row: History((5,), (1,)))
    drawn = []
    for _ in range(6):
        token_B = draw_tokens(logits, batch, [])[0]
        batch.count(token_B)
        drawn.append(token_B.tolist())
    again = SamplingBatch.of(params, CPU, histories=lambda row: History((5,), (1, *(tokens[0] for tokens in drawn))))
    assert [tokens[0] for tokens in drawn][:5] == [0, 2, 3, 4, 5], "each once, and what stood before not at all"
    assert {tokens[1] for tokens in drawn} == {0}
    assert torch.equal(batch.penalties.apply(logits), again.penalties.apply(logits))


@pytest.mark.parametrize(
    ("changes", "warpers"),
    [
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"top_k": 5, "top_p": 0.7}, [TopKLogitsWarper(5), TopPLogitsWarper(0.7)]),
        ({"top_k": 4, "min_p": 0.3}, [MinPLogitsWarper(0.3), TopKLogitsWarper(4)]),
        ({"top_k": 1}, [TopKLogitsWarper(1)]),
    ],
    ids=["top_k", "min_p", "top_k top_p", "min_p top_k", "top_k 1"],
)
def test_what_may_be_drawn_is_what_transformers_leaves(changes, warpers):
    logits = torch.randn(1, 20)
    left = logits.clone()
    for warper in warpers:
        left = warper(None, left)
    order = left[0].argsort(descending=True, stable=True)
    edges = left[0].softmax(-1)[order].cumsum(-1)
    params = SamplingParams(temperature=1.0, **changes)
    draws = [number / 997 for number in range(997)] + [0.99999994]
    tokens, _ = sample(logits.expand(len(draws), 20), [params] * len(draws), draws)
    clear = [n for n, draw in enumerate(draws) if (edges - draw).abs().min() > 1e-5 or draw > 0.9999]
    expected = [int(order[min(int((edges <= draws[n]).sum()), int(left.isfinite().sum()) - 1)]) for n in clear]
    assert [tokens[n] for n in clear] == expected


def test_rows_of_all_kinds_in_one_batch_draw_what_they_draw_alone():
    """To the last bit: a row's limits and penalties are no other row's."""
    params = [
        GREEDY,
        HOT,
        SamplingParams(temperature=0.9, top_k=3),
        SamplingParams(temperature=1.1, min_p=0.2, top_p=0.8),
        *(SamplingParams(**changes) for changes in PENALISED.values()),
        *(SamplingParams(temperature=0.7, top_k=6, **changes) for changes in PENALISED.values()),
        LOUD,
    ]
    histories = [HISTORIES[row % 4] for row in range(len(params))]
    for seed in range(20):
        torch.manual_seed(seed)
        logits = torch.randn(len(params), 40)
        batch = SamplingBatch.of(params, CPU, histories=histories.__getitem__)
        draws = {row: uniform_draw(seed, str(row), 0) for row in range(len(params))}
        together = draw_tokens(logits, batch, [draws[row] for row in batch.random])
        for row, own in enumerate(params):
            alone = SamplingBatch.of([own], CPU, histories=lambda _, row=row: histories[row])
            drawn = draw_tokens(logits[row : row + 1], alone, [draws[row]] if alone.random else [])
            assert drawn[0, 0] == together[0, row]
            if own.penalised:
                mixed = batch.penalties.apply(logits)[row]
                assert torch.equal(alone.penalties.apply(logits[row : row + 1])[0], mixed)


def test_a_row_without_limits_keeps_its_very_numbers_beside_one_that_has_some():
    """A sum of probabilities is 1 but for rounding: not to be multiplied by."""
    probability = torch.randn(50, 300).softmax(-1).sort(-1, descending=True).values
    top_p = torch.full((50, 1), 0.9)
    unlimited = torch.tensor([[float("inf"), 0.0]] * 49 + [[3.0, 0.0]])
    kept, scaled = limited(probability, top_p, unlimited)
    assert torch.equal(kept[:49], probability[:49])
    assert torch.equal(scaled[:49], top_p[:49])
    assert (int((kept[49] > 0).sum()), bool(scaled[49] < 0.9)) == (3, True)


def test_a_token_that_begins_two_options_tells_nothing_of_either():
    firsts = {"A": 1, " A": 9, "B": 2, " B": 9, "(B": None, "b": 2}
    assert own_first_tokens([("A", " A"), ("B", " B", "(B", "b")], firsts.__getitem__) == ((1,), (2,))


def test_a_row_that_is_not_finite_is_named_and_harms_no_other():
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0], [0.0, float("inf")], [2.0, 1.0]])
    tokens, finite = sample(logits, [HOT] * 4, [0.999, 0.5, 0.5, 0.0])
    assert finite == [True, False, False, True]
    assert (tokens[0], tokens[3]) == (0, 0)


def test_seeds_are_fixed_for_ever():
    assert derive_seed(0, "a", 1) == 5640247956467711177
    assert len({uniform_draw(s, r, n) for s in range(3) for r in "ab" for n in range(5)}) == 30
    assert derive_seed(1, "1a") != derive_seed("11", "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"stop": ("",)}, "empty text"),
        ({"loop_tokens": 7}, "loop_tokens"),
        ({"on_loop": "retry"}, "on_loop must be one of stop, cut, keep"),
        ({"choices": (("A",), ("B",))}, "logprobs=True"),
    ],
)
def test_parameters_without_meaning_are_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        check_sampling(SamplingParams(**changes))


KINDS = {
    "top_p": {"top_p": 0.9},
    "all": {},
    "top_k": {"top_k": 50},
    "top_k beyond": {"top_k": 1500},
    "min_p": {"min_p": 0.05, "top_p": 0.95},
    "min_p of all": {"min_p": 1e-9},
}


def rows_of_a_large_vocabulary(sharpness):
    """A few thousand logits of two digits in bfloat16: many are equal, as a model's are."""
    return (torch.randn(1, 4000) * sharpness).bfloat16().float()


@pytest.mark.parametrize(
    ("sharpness", "decided"), [(0.3, {"top_k"}), (4.0, {"top_p", "top_k", "min_p"})], ids=["flat", "sharp"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_most_probable_tokens_decide_is_what_the_whole_row_decides(kind, sharpness, decided):
    """Every draw, over the whole range. Of a flat row these tokens hold too little, and so the draw says."""
    logits, params = rows_of_a_large_vocabulary(sharpness), SamplingParams(temperature=1.0, **KINDS[kind])
    draws = [(n + 0.37) / 400 for n in range(400)] + [0.0, 1 - 2**-24]
    batch = SamplingBatch.of([params] * len(draws), CPU)
    logits = logits.expand(len(draws), -1)
    whole, few = draw_tokens(logits, batch, draws), draw_tokens(logits, batch, draws, first=FIRST)
    # a token's edge may lie elsewhere in a sum of another order
    moved = [[min(max(draw + by, 0.0), 1 - 2**-24) for draw in draws] for by in (-1e-6, 1e-6)]
    clear = torch.stack([draw_tokens(logits, batch, one)[0] == whole[0] for one in moved]).all(0)
    certain = few[1] == 1
    assert clear.float().mean() > 0.9
    assert torch.equal(few[0][certain & clear], whole[0][certain & clear])
    assert bool(certain.all()) == (kind in decided)


def test_a_draw_that_the_most_probable_tokens_do_not_decide_is_made_over_the_whole_row(monkeypatch):
    flat, sharp = rows_of_a_large_vocabulary(0.3), rows_of_a_large_vocabulary(4.0)
    asked = []

    def watched(logits_BV, batch, draws, **options):
        asked.append(options)
        return draw_tokens(logits_BV, batch, draws, **options)

    monkeypatch.setattr(batching, "draw_tokens", watched)
    group = [SimpleNamespace(request_id=str(n), token_ids=[]) for n in range(3)]
    batch = SamplingBatch.of([HOT, GREEDY, HOT], CPU)
    for logits, expected in ((sharp, [{"first": FIRST}]), (flat, [{"first": FIRST}, {}])):
        asked.clear()
        drawn = batching.sample_next_token(logits.expand(3, -1), batch, group)
        assert asked == expected
        assert drawn[1].tolist() == [1, 1, 1]
        draws = [uniform_draw(0, name, 0) for name in "02"]
        assert torch.equal(drawn, draw_tokens(logits.expand(3, -1), batch, draws))
    asked.clear()
    batching.sample_next_token(flat.expand(3, -1), SamplingBatch.of([GREEDY] * 3, CPU), group)
    batching.sample_next_token(flat[:, :FIRST].expand(3, -1), batch, group)
    assert asked == [{}, {}], "greedy rows and small vocabularies ask for nothing"


def test_draws_from_the_most_probable_tokens_have_the_shares_of_the_nucleus():
    """4,000 draws of one sharp row against the probabilities of its nucleus: within five standard deviations."""
    logits, params = rows_of_a_large_vocabulary(4.0), SamplingParams(temperature=1.0, top_p=0.9)
    draws = [uniform_draw(5, "item", step) for step in range(4000)]
    drawn = draw_tokens(logits.expand(4000, -1), SamplingBatch.of([params] * 4000, CPU), draws, first=FIRST)
    left = TopPLogitsWarper(0.9)(None, logits)[0].softmax(-1)
    share = torch.bincount(drawn[0], minlength=4000) / 4000
    assert (drawn[1] == 1).all()
    assert ((share - left).abs() <= 5 * (left * (1 - left) / 4000).sqrt() + 1e-6).all()
