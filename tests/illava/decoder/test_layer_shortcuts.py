"""Shortcuts that read a layer's weight are taken for plain layers only: quantised and adapted ones run as they are."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import SiglipVisionConfig, SiglipVisionModel

from illava.decoder.decoder import Decoder
from illava.decoder.joined_linears import products
from illava.families.llava.towers import SiglipTower
from illava.plan import EMPTY_PLAN
from illava.reduction.vision import VisionReduction
from tests.support.closeness import FLOAT32, assert_close
from tests.support.decoder_cases import make_model, make_prompt, run_prefill, video_spans

# Below and above the rows from which the decoder's MLP runs in place on CPU.
NUM_FRAMES = {"short": 3, "long": 30}


def decoder_logits(model: Any, length: str) -> Tensor:
    prompt = make_prompt(video_spans(num_frames=NUM_FRAMES[length]))
    done, _ = run_prefill(Decoder(model.model, model.lm_head), [prompt])
    return done.logits_BV


def make_tower() -> SiglipVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=8, vision_use_head=False, **sizes)).eval()


@torch.no_grad()
def tower_features(model: SiglipVisionModel) -> Tensor:
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tower = SiglipTower(model)
    reduction = VisionReduction(EMPTY_PLAN, (16,) * 6, torch.zeros(96, 3, dtype=torch.long), num_blocks=3)
    return tower.run(tower.embed(pixels), reduction)


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with plain layers of the values that the quantised ones stand for."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, nn.Linear) and hasattr(layer.weight, "dequantize"):
            layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return plain


def adapted(model: nn.Module, *targets: str) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=list(targets), init_lora_weights=False)
    torch.manual_seed(2)
    return peft.inject_adapter_in_model(config, model).eval()


def merged(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            plain.set_submodule(name, layer.get_base_layer())
    return plain


@pytest.mark.parametrize("length", NUM_FRAMES)
@pytest.mark.parametrize("target", ["gate_proj", "up_proj", "down_proj", "q_proj"])
def test_a_decoders_adapter_counts_as_in_merged_weights(target, length):
    model = make_model()
    before = decoder_logits(model, length)
    model = adapted(model, target)
    assert (decoder_logits(model, length) - before).abs().max() > 0.01 * before.abs().max()
    assert_close(decoder_logits(model, length), decoder_logits(merged(model), length), tolerance=2 * FLOAT32)


@pytest.mark.parametrize("target", ["fc1", "fc2", "q_proj"])
def test_a_towers_adapter_counts_as_in_merged_weights(target):
    model = make_tower()
    before = tower_features(model)
    model = adapted(model, target)
    assert (tower_features(model) - before).abs().max() > 0.01 * before.abs().max()
    assert_close(tower_features(model), tower_features(merged(model)), tolerance=2 * FLOAT32)


@pytest.mark.parametrize("length", NUM_FRAMES)
def test_quantised_layers_of_a_decoder_compute_their_values(length):
    model = make_model()
    quantize_(model.model.layers, Int8WeightOnlyConfig(set_inductor_config=False))
    assert_close(decoder_logits(model, length), decoder_logits(dequantized(model), length), tolerance=2 * FLOAT32)


def test_quantised_layers_of_a_tower_compute_their_values():
    model = make_tower()
    quantize_(model.encoder.layers, Int8WeightOnlyConfig(set_inductor_config=False))
    assert_close(tower_features(model), tower_features(dequantized(model)), tolerance=2 * FLOAT32)


@pytest.mark.parametrize("one_alone", [False, True])
def test_quantised_layers_are_not_joined(one_alone):
    """torchao leaves the module's class as it is: the weight's class tells. On CUDA plain layers are joined."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(32, 16) for _ in range(3)).requires_grad_(False)
    quantize_(layers[1] if one_alone else layers, Int8WeightOnlyConfig(set_inductor_config=False))
    weights = [layer.weight for layer in layers]
    x_TD = torch.randn(5, 32)
    expected = [layer(x_TD) for layer in layers]
    got = products(layers, join=True)(x_TD)
    assert all(layer.weight is weight for layer, weight in zip(layers, weights, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
