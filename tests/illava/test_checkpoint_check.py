"""Checkpoints whose files hold no plain weights: refused by what the JSON says, and by what the tensors are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file, save_file

from illava import VLM
from illava.errors import ModelLoadError
from illava.families import load_family, load_preprocessor
from illava.families.model_shape import load_model_shape
from illava.families.text_scorer import RelevanceModel
from illava.reducers.clip_crop import ClipScorer
from tests.support.models.clip import make_clip
from tests.support.models.published_llava import edit
from tests.support.models.quantised_models import (
    FLOAT8,
    INT4,
    PUBLISHED,
    READ,
    declared,
    fp8_alone,
    int8,
    make_quantised,
    put_json,
    store_layers,
)

INSTEAD = "take the unquantised repository"
NVFP4 = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
BY_GROUP_ORDER = INT4.model_copy(update={"actorder": "group"})


def compressed_groups(*groups) -> dict:
    """Several schemes in one checkpoint, of which transformers would take the first for all layers."""
    sections = [declared(args, "x")["config_groups"]["group_0"] for args in groups]
    return declared(groups[0], "mixed") | {"config_groups": dict(enumerate(sections))}


@pytest.fixture
def folder(onevision_folder, tmp_path):
    return shutil.copytree(onevision_folder, tmp_path / "model")


def refused_by_config(folder, words) -> None:
    """Wherever a model's config.json is read first: to load, to prepare media, to count tokens."""
    for read in (VLM.from_pretrained, load_preprocessor, load_model_shape):
        with pytest.raises(ModelLoadError, match=words):
            read(str(folder))


def load(folder):
    return load_family(str(folder), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("method", PUBLISHED)
def test_a_published_quantised_checkpoint_is_refused_by_its_methods_name(onevision_folder, tmp_path, method):
    folder = make_quantised(onevision_folder, tmp_path / "model", method)
    refused_by_config(folder, rf"config\.json: quantization_config: .* quantised by {method}, .*{INSTEAD}")


@pytest.mark.parametrize("method", PUBLISHED)
def test_and_by_its_tensors_where_config_json_is_silent(onevision_folder, tmp_path, method):
    folder = make_quantised(onevision_folder, tmp_path / "model", method)
    edit(folder / "config.json", quantization_config=None)
    with pytest.raises(ModelLoadError, match=rf"tensors of .* belong to quantised weights, e\.g\. .*{INSTEAD}"):
        load(folder)


@pytest.mark.parametrize(("store", "dtype"), [(int8, "I8"), (fp8_alone, "F8_E4M3")])
def test_numbers_without_a_scale_are_told_by_their_dtype(folder, store, dtype):
    """Same names and shapes as plain weights: transformers casts them, and nothing is missing."""
    store_layers(folder, store)
    with pytest.raises(ModelLoadError, match=rf"28 tensors of .*_proj\.weight' in {dtype}, .*{INSTEAD}"):
        load(folder)


@pytest.mark.parametrize("name", ["fp8", "compressed-fp8"])
def test_numbers_without_a_scale_are_refused_under_a_scheme_that_is_read(folder, name):
    store_layers(folder, fp8_alone)
    edit(folder / "config.json", quantization_config=READ[name][1])
    with pytest.raises(ModelLoadError, match=r"28 tensors of .*_proj\.weight' in F8_E4M3"):
        load(folder)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quantization_config": {"quant_method": "torchao", "quant_type": {}}}, "by torchao"),
        ({"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}, "by mxfp4"),
        ({"quantization_config": {"quant_method": "sevenbit"}}, "by sevenbit"),
        ({"quantization_config": {"load_in_8bit": True}}, "by bitsandbytes"),
        ({"quantization_config": {"bits": 3}}, "by a method it leaves open"),
        ({"quantization_config": {}}, "by a method it leaves open"),
        ({"quantization_config": "fp8"}, "by 'fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}}, "by fp8 of another kind .*ue8m0"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "by compressed-tensors with 0 config_groups"),
        ({"quantization_config": compressed_groups(INT4, FLOAT8)}, "by compressed-tensors with 2 config_groups"),
        (
            {"quantization_config": declared(FLOAT8, "float-quantized", kv_cache_scheme={"num_bits": 8})},
            "kv_cache_scheme",
        ),
        ({"quantization_config": declared(FLOAT8, "x", sparsity_config={"format": "sparse-24"})}, "sparsity_config"),
        ({"quantization_config": declared(NVFP4, "nvfp4-pack-quantized")}, r"in nvfp4-pack-quantized \(float4\)"),
        ({"quantization_config": declared(BY_GROUP_ORDER, "pack-quantized")}, r"pack-quantized \(int4, actorder group"),
        ({"compression_config": {"format": "float-quantized"}}, r"compression_config: .* by compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"json: quantization: .* by mlx"),
    ],
)
def test_whatever_else_config_json_declares_is_refused(folder, section, words):
    edit(folder / "config.json", **section)
    refused_by_config(folder, rf"{words}.*{INSTEAD}")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_part_of_the_model_that_is_quantised_is_found(folder, part):
    config = json.loads((folder / "config.json").read_text())
    nested = config[part] | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    edit(folder / "config.json", **{part: nested})
    refused_by_config(folder, rf"config\.json: {part}\.quantization_config: .* by awq")


@pytest.mark.parametrize(
    ("name", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "awq"),
        ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "FP8"),
    ],
)
def test_the_quantisers_own_files_beside_config_json_are_read(folder, name, content, method):
    put_json(folder, name, content)
    refused_by_config(folder, rf"{name}: the weights are quantised by {method},")


def test_an_adapter_is_refused_with_or_without_a_config_of_its_own(folder):
    put_json(folder, "adapter_config.json", {"base_model_name_or_path": "org/base", "peft_type": "LORA", "r": 8})
    words = r"adapter_config\.json: an adapter of org/base, which would be left out; name the base model in"
    refused_by_config(folder, words)
    (folder / "config.json").unlink()
    refused_by_config(folder, words)


def test_weights_under_another_name_are_refused(folder):
    edit(folder / "config.json", transformers_weights="adapter.safetensors")
    refused_by_config(folder, "transformers_weights names other files")


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("lora_A.default.weight", r"1 tensors of .* are an adapter's, e\.g\. '.*lora_A"),
        ("bias", r"1 tensors of .* belong to no weight of the model .* e\.g\. .*o_proj\.bias'.* would be left out"),
    ],
)
def test_tensors_that_no_weight_of_the_model_takes_are_refused(folder, ending, words):
    weights = load_file(folder / "model.safetensors")
    layer = next(name for name in weights if name.endswith("o_proj.weight")).removesuffix("weight")
    save_file(weights | {layer + ending: torch.ones(32)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=words):
        load(folder)


def test_layers_beyond_those_of_config_json_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    edit(folder / "config.json", text_config=text)
    with pytest.raises(ModelLoadError, match=r"12 tensors of .* belong to no weight of the model"):
        load(folder)


def test_a_text_scorer_is_held_to_the_same(tmp_path):
    folder = make_clip(tmp_path)
    scorer = ClipScorer(model_id=str(folder))
    weights = load_file(folder / "model.safetensors")
    # A published CLIP has its indices, as integers, among the weights.
    indices = {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    save_file(weights | indices, folder / "model.safetensors", {"format": "pt"})
    RelevanceModel(scorer, device=torch.device("cpu"), dtype=torch.float32)
    edit(folder / "config.json", quantization_config={"quant_method": "quanto"})
    with pytest.raises(ModelLoadError, match="by quanto"):
        RelevanceModel(scorer, device=torch.device("cpu"), dtype=torch.float32)


def test_what_says_that_nothing_is_quantised_loads(folder):
    edit(folder / "config.json", quantization_config=None)
    load(folder)


def test_a_head_of_its_own_is_used_although_config_json_ties_it(folder):
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] | {"tie_word_embeddings": True}
    edit(folder / "config.json", text_config=text, tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    [head] = [weight for name, weight in weights.items() if name.endswith("lm_head.weight")]
    hidden_1D = torch.eye(32)[:1]
    assert torch.equal(load(folder).decoder.lm_head(hidden_1D), hidden_1D @ head.T)
