"""Qwen3-VL-MoE: published sizes and names, experts among plain layers against stock transformers, no captured steps.

All other tests of the Qwen families run over it in `make test-long`. About 5 s of `make test`.
"""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.decoder import cuda_graphs
from illava.errors import ModelLoadError
from illava.plan import EMPTY_PLAN, ReductionPlan, preset
from tests.support.closeness import assert_close
from tests.support.models.families import stock_class
from tests.support.models.published_qwen import QWEN3_VISION, check_published_names, names
from tests.support.models.qwen_moe import make_qwen3_vl_moe
from tests.support.models.stock_parity import longer, prefill, prompt_of

pytestmark = pytest.mark.numeric


def published(hidden, layers, heads, experts_width):
    text = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "eos_token_id": 151645,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": experts_width,
        "norm_topk_prob": True,
    }
    return {
        "text_config": text,
        "vision_config": {**QWEN3_VISION, "out_hidden_size": hidden},
        "tie_word_embeddings": False,
    }


PUBLISHED = {
    "Qwen3-VL-30B-A3B-Instruct": published(2048, 48, 32, 768),
    "Qwen3-VL-235B-A22B-Instruct": published(4096, 94, 64, 1536),
}
NAMES = {
    "model.visual.deepstack_merger_list.N.norm.weight",
    "model.language_model.layers.N.self_attn.q_norm.weight",
    "model.language_model.layers.N.mlp.gate.weight",
    "model.language_model.layers.N.mlp.experts.gate_up_proj",
    "model.language_model.layers.N.mlp.experts.down_proj",
    "lm_head.weight",
}


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_published_sizes_build_with_the_names_that_load(model_id, tmp_path):
    family = check_published_names("qwen3_vl_moe", PUBLISHED[model_id], make_qwen3_vl_moe(tmp_path, num_layers=3))
    family.check(preset("illava-qwen2-vl"))
    family.check(preset("illava-2026"))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(names(file.keys())) >= NAMES
        stored = {key.split(".")[-1]: file.get_slice(key).get_shape() for key in file.keys() if ".0.mlp.exp" in key}  # noqa: SIM118
    assert stored == {"gate_up_proj": [4, 64, 96], "down_proj": [4, 48, 64]}  # as published, inputs first


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Experts in layers 0, 1 and 3, a plain MLP in layer 2; its stock model; a batch of an image, a video and text."""
    folder = str(make_qwen3_vl_moe(tmp_path_factory.mktemp("moe"), dense_layers=[2]))
    stock = stock_class("qwen3_vl_moe").from_pretrained(folder, dtype=torch.float32).eval()
    pre, rng = load_preprocessor(folder), np.random.default_rng(4)
    image = pre.images([rng.integers(0, 256, (40, 66, 3), dtype=np.uint8)])[0]
    clip = pre.video([rng.integers(0, 256, (24, 40, 3), dtype=np.uint8) for _ in range(6)], timestamps_s=range(6))
    content = ((image, "What?"), ("See", clip, "what happens?"), ("Only words.",))
    sampling = SamplingParams(max_new_tokens=4)
    requests = [Request(str(n), parts, sampling) for n, parts in enumerate(content)]
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), stock, requests


@torch.inference_mode()
def test_experts_and_plain_layers_in_one_batch_equal_stock(mixed):
    vlm, stock, requests = mixed
    leads = []
    for layer in stock.model.language_model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(lambda _m, _a, out: leads.append(out[0].softmax(-1).sort(-1).values))
    prompts = [prompt_of(vlm, request, EMPTY_PLAN) for request in requests]
    together = prefill(vlm, prompts, EMPTY_PLAN).logits_BV
    for row, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        media = request.media
        tokens = vlm.family.render(request.content, [vlm.family.num_vision_tokens(m) for m in media]).token_ids
        ids = torch.tensor([tokens])
        config = stock.config
        types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        for mm_item in media:
            pixels, grid = vlm.family.encoder.patches(mm_item), vlm.family.encoder.grid(mm_item)
            ending = "_videos" if mm_item.kind == "video" else ""
            inputs[f"pixel_values{ending}"] = pixels
            inputs[f"{mm_item.kind}_grid_thw"] = torch.tensor([[grid.times, grid.rows, grid.cols]])
        expected = stock(**inputs).logits[0, -1]
        assert_close(prefill(vlm, [prompt], EMPTY_PLAN).logits_BV[0], expected)
        assert_close(together[row], expected)
        assert prompt.num_tokens == len(tokens)
    assert len(leads) == 3 * len(requests)
    # no router is so near a tie between the last expert it takes and the next that rounding would choose
    assert min(float((shares[:, 2] - shares[:, 1]).min()) for shares in leads) > 3e-5


@torch.inference_mode()
def test_under_a_plan_a_batch_is_its_items_alone_and_cached_is_recomputed(mixed):
    vlm, _, requests = mixed
    illava = {"kind": "illava", "keep_ratio": 0.7}
    steps = [{"stage": "vision_block", "layers": [1, 3], "reducer": illava}]
    steps.append({"stage": "decoder_layer", "layers": [1, 2], "reducer": illava})
    plan = ReductionPlan(steps=steps)
    together = vlm.generate(requests, plan=plan)
    for batched, request in zip(together, requests, strict=True):
        (alone,) = vlm.generate([request], plan=plan)
        assert (alone.error, batched.error) == (None, None)
        assert batched.token_ids == alone.token_ids
        assert batched.usage == alone.usage
    prompt, text = prompt_of(vlm, requests[0], EMPTY_PLAN), vlm.generate([requests[0]])[0].token_ids
    for token, following in pairwise(text):
        prompt = longer(vlm, prompt, token)
        assert int(prefill(vlm, [prompt], EMPTY_PLAN).logits_BV[0].argmax()) == following


def test_steps_of_experts_are_not_captured(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "can_capture", lambda device: True)
    decoder = SimpleNamespace(device=torch.device("cuda"), has_experts=True)
    assert not cuda_graphs.captures_steps(decoder)
    with pytest.raises(ModelLoadError, match=r"experts are not captured.*decode_graphs=None"):
        cuda_graphs.DecodeGraphs(decoder, None, None, draw=None, max_batch=1)
