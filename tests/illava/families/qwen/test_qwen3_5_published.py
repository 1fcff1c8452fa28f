"""Published sizes of Qwen3.5: built on the meta device, their weight names map, and a request's memory is counted.

About 2 s. Sizes as published in each repository's config.json; no weights were loaded.
"""

import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from illava.decoder.decoder import Decoder
from illava.families.qwen.hybrid_layers import read_hybrid_layers
from illava.families.qwen.qwen3_vl import Qwen3VLTower
from illava.model_files import JsonSection, ModelFiles
from tests.support.models.families import stock_class
from tests.support.models.published_qwen import QWEN3_VISION
from tests.support.models.qwen3_5 import make_qwen3_5

VISION = {key: value for key, value in QWEN3_VISION.items() if key != "deepstack_visual_indexes"}


def text(hidden, intermediate, layers, heads, value_heads):
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "vocab_size": 248320,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    }


# model: text model, MB of recurrent states a request in bfloat16, kB of keys and values a token
PUBLISHED = {
    "Qwen3.5-9B": (text(4096, 12288, 32, 16, 32), 51.5, 32.8),
    "Qwen3.5-27B": (text(5120, 17408, 64, 24, 48), 153.9, 65.5),
}
# Names in the published files; those of `mtp`, which drafts tokens, are left out by transformers.
NAMES = {
    "model.visual.patch_embed.proj.bias",
    "model.visual.pos_embed.weight",
    "model.visual.blocks.N.mlp.linear_fc1.weight",
    "model.visual.merger.linear_fc2.bias",
    "model.language_model.embed_tokens.weight",
    "model.language_model.layers.N.input_layernorm.weight",
    "model.language_model.layers.N.linear_attn.A_log",
    "model.language_model.layers.N.linear_attn.conv1d.weight",
    "model.language_model.layers.N.linear_attn.dt_bias",
    "model.language_model.layers.N.linear_attn.in_proj_a.weight",
    "model.language_model.layers.N.linear_attn.in_proj_b.weight",
    "model.language_model.layers.N.linear_attn.in_proj_qkv.weight",
    "model.language_model.layers.N.linear_attn.in_proj_z.weight",
    "model.language_model.layers.N.linear_attn.norm.weight",
    "model.language_model.layers.N.linear_attn.out_proj.weight",
    "model.language_model.layers.N.self_attn.q_norm.weight",
    "model.language_model.layers.N.self_attn.q_proj.weight",
    "model.language_model.norm.weight",
    "lm_head.weight",
}


def without_numbers(keys):
    return {re.sub(r"\.\d+(?=\.)", ".N", key) for key in keys}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_qwen3_5(tmp_path_factory.mktemp("qwen3_5"), num_layers=2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_build_with_the_names_that_load(name, folder):
    own, state_mb, kv_kb = PUBLISHED[name]
    vision = VISION | {"out_hidden_size": own["hidden_size"]}
    config = AutoConfig.for_model("qwen3_5", text_config=own, vision_config=vision, tie_word_embeddings=False)
    with torch.device("meta"):
        model = stock_class("qwen3_5")(config).eval()
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = without_numbers(file.keys())
    assert stored >= NAMES
    assert without_numbers(model.state_dict()) == stored
    decoder, tower = Decoder(model.model.language_model, model.lm_head), Qwen3VLTower(model.model.visual)
    assert tower.num_blocks == 27
    assert decoder.kv_layers == tuple(range(3, own["num_hidden_layers"], 4))
    files = ModelFiles("", folder, JsonSection("config.json", {"text_config": own}), JsonSection("", {}))
    hybrid = read_hybrid_layers(files)
    assert (hybrid.attention_layers, hybrid.state_shape) == (decoder.kv_layers, decoder.state_shape)
    # 48 or 24 layers, each 32 or 48 matrices of 128 x 128 in float32, and 3 inputs of the convolution
    assert hybrid.state_shape.num_bytes(2) / 1e6 == pytest.approx(state_mb, abs=0.05)
    assert 2 * 2 * len(decoder.kv_layers) * decoder.num_kv_heads * decoder.head_dim / 1e3 == pytest.approx(
        kv_kb, abs=0.05
    )
