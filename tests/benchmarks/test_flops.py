"""Counted FLOPs against torch's own counter on a real run of every family."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.speed.flops import LayerShape, decode_flops, num_weights, prefill_flops, tower_flops
from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.decoder.prefill import PrefillRun
from illava.families.qwen.encoder import patch_places
from illava.plan import EMPTY_PLAN
from tests.support.models.families import MAKERS

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


def tower_layers(tower):
    layers = []
    for block in tower._blocks:
        attention = block.self_attn if hasattr(block, "self_attn") else block.attn
        layers.append(LayerShape.of(attention, block.mlp, width=attention.num_heads * attention.head_dim))
    return layers


def tower_of(family, medium, plan):
    """Shapes and counts of one image's way through the tower."""
    tower, encoder = family.tower, family.encoder
    layers, patches = tower_layers(tower), family.num_patches(medium)
    if hasattr(family, "geometry") and hasattr(encoder, "_projector"):
        per_tile = [family.geometry.grid**2]
        for n in range(tower.num_blocks):
            per_tile.append(per_tile[-1] - (8 if n in plan.layers("vision_block") else 0))
        tiles, cls = len(medium.tiles), int(tower.has_cls)
        lengths = [[n + cls] * tiles for n in per_tile[:-1]]
        left = [(n + cls) * tiles for n in per_tile[1:]]
        embed = num_weights(tower._embeddings.patch_embedding)
        ends = [(embed, patches), (num_weights(encoder._projector), per_tile[-1] * tiles)]
        return layers, lengths, left, ends
    grid = encoder.grid(medium)
    whole = [grid.rows * grid.cols] * grid.times
    full = getattr(tower, "full_blocks", range(tower.num_blocks))
    windows = patch_places(grid)
    windows[:, 1:] //= getattr(tower, "window_patches", 1)
    windowed = list(Counter(map(tuple, windows.tolist())).values())
    lengths = [whole if n in full else windowed for n in range(tower.num_blocks)]
    mergers = [tower._merger, *getattr(tower, "_deepstack", {}).values()]
    ends = [(num_weights(tower._patch_embed), patches)]
    ends += [(num_weights(matrix), grid.num_groups) for merger in mergers for matrix in linears(merger)]
    return layers, lengths, [patches] * tower.num_blocks, ends


def linears(module):
    return [part for part in module.modules() if isinstance(part, torch.nn.Linear)]


@pytest.mark.parametrize(
    ("name", "plan"), [*((name, EMPTY_PLAN) for name in MAKERS), ("llava_onevision", REDUCED)], ids=[*MAKERS, "reduced"]
)
def test_counted_flops_are_what_torch_counts(name, plan, tmp_path, monkeypatch):
    folder = str(MAKERS[name](tmp_path))
    vlm = VLM.from_pretrained(folder, kv_cache_bytes=8 << 20)
    picture = np.random.default_rng(3).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    (image,) = load_preprocessor(folder).images([picture])
    stages = Stages(vlm, monkeypatch)
    vlm.submit(Request("a", (image, "What?"), SamplingParams(max_new_tokens=3, min_new_tokens=3)), plan=plan)
    vlm.step()
    lengths = [[n] for n in vlm.engine._running[0].lengths]
    family, decoder = vlm.family, vlm.family.decoder
    layers, segments, left, ends = tower_of(family, image, plan)
    text = [LayerShape.of(x.self_attn, x.mlp, width=x.self_attn.q_proj.out_features) for x in decoder.layers]
    head = num_weights(decoder.lm_head)
    scored = plan.layers("vision_block")
    assert stages.seen["encode"] == pytest.approx(
        tower_flops(layers, segments, left, scored=scored, ends=ends), rel=0.02
    )
    assert stages.seen["prefill"] == pytest.approx(prefill_flops(text, lengths, head=head), rel=0.02)
    after = [[n + 1] for (n,) in lengths]
    assert stages.seen["decode"] == pytest.approx(decode_flops(text, after, head=head), rel=0.02)
    assert all(a >= b for (a,), (b,) in pairwise(lengths))
