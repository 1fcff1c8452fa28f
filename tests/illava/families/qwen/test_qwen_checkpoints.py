"""Published Qwen-VL sizes: their configurations build on the meta device, and their weight names map.

What the tiny models of the parity tests load and run must be what the published ones hold: the same names, deeper.
"""

import pytest
from safetensors import safe_open

from illava.errors import PlanError
from illava.plan import preset
from tests.support.models.families import MAKERS
from tests.support.models.published_qwen import QWEN3_VISION, check_published_names, names

_QWEN2_VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
}
_QWEN2_TEXT = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "eos_token_id": 151645,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}


def _qwen2(hidden, intermediate, layers, heads, kv_heads, *, vocab, tied, **vision):
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab}
    return {**_QWEN2_TEXT, **sizes, "tie_word_embeddings": tied, "max_window_layers": layers, "vision_config": vision}


# As published: flat, with the text model's keys beside `vision_config`.
PUBLISHED = {
    "Qwen2-VL-2B-Instruct": (
        "qwen2_vl",
        _qwen2(1536, 8960, 28, 12, 2, vocab=151936, tied=True, hidden_size=1536, **_QWEN2_VISION),
    ),
    "Qwen2-VL-7B-Instruct": (
        "qwen2_vl",
        _qwen2(3584, 18944, 28, 28, 4, vocab=152064, tied=False, hidden_size=3584, **_QWEN2_VISION),
    ),
}
_QWEN25_VISION = {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
}
PUBLISHED |= {
    "Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        _qwen2(2048, 11008, 36, 16, 2, vocab=151936, tied=True, out_hidden_size=2048, **_QWEN25_VISION),
    ),
    "Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        _qwen2(3584, 18944, 28, 28, 4, vocab=152064, tied=False, out_hidden_size=3584, **_QWEN25_VISION),
    ),
}


def _qwen3(hidden, intermediate, layers, heads, kv_heads, *, tied, **vision):
    text = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "eos_token_id": 151645,
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "tie_word_embeddings": tied,
    }
    return {"text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


# Depth 24 and width 1024 of the two smaller ones' towers, 27 and 1152 of the largest's.
_QWEN3_SMALL = QWEN3_VISION | {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
PUBLISHED |= {
    "Qwen3-VL-2B-Instruct": (
        "qwen3_vl",
        _qwen3(2048, 6144, 28, 16, 8, tied=True, out_hidden_size=2048, **_QWEN3_SMALL),
    ),
    "Qwen3-VL-4B-Instruct": (
        "qwen3_vl",
        _qwen3(2560, 9728, 36, 32, 8, tied=True, out_hidden_size=2560, **_QWEN3_SMALL),
    ),
    "Qwen3-VL-8B-Instruct": (
        "qwen3_vl",
        _qwen3(4096, 12288, 36, 32, 8, tied=False, out_hidden_size=4096, **QWEN3_VISION),
    ),
}
# Names in the published files.
NAMES = {
    "qwen2_vl": {
        "visual.patch_embed.proj.weight",
        "visual.blocks.N.attn.qkv.weight",
        "visual.blocks.N.mlp.fc1.bias",
        "visual.merger.ln_q.weight",
        "visual.merger.mlp.N.weight",
        "model.embed_tokens.weight",
        "model.layers.N.self_attn.q_proj.bias",
        "model.layers.N.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    },
}
NAMES["qwen3_vl"] = {
    "model.visual.patch_embed.proj.bias",
    "model.visual.pos_embed.weight",
    "model.visual.blocks.N.mlp.linear_fc1.weight",
    "model.visual.deepstack_merger_list.N.norm.weight",
    "model.visual.merger.linear_fc2.bias",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.N.self_attn.q_norm.weight",
    "lm_head.weight",
}
NAMES["qwen2_5_vl"] = NAMES["qwen2_vl"] - {"visual.blocks.N.mlp.fc1.bias"} | {"visual.blocks.N.mlp.gate_proj.bias"}

NAMES["qwen3_5"] = {"model.language_model.layers.N.linear_attn.A_log"}  # all of them: test_qwen3_5_published.py


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folders = {}

    def folder(model_type):
        if model_type not in folders:
            folders[model_type] = MAKERS[model_type](tmp_path_factory.mktemp(model_type), num_layers=3)
        return folders[model_type]

    return folder


@pytest.mark.parametrize("model_id", PUBLISHED)
def test_published_configurations_build_with_the_names_that_load(model_id, tiny):
    model_type, published = PUBLISHED[model_id]
    family = check_published_names(model_type, published, tiny(model_type))
    if model_type == "qwen2_5_vl":
        family.check(preset("illava-qwen2.5-vl"))
        with pytest.raises(PlanError, match=r"blocks \[5, 6, 8\], which attend within windows"):
            family.check(preset("illava-2026"))
    else:
        family.check(preset("illava-qwen2-vl"))
        family.check(preset("illava-2026"))


@pytest.mark.parametrize("model_type", NAMES)
def test_a_folder_holds_the_published_names(model_type, tiny):
    """`save_pretrained` writes the published layout, and the parity tests load it: so does `load_family`."""
    with safe_open(tiny(model_type) / "model.safetensors", "pt") as file:
        assert NAMES[model_type] <= set(names(file.keys()))
