"""Of every registered family: what writes a tiny random folder of it, and the stock class beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from illava.families import FAMILIES, load_part
from tests.support.models.internvl import make_internvl
from tests.support.models.llava_next import make_llava_next
from tests.support.models.onevision import make_onevision
from tests.support.models.qwen import make_qwen2_5_vl, make_qwen2_vl, make_qwen3_vl
from tests.support.models.qwen3_5 import make_qwen3_5
from tests.support.models.qwen_moe import make_qwen3_vl_moe

MAKERS: dict[str, Callable[..., Path]] = {
    "llava_onevision": make_onevision,
    "llava_next": make_llava_next,
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "internvl": make_internvl,
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "qwen3_5": make_qwen3_5,
}
QWEN = tuple(name for name in MAKERS if name.startswith("qwen"))
EXPERTS = ("qwen3_vl_moe",)  # whose decoder routes tokens to experts


def stock_class(model_type: str) -> Any:
    """The class of transformers whose modules the family borrows."""
    return load_part(FAMILIES[model_type].family).model_class


def make_folder(model_type: str, folder: Path) -> Path:
    """A tiny random model of this family."""
    return MAKERS[model_type](folder)
