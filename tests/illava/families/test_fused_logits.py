"""The whole model with a GPU's operations in bfloat16 against stock: joined products, norms that round once.

On CUDA without Triton norms are `torch.nn.functional.rms_norm`, which rounds once where the borrowed module rounds
twice; that and the joined products run here in their place. The Triton kernels run in float16 under the interpreter
(tests/support/kernels/interpreted.py), on a GPU in both (benchmarks/speed/gpu_correctness.py). In float32 nothing is
fused, and the parity tests of every family hold 1e-5.
"""

import pytest
import torch

from illava.decoder import layer_ops
from tests.illava.families import test_vlm_parity as tiled
from tests.illava.families.qwen import test_qwen_parity as native
from tests.support.models.fused_logits import check_roundings, first_logits

pytestmark = pytest.mark.numeric

BOUND = (
    2**-4
)  # of the logits' norm; stock itself is up to 2^-5.5 off: a hundred roundings of 2^-9 in a row, as they fall


def norms_round_once(vlm):
    changed = 0
    for module in (*vlm.family.decoder.layers, vlm.family.decoder.norm, *vlm.family.tower._blocks):
        for norm in module.modules():
            if layer_ops._is_known(norm):
                norm.forward = lambda x, n=norm: torch.nn.functional.rms_norm(
                    x, x.shape[-1:], n.weight, n.variance_epsilon
                )
                changed += 1
    assert changed > 2 * len(vlm.family.decoder.layers)


@pytest.mark.parametrize(
    ("model_type", "stock_inputs"),
    [("llava_onevision", tiled.stock_inputs), ("qwen2_vl", native.stock_inputs), ("qwen3_vl", native.stock_inputs)],
    ids=["llava_onevision", "qwen2_vl", "qwen3_vl"],
)
def test_bfloat16_logits_are_stock_s_up_to_roundings(model_type, stock_inputs, tmp_path):
    found = first_logits(model_type, tmp_path, torch.bfloat16, stock_inputs, norms_round_once)
    check_roundings(*found, bound=BOUND)
    assert not torch.equal(found[0], found[1])  # something else ran
