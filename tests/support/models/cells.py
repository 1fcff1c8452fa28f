"""The families that a test of all families runs over: the later ones in `make test-long`, to keep `make test` short.

Each of these has a test file of its own with its cells in `make test`; registry and loading are tested of all there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.models.families import MAKERS

# Two blocks of the small tower of each family that reads videos, where a plan may reduce.
TOWER_BLOCKS = {
    "llava_onevision": (2, 5),
    "qwen2_vl": (1, 3),
    "qwen2_5_vl": (1, 3),
    "qwen3_vl": (1, 3),
    "qwen3_vl_moe": (1, 3),
    "qwen3_5": (1, 3),
    "internvl": (1, 3),
}
IN_MAKE_TEST = ("llava_onevision", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def family_params(names: Iterable[str] = MAKERS, *, in_make_test: Iterable[str] = IN_MAKE_TEST) -> list[Any]:
    """Parameters of pytest, one a family."""
    quick = set(in_make_test)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]
