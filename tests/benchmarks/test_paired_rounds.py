"""What rounds of two sides let one say."""

import pytest

from benchmarks.common.machine import require_native_products
from benchmarks.common.paired_rounds import DisturbedRoundsError, by_turns, quiet_rounds, spread
from illava import devices


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


def rounds_of(**seconds):
    """What `quiet_rounds` makes of these seconds, round by round, of which it needs three."""
    given = {name: iter(of_side) for name, of_side in seconds.items()}
    sides = {name: lambda name=name: next(given[name]) for name in seconds}
    return quiet_rounds(sides, 3, seconds=float, most_tries=len(next(iter(seconds.values()))))


def test_a_round_in_which_one_side_was_disturbed_is_refused_and_measured_again():
    kept = rounds_of(stock=[10.0, 10.9, 10.5, 12.0, 10.2], empty=[5.0, 5.6, 5.4, 5.1, 5.2])
    assert kept == {"stock": [10.0, 10.5, 10.2], "empty": [5.0, 5.4, 5.2]}
    quick = rounds_of(stock=[10.0, 10.1, 10.2, 99.0], empty=[5.0, 5.1, 5.2, 99.0])
    assert len(quick["stock"]) == 3, "no round more than is needed"


def test_a_late_fast_round_shows_that_those_before_it_were_disturbed():
    kept = rounds_of(stock=[12.0, 12.1, 10.0, 10.1, 10.2], empty=[5.0] * 5)
    assert kept["stock"] == [10.0, 10.1, 10.2]


def test_rounds_that_scatter_are_refused_and_not_reported():
    with pytest.raises(DisturbedRoundsError, match=r"of 4 rounds 2 .* within 10% .*, 3 are needed .*stock 1\.30x"):
        rounds_of(stock=[10.0, 13.0, 12.0, 10.5], empty=[5.0, 5.1, 5.0, 5.1])


@pytest.mark.parametrize(("flags", "shown"), [("fpu avx512_bf16", True), ("fpu amx_bf16", True), ("avx512f", False)])
def test_bfloat16_is_shown_where_the_processor_multiplies_it(tmp_path, monkeypatch, flags, shown):
    monkeypatch.delenv("ILLAVA_NATIVE_BFLOAT16")
    (tmp_path / "cpuinfo").write_text(f"model name\t: x\nflags\t\t: {flags}\n")
    monkeypatch.setattr(devices, "_CPUINFO", str(tmp_path / "cpuinfo"))
    devices.has_native_bfloat16.cache_clear()
    require_native_products("float32")
    require_native_products("bfloat16", "cuda")
    if shown:
        require_native_products("bfloat16")
    else:
        with pytest.raises(SystemExit, match=r"cannot be shown here: .* no native bfloat16"):
            require_native_products("bfloat16")
