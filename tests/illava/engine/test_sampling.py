"""Draws that depend on their own row and seed alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from illava.engine.sampling import SamplingBatch, check_sampling, draw_tokens, uniform_draw
from illava.errors import RequestError
from illava.requests import SamplingParams, derive_seed

pytestmark = pytest.mark.numeric

GREEDY = SamplingParams()
LOUD = SamplingParams(logprobs=True)
HOT = SamplingParams(temperature=0.8, top_p=0.9)


def sample(logits, params, draws):
    batch = SamplingBatch.of(params, logits.device)
    tokens, finite = draw_tokens(logits, batch, [draws[row] for row in batch.random]).tolist()
    return tokens, [bool(flag) for flag in finite]


def test_drawing_waits_for_nothing():
    with FakeTensorMode():  # raises on whatever a device would have to be asked for
        batch = SamplingBatch.of([HOT, GREEDY, HOT], torch.device("cpu"))
        drawn = draw_tokens(torch.randn(3, 50), batch, [0.1, 0.7])
        told = draw_tokens(torch.randn(3, 50), SamplingBatch.of([LOUD] * 3, torch.device("cpu")), [])
    assert (tuple(drawn.shape), tuple(told.shape)) == ((2, 3), (3, 3))


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
    ],
)
def test_parameters_without_meaning_are_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        check_sampling(SamplingParams(**changes))
