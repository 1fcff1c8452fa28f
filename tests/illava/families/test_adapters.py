"""LoRA adapters: merged or beside the weights they give one model's answers, in the decoder and in the tower."""

from __future__ import annotations

import hashlib
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from illava import VLM
from illava.errors import ModelLoadError
from illava.families import load_family
from illava.families.adapters import Adapter, check_adapter
from illava.plan import EMPTY_PLAN
from tests.support.closeness import FLOAT32, assert_close
from tests.support.models.families import make_folder
from tests.support.models.lora import make_lora
from tests.support.models.onevision_tower import picture
from tests.support.models.published_llava import edit
from tests.support.models.quantised_models import make_quantised
from tests.support.models.text_logits import text_logits

DECODER = r".*language_model.*_proj"
TOWER = r".*(vision_tower|visual).*(_proj|fc1|fc2|qkv|attn\.proj)"
# About 2 s of a core each: one tower of each kind in `make test`, the others in `make test-long`.
CASES = [
    ("llava_onevision", "decoder"),
    ("llava_onevision", "tower"),
    ("qwen2_5_vl", "tower"),
    pytest.param("qwen2_5_vl", "decoder", marks=pytest.mark.long),
    pytest.param("qwen3_vl", "decoder", marks=pytest.mark.long),
    pytest.param("qwen3_vl", "tower", marks=pytest.mark.long),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each family, made once: a folder, and an adapter of its decoder and one of its tower."""
    root, found = tmp_path_factory.mktemp("adapted"), {}

    def make(model_type: str):
        if model_type not in found:
            base = make_folder(model_type, root / model_type)
            parts = {"decoder": DECODER, "tower": TOWER}
            found[model_type] = (
                base,
                {
                    part: make_lora(base, root / f"{model_type}-{part}", model_type, targets)
                    for part, targets in parts.items()
                },
            )
        return found[model_type]

    return make


def load(base, adapter=None, *, merge=True, **options):
    found = None if adapter is None else Adapter(str(adapter), merge=merge)
    return load_family(str(base), dtype=torch.float32, device="cpu", adapter=found, **options)


def features(family):
    (encoded,) = family.encode(family.preprocessor.images([picture(60, 90)]), EMPTY_PLAN, trace=False)
    return encoded.feature_KD


@pytest.mark.parametrize(("model_type", "part"), CASES)
def test_an_adapter_changes_answers_as_merged_weights_do(made, model_type, part):
    """Under every path of the MLPs: short prompts and long ones in the decoder, and the tower's own shortcut."""
    base, adapters = made(model_type)
    plain, merged = load(base), load(base, adapters[part])
    beside = load(base, adapters[part], merge=False)
    assert merged.weights == "float32, with an adapter merged"
    assert beside.weights == "float32, with an adapter beside them"
    assert not any(hasattr(module, "base_layer") for layer in merged.decoder.layers for module in layer.modules())
    axes = 1 if model_type.startswith("llava") else 3
    for measure in (
        [lambda family, n=n: text_logits(family, num_tokens=n, num_axes=axes) for n in (12, 80)]
        if part == "decoder"
        else [features]
    ):
        before, one, other = measure(plain), measure(merged), measure(beside)
        assert (one - before).norm() > 0.05 * before.norm()
        assert_close(other, one, tolerance=4 * FLOAT32)


@pytest.fixture
def base_and_adapter(made, tmp_path):
    base, adapters = made("llava_onevision")
    return base, shutil.copytree(adapters["decoder"], tmp_path / "adapter")


def test_files_stay_as_they_are_and_the_api_takes_an_adapter(base_and_adapter):
    base, adapter = base_and_adapter
    before = hashlib.sha256((base / "model.safetensors").read_bytes()).digest()
    vlm = VLM.from_pretrained(
        str(base), dtype="float32", device="cpu", kv_cache_bytes=1 << 20, adapter=Adapter(str(adapter))
    )
    assert vlm.backends["weights"] == "float32, with an adapter merged"
    assert hashlib.sha256((base / "model.safetensors").read_bytes()).digest() == before


def test_names_of_older_transformers_find_their_layers(base_and_adapter):
    """A LLaVA adapter trained before 4.52: `language_model.model.layers` where the model has `model.language_model`."""
    base, adapter = base_and_adapter
    path = adapter / "adapter_model.safetensors"
    tensors = {name.replace("model.language_model.", "language_model.model."): t for name, t in load_file(path).items()}
    expected = text_logits(load(base, adapter))
    save_file(tensors, path)
    assert_close(text_logits(load(base, adapter)), expected)


def refused(base, adapter, words, **options):
    with pytest.raises(ModelLoadError, match=words):
        load(base, adapter, **options)


def test_a_tensor_that_finds_no_layer_is_refused(base_and_adapter):
    base, adapter = base_and_adapter
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file(tensors | {name.replace("layers.0", "layers.7"): tensors[name].clone()}, path)
    refused(base, adapter, "1 of its tensors belong to no layer")
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    refused(base, adapter, "1 of its tensors are missing")
    save_file(tensors | {name: torch.ones(4, 7)}, path)
    refused(base, adapter, "1 of its tensors are of another shape")


def test_an_adapter_of_another_base_model_is_refused_in_words(made, base_and_adapter):
    _, adapter = base_and_adapter
    other, _ = made("qwen2_5_vl")
    refused(other, adapter, r"adapter .*(cannot be added to|is not one of) ")


@pytest.mark.parametrize(
    ("trained_on", "model_id", "fits"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", False),  # of the same shapes
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", True),
        ("unsloth/Qwen2.5-VL-7B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-VL-7B-Instruct", True),
        ("/root/models/base", "Qwen/Qwen2.5-VL-7B-Instruct", True),  # nobody knows
    ],
)
def test_names_of_the_hub_tell_models_of_one_shape_apart(base_and_adapter, trained_on, model_id, fits):
    _, adapter = base_and_adapter
    edit(adapter / "adapter_config.json", base_model_name_or_path=trained_on)
    if fits:
        assert check_adapter(Adapter(str(adapter)), model_id) == adapter
        return
    with pytest.raises(ModelLoadError, match=f"trained on {trained_on}, and model.model_id is {model_id}"):
        check_adapter(Adapter(str(adapter)), model_id)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "of the kind PROMPT_TUNING; only LORA is built"),
        ({"peft_type": None}, "kind None"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] replaces whole modules"),
    ],
)
def test_another_kind_of_adapter_is_refused_by_name(base_and_adapter, settings, words):
    base, adapter = base_and_adapter
    edit(adapter / "adapter_config.json", **settings)
    refused(base, adapter, words)


def test_files_that_are_missing_or_not_safetensors_are_refused(base_and_adapter):
    base, adapter = base_and_adapter
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(base, adapter, "has no adapter_model.safetensors; other formats may run code")
    (adapter / "adapter_config.json").write_text("[")
    refused(base, adapter, "is not what peft writes")
    (adapter / "adapter_config.json").unlink()
    refused(base, adapter, "has no adapter_config.json")
    refused(base, adapter / "nowhere", "no model folder at")


def test_an_adapter_on_a_checkpoint_that_is_stored_quantised_is_refused(base_and_adapter, tmp_path):
    base, adapter = base_and_adapter
    folder = make_quantised(base, tmp_path / "fp8", "fp8")
    refused(folder, adapter, r"stored in float8 \(fp8\): model.adapter wants the unquantised checkpoint")


@pytest.mark.parametrize(
    ("package", "extra", "options"),
    [("peft", "adapters", {}), ("torchao", "quantized", {"quantization": "int8"})],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    base_and_adapter, monkeypatch, package, extra, options
):
    base, adapter = base_and_adapter
    monkeypatch.setitem(sys.modules, package, None)
    wanted = rf"needs {package}, .* extra '{extra}': {sys.executable} -m pip install .*{package}"
    refused(base, None if options else adapter, wanted, **options)


@pytest.mark.parametrize("package", ["accelerate", "compressed_tensors"])
def test_so_is_one_that_a_stored_scheme_wants(base_and_adapter, tmp_path, monkeypatch, package):
    folder = make_quantised(base_and_adapter[0], tmp_path / "model", "compressed-fp8")
    monkeypatch.setitem(sys.modules, package, None)
    refused(folder, None, rf"a checkpoint in float8 \(compressed-tensors\) needs {package}, .* pip install ")
