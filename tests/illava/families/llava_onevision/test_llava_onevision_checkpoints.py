"""Published LLaVA-OneVision sizes: built on the meta device, their weights' names, presets, and tied embeddings."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from illava.errors import PlanError
from illava.families import load_family, load_preprocessor
from illava.families.llava.onevision import LlavaOnevision
from illava.families.model_shape import load_model_shape
from illava.plan import preset
from tests.support.models.published_llava import BOTH, LLM_LAYER, edit, module_name, published_names

# Names in the published shards (llava-hf/llava-onevision-qwen2-*-ov-hf) outside the tower's blocks
TOWER = ["embeddings.position_embedding.weight"]
TOWER += [f"{x}.{end}" for x in ("embeddings.patch_embedding", "post_layernorm") for end in BOTH]
NAMES = {"tower": TOWER, "llm_layer": [*LLM_LAYER, *(f"self_attn.{x}_proj.bias" for x in "qkv")]}
# config.json of the published checkpoints as far as it bears on shapes; what is left out is its class's default. The
# vocabulary is Qwen2's and three more, rounded up to 64 rows, as transformers' conversion script leaves it.
QWEN2_7B = {
    "model_type": "qwen2",
    "eos_token_id": 151645,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 152128,
}
QWEN2_HALF_B = QWEN2_7B | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 152000,
}
QWEN2_72B = QWEN2_7B | {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
}
PUBLISHED = {"0.5b": (QWEN2_HALF_B, 0.89), "7b": (QWEN2_7B, 8.03), "72b": (QWEN2_72B, 73.18)}
TOWER_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_shapes_map_and_fit(onevision_folder, tmp_path, size):
    text, billions = PUBLISHED[size]
    for path in onevision_folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    pinpoints = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
    edit(
        tmp_path / "config.json",
        image_grid_pinpoints=pinpoints,
        text_config=text,
        tie_word_embeddings=text["tie_word_embeddings"],
        vision_config=TOWER_384,
        vision_feature_layer=-1,
    )
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        edit(tmp_path / name, size={"height": 384, "width": 384})
    edit(tmp_path / "preprocessor_config.json", image_grid_pinpoints=pinpoints)

    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig.from_pretrained(tmp_path))
    model.tie_weights()
    flat = not hasattr(model.model.vision_tower, "vision_model")
    assert set(model.state_dict()) == {
        module_name(name, flat_tower=flat) for name in published_names(text["num_hidden_layers"], 26, **NAMES)
    }
    assert sum(value.numel() for value in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)

    tokenizer = load_family(str(onevision_folder), dtype=torch.float32, device="cpu")._tokenizer
    family = LlavaOnevision(model, tokenizer, load_preprocessor(str(tmp_path)))
    shape = load_model_shape(str(tmp_path))
    assert (family.num_vision_blocks, family.decoder.num_layers) == (26, text["num_hidden_layers"])
    assert (shape.num_vision_blocks, shape.num_decoder_layers) == (26, text["num_hidden_layers"])
    for name in ("illava-paper", "illava-image", "illava-video", "illava-draw", "illava-draw-video", "illava-2026"):
        family.check(preset(name))
    with pytest.raises(PlanError, match="478 of 729 are left; 441 or 484 would be one"):
        family.check(preset("illava-2026", layout="released"))


@pytest.mark.parametrize("top_level", [True, False])
def test_tied_embeddings_need_no_head_in_the_shards(onevision_folder, tmp_path, top_level):
    """The 0.5B's text model ties its head to its embeddings; the configuration around it may say so or not."""
    folder = shutil.copytree(onevision_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"tie_word_embeddings": True}
    edit(folder / "config.json", text_config=text, tie_word_embeddings=top_level)
    weights = load_file(folder / "model.safetensors")
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    embedding = next(name for name in weights if name.endswith("embed_tokens.weight"))
    del weights[head]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    family = load_family(str(folder), dtype=torch.float32, device="cpu")
    hidden_1D = torch.eye(32)[:1]
    # one product and zeros: no sum whose order could matter
    assert torch.equal(family.decoder.lm_head(hidden_1D), hidden_1D @ weights[embedding].T)
