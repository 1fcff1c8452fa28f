"""First logits of a tiny model in half precision: ours with the operations of a GPU, stock's, and the exact ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from illava import VLM, Request, load_preprocessor
from illava.decoder import decoder as decoder_module
from illava.decoder.joined_linears import products
from illava.plan import EMPTY_PLAN
from tests.support.models.families import make_folder, stock_class
from tests.support.models.stock_parity import prefill, prompt_of

StockInputs = Callable[[VLM, Request], dict[str, Any]]  # what stock takes for a request


@torch.inference_mode()
def first_logits(
    model_type: str, folder: Path, dtype: torch.dtype, stock_inputs: StockInputs, prepare: Callable[[VLM], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ours, stock's, and stock's in float32 on the same rounded weights: float32 [V] each, behind a picture and words.

    Queries, keys and values are one product, and so are gates and up-projection, as on CUDA; ``prepare`` does the rest.
    """
    name = str(make_folder(model_type, folder))
    picture = np.random.default_rng(5).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    request = Request("fused", (load_preprocessor(name).images([picture])[0], "What is this?"))
    stock, exact = (stock_class(model_type).from_pretrained(name, dtype=dtype).eval() for _ in range(2))
    with mock.patch.object(decoder_module, "products", lambda linears, *, join: products(linears, join=True)):
        ours = VLM.from_pretrained(name, dtype=dtype, kv_cache_bytes=8 << 20)
    inputs = stock_inputs(ours, request)
    halves = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    expected = stock(**halves).logits[0, -1].float(), exact.float()(**inputs).logits[0, -1]
    prepare(ours)
    return prefill(ours, [prompt_of(ours, request, EMPTY_PLAN)], EMPTY_PLAN).logits_BV[0].float(), *expected


def check_roundings(fused_V: Tensor, stock_V: Tensor, exact_V: Tensor, *, bound: float) -> None:
    """Fused operations are half as near to the exact logits as stock at least, and within a bound of stock, by norms.

    The first is the reason for the second: what half precision's roundings cost either side. Fused operations round
    where the borrowed modules do, or once less; each rounding that falls the other way moves all that is behind it by
    no more than stock's own roundings did.
    """
    noise, ours, apart = (
        float((one - other).norm() / exact_V.norm())
        for one, other in ((stock_V, exact_V), (fused_V, exact_V), (fused_V, stock_V))
    )
    assert noise < bound, f"stock itself is {noise:.1e} off"
    assert ours < 2 * noise, f"{ours:.1e} off, stock {noise:.1e}"
    assert apart < bound, f"{apart:.1e} from stock"
