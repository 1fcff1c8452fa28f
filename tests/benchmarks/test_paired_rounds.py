"""What rounds of two sides let one say."""

import pytest

from benchmarks.common.paired_rounds import by_turns, spread


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.2, 1.3, 1.25, 1.1, 1.4, 1.2], "faster"),
        ([0.8, 0.7, 0.75, 0.9, 0.85, 0.8], "slower"),
        ([0.9, 1.1, 1.05, 0.95, 1.0, 1.02], "no difference seen"),
        ([1.2, 1.3], "too few rounds to say"),
    ],
)
def test_the_verdict_follows_the_interval(ratios, verdict):
    found = spread(ratios)
    assert found["verdict"] == verdict
    assert found["min"] <= found["low"] <= found["median"] <= found["high"] <= found["max"]


def test_every_other_round_is_reversed():
    order: list[str] = []
    by_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == list("abbaab")
