"""What holds for every test of the package: no answer of a model hangs on a near-tie."""

from __future__ import annotations

import pytest

from tests.support.closeness import no_near_ties


@pytest.fixture(autouse=True)
def _no_near_ties():
    with no_near_ties():
        yield
