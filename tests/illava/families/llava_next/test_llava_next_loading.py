"""LLaVA-NeXT around its features: the published shapes and weight names, chat formats, what is refused in words."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from illava.errors import ModelLoadError, PlanError
from illava.families import load_family, load_preprocessor
from illava.families.chat_prompt import ChatPrompt
from illava.families.llava.next import LlavaNext
from illava.families.model_shape import load_model_shape
from illava.plan import EMPTY_PLAN, ReductionPlan, preset
from illava.preprocess import VisualInput
from tests.support.closeness import assert_close
from tests.support.models.llava_next import IN_ORDER, MISTRAL, VICUNA, make_llava_next
from tests.support.models.onevision import _tokenizer
from tests.support.models.published_llava import BOTH, LLM_LAYER, edit, module_name, published_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llava_next(tmp_path_factory.mktemp("next"))


@pytest.fixture(scope="module")
def family(folder):
    return load_family(str(folder), dtype=torch.float32, device="cpu")


# Published checkpoints

# Names in the published shards (llava-hf/llava-v1.6-*) outside the tower's blocks
TOWER = ["embeddings.class_embedding", "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"]
TOWER += [f"{x}.{end}" for x in ("pre_layrnorm", "post_layernorm") for end in BOTH]
NAMES = {"tower": TOWER, "llm_layer": LLM_LAYER}
# config.json of the published checkpoints as far as it bears on shapes; what is left out is its class's default.
VICUNA_7B = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
MISTRAL_7B = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32064,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
YI_34B = VICUNA_7B | {
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "rope_theta": 5000000.0,
    "vocab_size": 64064,
}
TOWER_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}


@pytest.mark.parametrize(
    ("text", "num_layers", "billions"),
    [(VICUNA_7B, 32, 7.06), (MISTRAL_7B, 32, 7.57), (VICUNA_13B, 40, 13.35), (YI_34B, 60, 34.75)],
    ids=["vicuna-7b", "mistral-7b", "vicuna-13b", "34b"],
)
def test_published_shapes_map_and_fit(folder, tmp_path, text, num_layers, billions):
    for path in folder.glob("*.json"):
        shutil.copy(path, tmp_path)
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config = {"model_type": "llava_next", "image_grid_pinpoints": pinpoints, "image_token_index": 32000}
    config |= {"text_config": text, "vision_config": TOWER_336, "vision_feature_layer": -2}
    config |= {"vision_feature_select_strategy": "default"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    edit(tmp_path / "preprocessor_config.json", image_grid_pinpoints=pinpoints, **sizes)

    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(LlavaNextConfig.from_pretrained(tmp_path))
    flat = not hasattr(model.model.vision_tower, "vision_model")
    expected = {module_name(name, flat_tower=flat) for name in published_names(num_layers, 24, **NAMES)}
    assert set(model.state_dict()) == expected
    assert sum(value.numel() for value in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)

    family = LlavaNext(model, _tokenizer(), load_preprocessor(str(tmp_path)))
    shape = load_model_shape(str(tmp_path))
    assert (family.num_vision_blocks, family.decoder.num_layers) == (23, num_layers)
    assert (shape.num_vision_blocks, shape.num_decoder_layers) == (23, num_layers)
    family.check(preset("illava-next-image"))
    family.check(preset("illava-2026"))
    with pytest.raises(PlanError, match="288 of 576 are left; 256 or 289 would be one"):
        family.check(preset("illava-next-image", layout="released"))


def test_weights_under_their_published_names_load(folder, family, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "model")
    weights = {
        name if "vision_tower.vision_model" in name else name.replace("vision_tower.", "vision_tower.vision_model."): x
        for name, x in load_file(folder / "model.safetensors").items()
    }
    assert set(weights) == published_names(4, 8, **NAMES)
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    again = load_family(str(copied), dtype=torch.float32, device="cpu")
    tiles = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    mm_item = VisualInput("image", tiles, (48, 96))
    (first,), (second,) = (f.encode([mm_item], EMPTY_PLAN, trace=False) for f in (family, again))
    assert_close(first.feature_KD, second.feature_KD)
    ids = torch.tensor([3, 1, 200])
    assert torch.equal(family.embed(ids), again.embed(ids))


# Chat formats


def chat(template: str, *, adds_bos: bool = False) -> tuple[ChatPrompt, object]:
    tokenizer = _tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds_bos:
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return ChatPrompt(tokenizer, {"image": tokenizer.convert_tokens_to_ids("<image>")}), tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (VICUNA, "<s>USER: <image><image><image>\n<image><image>\nWho  and   that? ASSISTANT:"),
        (MISTRAL, "<s>[INST] <image><image><image>\n<image><image>\nWho and  that? [/INST]"),
        (
            IN_ORDER,
            "<s><|im_start|>user\nWho<image><image><image> and <image><image> that?<|im_end|><|im_start|>assistant\n",
        ),
    ],
    ids=["vicuna", "mistral", "34b"],
)
@pytest.mark.parametrize("written", [True, False], ids=["bos in the template", "bos by the tokenizer"])
def test_a_prompt_begins_once_and_follows_its_template(template, expected, written):
    prompt, tokenizer = chat("<s>" * written + template, adds_bos=True)
    image = VisualInput("image", np.zeros((2, 48, 48, 3), np.uint8), (48, 48))
    rendered = prompt.render(("Who", image, " and ", image, " that?"), [3, 2])
    assert tokenizer.decode(rendered.token_ids) == expected
    for (start, length), count in zip(rendered.spans, (3, 2), strict=True):
        assert length == count
        assert {tokenizer.convert_ids_to_tokens(n) for n in rendered.token_ids[start : start + length]} == {"<image>"}


BROKEN_TEMPLATES = [
    "{% if %}",
    "{{ nobody.knows }}",
    "{{ 1 // 0 }}",
    "{{ raise_exception('text alone') }}",
    "{{ 1 + 'x' }}",
]


@pytest.mark.parametrize("template", BROKEN_TEMPLATES)
def test_a_chat_template_that_cannot_be_rendered_is_told_as_the_model_s(template):
    prompt, _ = chat(template)
    with pytest.raises(ModelLoadError, match="the model's chat template cannot be rendered"):
        prompt.render(("Who?",), [])


# Refusals


def step(stage: str, layers: list[int] | None = None, **reducer) -> dict:
    return {"stage": stage, "layers": layers or [], "reducer": {"kind": "illava", **reducer}}


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"layout": "released", "steps": [step("vision_block", [2], num_merged=5)]}, "31 of 36 are left; 25 or 36"),
        ({"steps": [step("vision_block", [7], num_merged=5)]}, "this tower runs blocks 0 to 6"),
        ({"steps": [step("vision_block", [1, 2, 3], num_merged=30)]}, "would leave 1 of 1 tokens per tile"),
        ({"steps": [step("decoder_layer", [4], num_merged=5)]}, "the last is 3"),
        ({"steps": [step("decoder_input", keep_per_frame=9)]}, "llava_next has none"),
        ({"steps": [step("decoder_layer", [1], keep_per_frame=9)]}, "llava_next has none"),
    ],
)
def test_plans_that_do_not_fit_are_refused_in_words(family, plan, words):
    with pytest.raises(PlanError, match=words):
        family.check(ReductionPlan.model_validate(plan))


def test_plans_that_fit_are_accepted(family):
    square = {"layout": "released", "steps": [step("vision_block", [1, 2, 3, 4], num_merged=5)]}
    for plan in ({}, square, {"steps": [step("decoder_input", keep_ratio=0.5)]}):
        family.check(ReductionPlan.model_validate(plan))


def test_cls_attention_is_refused_where_a_tower_has_no_cls(onevision_folder):
    reducer = {"kind": "prumerge", "saliency": "cls_attention"}
    plan = ReductionPlan.model_validate({"steps": [{"stage": "vision_block", "layers": [2], "reducer": reducer}]})
    with pytest.raises(PlanError, match="needs cls_attention: not known in this tower"):
        load_family(str(onevision_folder), dtype=torch.float32, device="cpu").check(plan)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("config.json", {"vision_feature_select_strategy": "full"}, "keeps the CLS token"),
        ("config.json", {"vision_feature_layer": [-2, -1]}, "several hidden states"),
        ("config.json", {"vision_feature_layer": -20}, "asks for hidden state"),
        ("config.json", {"image_grid_pinpoints": [[48, 50]]}, "canvas 48x50"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 56}}, "takes 48x48 px"),
        ("preprocessor_config.json", {"crop_size": {"height": 40, "width": 40}}, "takes 48x48 px"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop: False"),
        ("preprocessor_config.json", {"image_grid_pinpoints": [[48, 48]]}, "differ in 'image_grid_pinpoints'"),
    ],
)
def test_models_this_family_cannot_run_are_refused(folder, tmp_path, name, changes, words):
    copied = shutil.copytree(folder, tmp_path / "model")
    edit(copied / name, **changes)
    with pytest.raises(ModelLoadError, match=words):
        load_family(str(copied), dtype=torch.float32, device="cpu")


def test_another_tower_is_refused():
    siglip = SimpleNamespace(model_type="siglip_vision_model")
    config = SimpleNamespace(vision_config=siglip, vision_feature_select_strategy="default", vision_feature_layer=-2)
    with pytest.raises(ModelLoadError, match="supported is 'clip_vision_model'"):
        LlavaNext(SimpleNamespace(config=config), None, None)
