"""Published InternVL sizes: their configurations build on the meta device with the names that load from a tiny folder.

About 3 s of `make test`.
"""

import json
import re
from collections import Counter

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from illava.families import load_family, load_preprocessor
from illava.plan import preset
from tests.support.models.families import stock_class
from tests.support.models.internvl import LARGE_TOWER, make_internvl

SMALL = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SMALL |= {"attention_bias": True, "norm_type": "layer_norm", "use_qk_norm": False}
LARGE = {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25}
LARGE |= LARGE_TOWER


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
VOCABULARY = {"vocab_size": 151936, "eos_token_id": 151645}


def three(*sizes):
    rope = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    return {"model_type": "qwen2", **dict(zip(SIZES, sizes, strict=True)), **VOCABULARY, "rope_scaling": rope}


def later(*sizes):
    return {"model_type": "qwen3", **dict(zip(SIZES, sizes, strict=True)), **VOCABULARY, "head_dim": 128}


PUBLISHED = {
    "InternVL3-1B-hf": (SMALL, three(896, 4864, 24, 14, 2)),
    "InternVL3-2B-hf": (SMALL, three(1536, 8960, 28, 12, 2)),
    "InternVL3-8B-hf": (SMALL, three(3584, 18944, 28, 28, 4)),
    "InternVL3-14B-hf": (SMALL, three(5120, 13824, 48, 40, 8)),
    "InternVL3-38B-hf": (LARGE, three(5120, 27648, 64, 40, 8)),
    "InternVL3-78B-hf": (LARGE, three(8192, 29568, 80, 64, 8)),
    "InternVL3_5-1B-HF": (SMALL, later(1024, 3072, 28, 16, 8)),
    "InternVL3_5-2B-HF": (SMALL, later(2048, 6144, 28, 16, 8)),
    "InternVL3_5-4B-HF": (SMALL, later(2560, 9728, 36, 32, 8)),
    "InternVL3_5-8B-HF": (SMALL, later(4096, 12288, 36, 32, 8)),
    "InternVL3_5-14B-HF": (SMALL, later(5120, 17408, 40, 40, 8)),
    "InternVL3_5-38B-HF": (LARGE, later(5120, 25600, 64, 64, 8)),
}
NAMES = {  # in the published files, which transformers wrote before it had `model.` in front
    "vision_tower.embeddings.cls_token",
    "vision_tower.embeddings.patch_embeddings.projection.weight",
    "vision_tower.encoder.layer.N.lambda_1",
    "vision_tower.encoder.layer.N.attention.projection_layer.bias",
    "multi_modal_projector.linear_1.weight",
    "language_model.model.layers.N.self_attn.q_proj.weight",
}


def names(keys):
    """Names with their numbers left out, and how often each occurs."""
    return Counter(re.sub(r"\.\d+(?=\.)", ".N", key) for key in keys)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny folder of each kind of tower and decoder."""
    made = {}

    def folder(vision, text):
        kind = (vision["use_qk_norm"], text["model_type"])
        if kind not in made:
            own = {key: vision[key] for key in ("attention_bias", "norm_type", "use_qk_norm")}
            text = {"model_type": text["model_type"]} | ({"head_dim": 8} if "head_dim" in text else {})
            made[kind] = make_internvl(tmp_path_factory.mktemp("internvl"), vision=own, text=text)
        return made[kind]

    return folder


# About 0.3 s each; two towers and two decoders in `make test`.
@pytest.mark.parametrize(
    "model_id",
    [
        name if name in ("InternVL3-38B-hf", "InternVL3_5-8B-HF") else pytest.param(name, marks=pytest.mark.long)
        for name in PUBLISHED
    ],
)
def test_published_sizes_build_with_the_names_that_load(model_id, tiny):
    vision, text = PUBLISHED[model_id]
    folder = tiny(vision, text)
    small = load_family(str(folder), dtype=torch.float32, device="cpu")
    token_id = small._tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = AutoConfig.for_model("internvl", vision_config=vision, text_config=text, image_token_id=token_id)
    with torch.device("meta"):
        model = stock_class("internvl")(config).eval()
    family = type(small)(model, small._tokenizer, load_preprocessor(str(folder)))
    assert family.num_vision_blocks == vision["num_hidden_layers"]
    assert family.decoder.num_layers == text["num_hidden_layers"]
    family.check(preset("illava-2026"))
    loaded = names(stock_class("internvl").from_pretrained(folder).state_dict())
    theirs = names(model.state_dict())
    assert set(theirs) == set(loaded)
    for key, count in theirs.items():
        if ".language_model.layers." in key:
            assert count == text["num_hidden_layers"] * (loaded[key] // 4)
        elif ".encoder.layer." in key:
            assert count == vision["num_hidden_layers"] * (loaded[key] // 6)


def test_an_output_projection_in_the_files_is_taken_though_the_configuration_does_not_say_so(tmp_path):
    """The class ties weights unless config.json says otherwise, and the published one may not."""
    folder = make_internvl(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    (folder / "config.json").write_text(json.dumps(config))
    family = load_family(str(folder), dtype=torch.float32, device="cpu")
    with safe_open(folder / "model.safetensors", "pt") as file:
        (name,) = (key for key in file.keys() if key.endswith("lm_head.weight"))  # noqa: SIM118
        assert torch.equal(family.decoder.lm_head.weight, file.get_tensor(name))
    assert not torch.equal(family.decoder.lm_head.weight, family._embedding.weight)


def test_a_folder_holds_the_published_names(tiny):
    """`save_pretrained` writes the published layout, and the parity tests load it: so does `load_family`."""
    with safe_open(tiny(*PUBLISHED["InternVL3-8B-hf"]) / "model.safetensors", "pt") as file:
        assert set(names(file.keys())) >= NAMES
