"""What holds for every test of the package: no answer of a model hangs on a near-tie."""

from __future__ import annotations

import pytest

from illava.engine import batching
from tests.support.closeness import near_ties


@pytest.fixture(autouse=True)
def _no_near_ties():
    """Random weights draw near-ties too, and last digits would decide them: then another fixture must be chosen."""
    draw_tokens, found = batching.draw_tokens, []

    def watched(logits_BV, batch, draws):
        drawn = draw_tokens(logits_BV, batch, draws)
        found.extend(near_ties(logits_BV, batch, draws))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "draw_tokens", watched)
        yield
    assert not found, f"near-ties decide this test's answers ({', '.join(found)}): choose another seed"
