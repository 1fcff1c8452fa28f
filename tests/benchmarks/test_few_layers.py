"""The few layers that `make demo` measures: merging makes them faster, and the line says what they are."""

from __future__ import annotations

import pytest

from benchmarks.speed.few_layers import measure_few_layers
from tests.support.timing import holds_in_one_of_three


@pytest.mark.long  # about 15 s of one core
def test_merging_makes_layers_of_a_true_shape_faster() -> None:
    found = []

    def faster(_: int) -> None:
        found.append(measure_few_layers(0.0))
        assert found[-1].ratio > 1.05

    holds_in_one_of_three(faster)
    assert found[-1].num_turns == 1
    said = str(found[-1])
    assert "8 of the 26 tower blocks and 4 of the 24 language-model layers of LLaVA-OneVision 0.5B" in said
    assert f"random weights, preset illava-video: {found[-1].ratio:.2f}x as fast (one turn, " in said
