"""A model in bfloat16 over packed weights is as near to float32 as over plain ones, and holds each once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from illava import VisualInput, load_preprocessor
from illava.attention import bfloat16_cpu
from illava.decoder.onednn_linears import serves
from illava.families import load_family
from illava.families.base import Family
from illava.plan import EMPTY_PLAN
from tests.support.models.text_logits import text_logits
from tests.support.processors import pretend_processor

if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    pytest.skip("torch has no bfloat16 products of oneDNN on this processor", allow_module_level=True)

# Both sides round as often; one draw of roundings against another differs by some per cent over a thousand entries.
NEARLY = 1.5


@torch.inference_mode()
def computed(family: Family, video: VisualInput) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a video, and logits behind as many tokens as are attended in blocks."""
    (encoded,) = family.encode([video], EMPTY_PLAN, trace=False)
    return encoded.feature_KD.float(), text_logits(family, num_tokens=70)


def test_packed_products_are_as_near_to_float32_as_plain_ones(onevision_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(bfloat16_cpu, "_FEWEST_TOKENS", 16)
    draw = np.random.default_rng(0)
    video = load_preprocessor(str(onevision_folder)).video(draw.integers(0, 256, (4, 80, 80, 3), dtype=np.uint8))
    exact = computed(load_family(str(onevision_folder), dtype=torch.float32, device="cpu"), video)
    errors = {}
    for native in (False, True):
        pretend_processor(monkeypatch, tmp_path, native_bfloat16=native)
        family = load_family(str(onevision_folder), dtype=torch.bfloat16, device="cpu")
        found = computed(family, video)
        errors[native] = [float((got - want).pow(2).mean().sqrt()) for got, want in zip(found, exact, strict=True)]
        linears = [*family.decoder.linears(), *family.tower.linears()]
        assert all(serves(one) == native for one in linears)
        held = {one.weight.numel() > 0 for one in linears if one is not family.decoder.lm_head}
        assert held == {not native}, "a plain weight goes as soon as it is packed"
    assert errors[True] != errors[False]
    for packed, plain in zip(errors[True], errors[False], strict=True):
        assert packed < NEARLY * plain
