"""The released tower's recorded tensors matched through the real block loop; the plain formula as second oracle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import SiglipVisionConfig, SiglipVisionModel

from illava.errors import ReductionDidNotFireError
from illava.families.llava.towers import SiglipTower
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.reduction import vision
from illava.reduction.vision import VisionReduction
from tests.support.closeness import assert_close

pytestmark = pytest.mark.numeric

DATA = Path(__file__).parent / "data"
FILES = sorted(path.name for path in DATA.glob("siglip_*.safetensors"))
WEIGHTS = "weights.vision_model."


@dataclass
class Recording:
    config: dict
    tensors: dict[str, Tensor]
    model: SiglipVisionModel

    @property
    def plan(self) -> ReductionPlan:
        return _plan(self.config["merge_layers"], self.config["num_merged"])


def _plan(layers: list[int], num_merged: int) -> ReductionPlan:
    reducer = {"kind": "illava", "num_merged": num_merged}
    return ReductionPlan(steps=({"stage": "vision_block", "layers": layers, "reducer": reducer},))


@pytest.fixture(params=FILES)
def recording(request) -> Recording:
    with safe_open(DATA / request.param, "pt") as file:
        config = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    fields = {
        key: config[key] for key in config if key not in ("merge_layers", "num_merged", "tokens_in", "tokens_out")
    }
    model = SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **fields)).eval()
    weights = {key.removeprefix(WEIGHTS): value for key, value in tensors.items() if key.startswith(WEIGHTS)}
    model.load_state_dict(weights, strict=True)
    return Recording(config, tensors, model)


def _run(model: SiglipVisionModel, pixels: Tensor, plan: ReductionPlan) -> tuple[Tensor, VisionReduction]:
    tower = SiglipTower(model)
    num_tiles, num_tokens = pixels.shape[0], tower.grid**2
    place = torch.zeros(num_tiles * num_tokens, 3, dtype=torch.long)
    reduction = VisionReduction(plan, (num_tokens,) * num_tiles, place, num_blocks=tower.num_blocks)
    with torch.no_grad():
        hidden = tower.run(tower.embed(pixels), reduction)
    return hidden.view(num_tiles, -1, hidden.shape[1]), reduction


def test_there_are_two_recordings():
    assert len(FILES) == 2


def test_scores_mlp_inputs_and_output_equal_the_released_tower(recording, monkeypatch):
    scores, mlp_inputs = [], {}

    def spy(*args, **kwargs):
        scores.append(attention_received(*args, **kwargs))
        return scores[-1]

    attention_received = vision.attention_received
    monkeypatch.setattr(vision, "attention_received", spy)
    for layer in recording.config["merge_layers"]:
        recording.model.encoder.layers[layer].layer_norm2.register_forward_pre_hook(
            lambda _, args, layer=layer: mlp_inputs.update({layer: args[0]})
        )
    hidden, _ = _run(recording.model, recording.tensors["input.pixel_values"], recording.plan)

    assert len(scores) == len(recording.config["merge_layers"])
    for score, layer in zip(scores, recording.config["merge_layers"], strict=True):
        expected = recording.tensors[f"merge.layer{layer}.score"]
        assert_close(score.view(expected.shape), expected)
        expected = recording.tensors[f"merge.layer{layer}.mlp_input"]
        assert_close(mlp_inputs[layer].view(expected.shape), expected)
    assert_close(hidden, recording.tensors["output.hidden"])


def test_the_plain_formula_gives_the_same(recording):
    """Each image alone, eager attention with the whole map, one token at a time."""
    model, config = recording.model, recording.config
    hidden, _ = _run(model, recording.tensors["input.pixel_values"], recording.plan)
    for image, pixels in enumerate(recording.tensors["input.pixel_values"]):
        with torch.no_grad():
            assert_close(hidden[image], _plain_tower(model, pixels, config["merge_layers"], config["num_merged"]))


def _plain_tower(model: SiglipVisionModel, pixels: Tensor, layers: list[int], num_merged: int) -> Tensor:
    x = model.embeddings(pixels[None])[0]
    for index, block in enumerate(model.encoder.layers):
        attention, normed = block.self_attn, block.layer_norm1(x)
        heads = (len(x), attention.num_heads, attention.head_dim)
        q, k, v = (
            project(normed).view(heads).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (q @ k.transpose(1, 2) * attention.head_dim**-0.5).softmax(-1)
        x = x + attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
        if index in layers:
            x = _plain_merge(x, weights.mean(0).mean(0), num_merged)
        x = x + block.mlp(block.layer_norm2(x))
    return x


def _plain_merge(x: Tensor, score: Tensor, r: int) -> Tensor:
    ascending = score.argsort().tolist()[: r + 1]
    new = sum((r + 1 - m) / ((r + 1) * (r + 2) / 2) * x[j] for m, j in enumerate(ascending))
    rows = [new if j == ascending[-1] else x[j] for j in range(len(x)) if j not in ascending[:-1]]
    return torch.stack(rows)


def test_the_empty_plan_is_hugging_faces_own_tower(recording):
    pixels = recording.tensors["input.pixel_values"]
    hidden, reduction = _run(recording.model, pixels, EMPTY_PLAN)
    assert_close(hidden, recording.tensors["output.hidden_unmerged"])
    with torch.no_grad():
        theirs = recording.model(pixels, output_hidden_states=True).hidden_states[-1]
    assert_close(hidden, theirs)
    assert reduction.steps == []


def test_at_27_by_27_patches_the_empty_plan_is_hugging_faces_own_tower():
    """The published grid: 1458 rows, which go through other products than the recordings' few."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}
    model = SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, image_size=378, patch_size=14, **shape)).eval()
    pixels = torch.rand(2, 3, 378, 378) * 2 - 1
    hidden, _ = _run(model, pixels, EMPTY_PLAN)
    assert hidden.shape == (2, 27**2, 32)
    with torch.no_grad():
        assert_close(hidden, model(pixels, output_hidden_states=True).hidden_states[-1])


def test_a_tile_does_not_depend_on_its_batch(recording):
    pixels = recording.tensors["input.pixel_values"]
    together, _ = _run(recording.model, pixels, recording.plan)
    for image in range(len(pixels)):
        alone, _ = _run(recording.model, pixels[image : image + 1], recording.plan)
        assert_close(together[image], alone[0])


def test_a_step_beyond_the_last_block_is_an_error(recording):
    with pytest.raises(ReductionDidNotFireError, match=r"\[40\]"):
        _run(recording.model, recording.tensors["input.pixel_values"], _plan([2, 40], 3))


def test_a_step_that_removes_nothing_is_an_error(recording):
    with pytest.raises(ReductionDidNotFireError, match="removed none"):
        _run(recording.model, recording.tensors["input.pixel_values"], _plan([2, 3], 1000))


class _Shapes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else [out]
        self.seen += [(str(func), value.shape) for value in outputs if isinstance(value, Tensor)]
        return out


def test_a_merging_tower_never_allocates_an_n_by_n_tensor():
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        image_size=54, patch_size=2, vision_use_head=False,
    )  # fmt: skip
    model, num_tokens = SiglipVisionModel(config).eval(), 27 * 27
    with _Shapes() as shapes:
        hidden, _ = _run(model, torch.randn(1, 3, 54, 54), _plan([0, 1], 92))
    assert hidden.shape == (1, num_tokens - 2 * 92, 16)
    largest = max(shapes.seen, key=lambda entry: entry[1].numel())
    assert largest[1].numel() < (num_tokens - 92) ** 2, largest
