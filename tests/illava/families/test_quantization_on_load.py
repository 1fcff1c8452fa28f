"""Weights quantised while a model is loaded: the decoder's linear layers alone, near the plain model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int4WeightOnlyConfig

from illava import VLM
from illava.analysis.agreement import measure_agreement
from illava.errors import ModelLoadError
from illava.families import load_family, quantization
from illava.families.adapters import Adapter
from illava.plan import EMPTY_PLAN
from illava.requests import Request, SamplingParams
from illava.weight_files import INT4_GROUP, check_options, count_stored, is_quantised_on_load
from tests.support.models.lora import make_lora
from tests.support.models.onevision import make_onevision
from tests.support.models.onevision_tower import picture
from tests.support.models.quantised_models import make_quantised

SCHEMES = ("float8", "int8", "int4")
WIDE = {"hidden_size": INT4_GROUP, "intermediate_size": 2 * INT4_GROUP, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_onevision(tmp_path_factory.mktemp("wide"), text=WIDE)


@pytest.fixture(scope="module")
def loaded(folder):
    """The model under each scheme, in float32: greedy choices in bfloat16 would be near-ties."""
    options = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 1 << 20}
    return {name: VLM.from_pretrained(str(folder), quantization=name, **options) for name in ("none", *SCHEMES)}


def linears(family) -> list[nn.Linear]:
    return [m for layer in family.decoder.layers for m in layer.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_decoders_linear_layers_alone_are_quantised(loaded, scheme):
    family, plain = loaded[scheme].family, loaded["none"].family
    assert len(linears(family)) == 14
    assert all(type(layer) is nn.Linear and type(layer.weight) is not nn.Parameter for layer in linears(family))
    others = [family.decoder.lm_head, family.decoder.norm, *family.tower._blocks, family.encoder._projector]
    assert {type(p) for module in others for p in module.parameters()} == {nn.Parameter}
    assert {p.dtype for module in others for p in module.parameters()} == {torch.float32}
    for layer, before in zip(linears(family), linears(plain), strict=True):
        error = (layer.weight.dequantize().float() - before.weight.float()).norm() / before.weight.float().norm()
        assert 0 < error < {"float8": 0.04, "int8": 0.02, "int4": 0.15}[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_backends_say_what_is_computed_with(loaded, scheme):
    assert loaded[scheme].backends["weights"] == f"{scheme} by torchao, computed in float32"
    assert loaded["none"].backends["weights"] == "float32"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_agrees_with_the_plain_model_by_the_projects_measure(loaded, scheme):
    """Random weights say nothing of quality; a scale that is left out would agree in 1 of 262 tokens."""
    media = loaded["none"].family.preprocessor.images([picture(60, 90)])
    requests = [Request(f"{n}", (*media, f"What {n}?"), SamplingParams(max_new_tokens=8)) for n in range(4)]
    found = measure_agreement(loaded[scheme], requests, EMPTY_PLAN, reference=loaded["none"])
    assert all(one.error is None for one in found)
    num_tokens = sum(one.num_tokens for one in found)
    kl_nats = sum(one.kl_nats * one.num_tokens for one in found) / num_tokens
    assert 0 < kl_nats < {"float8": 0.05, "int8": 0.005, "int4": 0.5}[scheme]


def test_counted_bytes_are_those_of_the_tensors(loaded, folder):
    counts = count_stored(folder)
    values = sum(layer.weight.numel() for layer in linears(loaded["none"].family))
    assert (counts.linear_values, counts.linear_rows) == (
        values,
        sum(one.out_features for one in linears(loaded["none"].family)),
    )
    for scheme in ("float8", "int8"):
        weights = [layer.weight for layer in linears(loaded[scheme].family)]
        held = sum(getattr(w, name).nbytes for w in weights for name in w.tensor_data_names)
        assert counts.num_bytes(4, scheme) - 4 * counts.other_values == pytest.approx(held, rel=0.02)
    assert counts.num_bytes(2, "int4") - counts.num_bytes(2, "int8") < -0.4 * counts.linear_values


def test_int4_is_refused_where_a_width_does_not_divide(onevision_folder):
    with pytest.raises(
        ModelLoadError, match=r"int4 shares a scale among 128 inputs, and .*_proj has (32|64): take int8"
    ):
        load_family(str(onevision_folder), dtype=torch.float32, device="cpu", quantization="int4")


def test_a_checkpoint_that_is_quantised_already_is_refused(onevision_folder, tmp_path):
    fp8 = make_quantised(onevision_folder, tmp_path / "fp8", "fp8")
    with pytest.raises(
        ModelLoadError, match=r"stored in float8 \(fp8\): model.quantization int8 wants the unquantised"
    ):
        load_family(str(fp8), dtype=torch.float32, device="cpu", quantization="int8")
    with pytest.raises(ModelLoadError, match="quantization 'int3' is not one of none, float8, int8, int4"):
        load_family(str(onevision_folder), dtype=torch.float32, device="cpu", quantization="int3")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.language_model.layers.3.self_attn.q_proj.weight", True),
        ("language_model.model.layers.3.mlp.down_proj.weight", True),  # in older files
        ("model.layers.3.mlp.gate_proj.weight", True),
        ("model.language_model.layers.0.linear_attn.in_proj_qkv.weight", True),
        ("model.language_model.layers.0.linear_attn.in_proj_b.weight", False),
        ("model.language_model.layers.3.self_attn.q_proj.bias", False),
        ("model.vision_tower.vision_model.encoder.layers.3.self_attn.q_proj.weight", False),
        ("model.visual.blocks.3.mlp.gate_proj.weight", False),
        ("model.language_model.layers.3.mlp.experts.7.down_proj.weight", False),
        ("model.language_model.layers.3.input_layernorm.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_names_tell_the_layers_that_are_quantised(name, is_one):
    assert is_quantised_on_load(name) is is_one


def test_a_mixture_of_experts_is_refused():
    config = {"text_config": {"num_experts": 128}}
    with pytest.raises(ModelLoadError, match=r"'org/moe' is a mixture of experts, .* set it to none"):
        check_options("org/moe", config, scheme=None, quantization="float8", has_adapter=False)
    check_options("org/moe", config, scheme=None, quantization="none", has_adapter=True)


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_is_added_before_its_layers_are_quantised(folder, tmp_path, merge):
    adapter = Adapter(
        str(make_lora(folder, tmp_path / "lora", "llava_onevision", r".*language_model.*q_proj")), merge=merge
    )
    family = load_family(str(folder), dtype=torch.bfloat16, device="cpu", quantization="int8", adapter=adapter)
    layer = family.decoder.layers[0].self_attn.q_proj
    if merge:
        plain = load_family(str(folder), dtype=torch.bfloat16, device="cpu", adapter=adapter)
        expected = plain.decoder.layers[0].self_attn.q_proj.weight.float()
        assert (layer.weight.dequantize().float() - expected).norm() < 0.02 * expected.norm()
        return
    assert type(layer.base_layer.weight).__name__ == "Int8Tensor"
    assert {p.dtype for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters())} == {torch.bfloat16}
    assert type(layer.lora_A["default"].weight) is nn.Parameter


@pytest.mark.parametrize(
    ("scheme", "dtype", "kind"),
    [
        ("float8", torch.bfloat16, Float8DynamicActivationFloat8WeightConfig),
        ("int4", torch.bfloat16, Int4WeightOnlyConfig),
    ],
)
def test_a_card_gets_the_schemes_with_products_of_its_own(monkeypatch, scheme, dtype, kind):
    monkeypatch.setattr(quantization, "computes_float8", lambda device: True)
    assert type(quantization._torchao_config(scheme, dtype=dtype, device="cuda")) is kind


def test_int4_on_a_card_is_for_bfloat16():
    with pytest.raises(ModelLoadError, match=r"int4 computes in bfloat16 on CUDA, not in torch\.float16"):
        quantization.OnLoad("int4", dtype=torch.float16, device="cuda")
