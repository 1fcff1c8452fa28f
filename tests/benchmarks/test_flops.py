"""FLOPs counted on meta tensors against the same counter on a real run."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.speed.flops import decode_flops, prefill_flops, tower_flops
from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.decoder.prefill import PrefillRun
from illava.plan import EMPTY_PLAN
from tests.support.models.onevision import make_onevision

REDUCED = ReductionPlan.model_validate(
    {
        "steps": [
            {"stage": "vision_block", "layers": [2, 3], "reducer": {"kind": "illava", "num_merged": 8}},
            {
                "stage": "decoder_layer",
                "layers": [2],
                "reducer": {"kind": "illava", "keep_ratio": 0.5, "score": "released"},
            },
        ]
    }
)


def cpu_attention(q, k, v, *_, **__):
    return sdpa_flop_count(q, k, v)


class Stages:
    """FLOPs seen in the tower, in prefill and in the first decode step of a request."""

    def __init__(self, vlm, monkeypatch):
        self.seen = Counter()
        owners = {"encode": vlm.family, "prefill": PrefillRun, "decode": vlm.family.decoder}
        for name, owner in owners.items():
            attribute = "advance" if name == "prefill" else name
            monkeypatch.setattr(owner, attribute, self._counted(name, getattr(owner, attribute)))

    def _counted(self, name, call):
        def run(*args, **options):
            result, counted = self._count(call, *args, **options)
            self.seen[name] = self.seen[name] or counted
            return result

        return run

    @staticmethod
    def _count(call, *args, **options):
        mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            result = call(*args, **options)
        return result, counter.get_total_flops()


@pytest.mark.parametrize("plan", [EMPTY_PLAN, REDUCED], ids=["whole", "reduced"])
def test_flops_on_meta_tensors_are_those_of_a_real_run(plan, tmp_path, monkeypatch):
    folder = str(make_onevision(tmp_path))
    vlm = VLM.from_pretrained(folder, kv_cache_bytes=8 << 20)
    picture = np.random.default_rng(3).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    (image,) = load_preprocessor(folder).images([picture])
    stages = Stages(vlm, monkeypatch)
    vlm.submit(Request("a", (image, "What?"), SamplingParams(max_new_tokens=3, min_new_tokens=3)), plan=plan)
    vlm.step()
    lengths = [[n] for n in vlm.engine._running[0].lengths]
    family, decoder = vlm.family, vlm.family.decoder
    scored = plan.layers("vision_block")
    counts = [family.geometry.grid**2]
    for n in range(family.tower.num_blocks):
        counts.append(counts[-1] - (8 if n in scored else 0))
    counted = tower_flops(family, len(image.tiles), counts, scored=scored)
    assert stages.seen["encode"] == pytest.approx(counted, rel=0.02)
    assert stages.seen["prefill"] == pytest.approx(prefill_flops(decoder, lengths), rel=0.02)
    after = [[n + 1] for (n,) in lengths]
    assert stages.seen["decode"] == pytest.approx(decode_flops(decoder, after), rel=0.02)
    assert all(a >= b for (a,), (b,) in pairwise(lengths))
    assert (lengths[-1] < lengths[0]) == (plan is REDUCED)
