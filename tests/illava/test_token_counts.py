"""Expected token counts against numbers worked by hand for the 7B model and the small one."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from illava.errors import ModelLoadError, PlanError
from illava.families import load_family, load_preprocessor
from illava.families.llava.geometry import AnyresGeometry
from illava.families.model_shape import load_model_shape
from illava.plan import EMPTY_PLAN, ReductionPlan, ReductionStep, preset
from illava.reducers import Reducer
from illava.token_counts import TokenCounts, VisualShape, expected_counts
from tests.support.models.onevision import make_onevision

CANVASES = tuple((384 * rows, 384 * cols) for rows in range(1, 7) for cols in range(1, 7))
SEVEN_B = AnyresGeometry(384, 14, CANVASES, 9)
SMALL = AnyresGeometry(112, 8, ((112, 112),), 9)

CLIP = VisualShape("video", 720, 1280, 32)
SQUARE = VisualShape("image", 384, 384)
WIDE = VisualShape("image", 1080, 1920)


def count(plan: ReductionPlan, *media: VisualShape, geometry: AnyresGeometry = SEVEN_B) -> TokenCounts:
    return expected_counts(geometry, plan, media, num_vision_blocks=26, num_decoder_layers=28)


def released(name: str) -> ReductionPlan:
    return preset(name, layout="released")


def plan_of(*steps: tuple[str, list[int], dict], layout: str = "geometric") -> ReductionPlan:
    listed = [{"stage": s, "layers": layers, "reducer": {"kind": "illava", **keys}} for s, layers, keys in steps]
    return ReductionPlan.model_validate({"layout": layout, "steps": listed})


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (EMPTY_PLAN, TokenCounts(23328, 23328, 6273, 6273, 6273)),  # 32 x 729; 32 x 14 x 14 + 1
        (preset("illava-video"), TokenCounts(23328, 11552, 6273, 3201, 2241)),  # 32 x 100 + 1; 2240.7
        (released("illava-video"), TokenCounts(23328, 11552, 6273, 3201, 2241)),  # 361 = 19 x 19 -> 10 x 10
        (preset("illava-draw-video"), TokenCounts(23328, 5408, 6273, 1569, 784)),  # 32 x 49 + 1; 784.5 rounds to even
        (released("illava-draw-video"), TokenCounts(23328, 5408, 6273, 1569, 784)),  # 169 = 13 x 13 -> 7 x 7
        (preset("illava-image"), TokenCounts(23328, 11552, 6273, 6273, 4391)),  # 361 a frame; pooling restores; 4391.1
    ],
)
def test_32_frames_of_the_7b(plan, expected):
    assert count(plan, CLIP) == expected


@pytest.mark.parametrize(
    ("plan", "mm_item", "expected"),
    [
        (EMPTY_PLAN, SQUARE, TokenCounts(1458, 1458, 1485, 1485, 1485)),  # base 729, one tile 27 x 28
        (released("illava-image"), SQUARE, TokenCounts(1458, 722, 1485, 741, 519)),  # 361 + 19 x 20; 518.7
        (preset("illava-image"), SQUARE, TokenCounts(1458, 722, 1485, 749, 524)),  # 361 + 361 + 27 newlines; 524.3
        (EMPTY_PLAN, WIDE, TokenCounts(11664, 11664, 7269, 7269, 7269)),  # 16 tiles; 729 + 60 x 109
        (released("illava-image"), WIDE, TokenCounts(11664, 5776, 7269, 3595, 2516)),  # 361 + 42 x 77; 2516.5 to even
    ],
)
def test_one_image_of_the_7b(plan, mm_item, expected):
    assert count(plan, mm_item) == expected


def test_padding_makes_geometric_images_an_upper_bound():
    bound = count(preset("illava-image"), VisualShape("image", 300, 384))
    # 27 x 27 cells, 21 rows of picture (int(21.09)), 3 rows off each end: all 361 kept tokens may lie in 21 x 27 cells
    assert bound == TokenCounts(1458, 722, 729 + 21 * 28, 361 + 361 + 21, 520, exact=False)
    thin = count(preset("illava-image"), VisualShape("image", 60, 384))
    assert thin.num_vision_tokens_kept == 361 + 5 * 27 + 5  # no more kept tokens than cells
    assert not thin.exact


def test_several_images_are_one_tile_each():
    assert count(EMPTY_PLAN, SQUARE, WIDE) == TokenCounts(1458, 1458, 1460, 1460, 1460)
    for plan in (preset("illava-image"), released("illava-image")):
        assert count(plan, SQUARE, WIDE) == TokenCounts(1458, 722, 1460, 724, 507)  # 2 x (361 + 1); 506.8


def test_small_model():
    clip = VisualShape("video", 112, 112, 8)
    assert count(preset("illava-small-video"), clip, geometry=SMALL) == TokenCounts(1568, 800, 393, 201, 141)
    assert count(released("illava-small-video"), clip, geometry=SMALL) == TokenCounts(1568, 800, 393, 201, 141)
    image = VisualShape("image", 112, 112)
    assert count(released("illava-small"), image, geometry=SMALL) == TokenCounts(392, 200, 406, 210, 147)
    assert count(preset("illava-small"), image, geometry=SMALL) == TokenCounts(392, 200, 406, 214, 150)


def test_scopes_round_apart_or_together():
    small = VisualShape("image", 1, 1)  # several images: 729 + 1 each
    half = {"keep_ratio": 0.5}
    frame = plan_of(("decoder_input", [], {**half, "per": "frame"}))
    per_medium = plan_of(("decoder_input", [], {**half, "per": "medium"}))
    prompt = plan_of(("decoder_input", [], {**half, "per": "prompt"}))
    span = plan_of(("decoder_input", [], {**half, "per": "span"}))
    assert count(frame, small, small, small).num_vision_tokens_kept == 3 * (364 + 1)  # newlines belong to no frame
    assert count(per_medium, small, small, small).num_vision_tokens_kept == 3 * 365
    assert count(prompt, small, small, small).num_vision_tokens_kept == 1095
    assert count(per_medium, small, small, small).exact
    assert not count(span, small, small, small).exact
    assert count(span, CLIP).exact


def test_finer_scope_after_a_coarser_one_is_an_upper_bound():
    plan = plan_of(
        ("decoder_input", [], {"keep_ratio": 0.5, "per": "prompt"}),
        ("decoder_layer", [3], {"keep_per_frame": 10}),
    )
    counts = count(plan, CLIP)
    assert (counts.num_vision_tokens_kept, counts.num_decoder_tokens_kept) == (3136, 3136)
    assert not counts.exact


def test_decoder_layers_chain():
    plan = plan_of(("decoder_layer", [6, 7, 8], {"keep_ratio": 0.9, "per": "prompt"}))
    assert count(plan, CLIP).num_decoder_tokens_kept == 4573  # 6273 -> 5646 -> 5081 -> 4573


def test_vision_output_counts_with_the_tower():
    plan = plan_of(("vision_block", [4], {"num_merged": 29}), ("vision_output", [], {"num_merged": 24}))
    assert count(plan, SQUARE, SQUARE).num_vision_tokens_kept == 2 * 677


class Half(Reducer):
    """Keeps half of a scope, none of a single token."""

    stages: ClassVar = frozenset({"decoder_input"})
    kind: Literal["half"] = "half"
    per: Literal["frame"] = "frame"

    def evidence(self, stage):
        return frozenset()

    def num_kept(self, num_tokens):
        return num_tokens // 2

    def assign(self, tokens, evidence, stage):
        raise AssertionError("not called")


def test_separators_belong_to_no_frame():
    step = ReductionStep.model_construct(stage="decoder_input", layers=(), reducer=Half())
    plan = ReductionPlan.model_construct(layout="geometric", steps=(step,))
    assert count(plan, CLIP).num_vision_tokens_kept == 32 * 98 + 1


class Undecided(Reducer):
    """Keeps what the data say."""

    stages: ClassVar = frozenset({"vision_block", "decoder_layer"})
    kind: Literal["undecided"] = "undecided"

    def evidence(self, stage):
        return frozenset()

    def num_kept(self, num_tokens):
        return None

    def assign(self, tokens, evidence, stage):
        raise AssertionError("not called")


@pytest.mark.parametrize("stage", ["vision_block", "decoder_layer"])
def test_a_reducer_that_asks_the_data_makes_an_upper_bound(stage):
    step = ReductionStep.model_construct(stage=stage, layers=(2,), reducer=Undecided())
    plan = ReductionPlan.model_construct(layout="geometric", steps=(step,))
    assert count(plan, CLIP) == TokenCounts(23328, 23328, 6273, 6273, 6273, exact=False)


def test_refusals():
    step = ReductionStep.model_construct(stage="vision_block", layers=(2,), reducer=Undecided())
    with pytest.raises(PlanError, match="depend on the picture"):
        count(ReductionPlan.model_construct(layout="released", steps=(step,)), CLIP)
    with pytest.raises(PlanError, match=r"700 of 729 tokens are left of each tile; 676 or 729 would be one"):
        count(plan_of(("vision_block", [3], {"num_merged": 29}), layout="released"), CLIP)
    with pytest.raises(PlanError, match=r"vision_block \[26\], but this model has 0 to 25"):
        count(plan_of(("vision_block", [25, 26], {"num_merged": 4})), CLIP)
    with pytest.raises(PlanError, match=r"decoder_layer \[28\], but this model has 0 to 27"):
        count(plan_of(("decoder_layer", [28], {"num_merged": 4})), CLIP)


def test_counts_add_up():
    total = count(EMPTY_PLAN, CLIP) + count(preset("illava-image"), VisualShape("image", 300, 384))
    assert total == TokenCounts(23328 + 1458, 23328 + 722, 6273 + 1317, 6273 + 743, 6273 + 520, exact=False)


def test_model_shape_is_read_from_config_alone(onevision_folder, tmp_path):
    shape = load_model_shape(str(onevision_folder))
    assert (shape.num_vision_blocks, shape.num_decoder_layers, shape.geometry.grid) == (8, 4, 7)
    for path in onevision_folder.glob("*config.json"):
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    assert load_model_shape(str(tmp_path)).num_vision_blocks == 7
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": [1, 2]}))
    with pytest.raises(ModelLoadError, match=r"vision_feature_layer is \[1, 2\]"):
        load_model_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(ModelLoadError, match="'llava' model"):
        load_model_shape(str(tmp_path))


PLANS = {
    "empty": EMPTY_PLAN,
    "merged": plan_of(("vision_block", [2, 3, 4, 5], {"num_merged": 6})),
    "released": plan_of(("vision_block", [2, 3, 4, 5], {"num_merged": 6}), layout="released"),
    "after": plan_of(("vision_block", [1], {"num_merged": 4}), ("vision_output", [], {"keep_ratio": 0.5})),
}


@pytest.mark.parametrize("name", PLANS)
def test_equal_to_what_the_model_measures(family, name):
    preprocessor = family.preprocessor
    clip = [preprocessor.video(np.zeros((3, 30, 40, 3), np.uint8))]
    pair = list(preprocessor.images([noise(30, 40), noise(80, 20)]))
    ones = [list(preprocessor.images([noise(*size)])) for size in ((56, 56), (112, 168), (60, 90), (500, 700))]
    exact = 0
    for media in (clip, pair, *ones):
        shapes = [VisualShape(m.kind, *m.original_size, len(m.tiles) if m.kind == "video" else 1) for m in media]
        shape = family.shape
        expected = expected_counts(
            shape.geometry,
            PLANS[name],
            shapes,
            num_vision_blocks=shape.num_vision_blocks,
            num_decoder_layers=shape.num_decoder_layers,
        )
        encoded = family.model.encode(media, PLANS[name], trace=False)
        measured = sum(mm_item.feature_KD.shape[0] for mm_item in encoded)
        assert expected.num_patches == sum(mm_item.num_patches for mm_item in encoded)
        assert expected.num_vision_tokens == sum(family.model.num_vision_tokens(mm_item) for mm_item in media)
        bound = expected.num_vision_tokens_kept
        assert measured == bound if expected.exact else 0 < measured <= bound
        left = sum(mm_item.num_patches_kept for mm_item in encoded)
        assert left == expected.num_patches_kept  # no reducer here leaves a count to the picture
        exact += expected.exact
    # geometric: one image over the budget of two tiles, one with padding, one with both
    assert exact == (6 if name in {"empty", "released"} else 3)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A tiny model with a budget of two tiles, so that large images are resized."""
    folder = str(make_onevision(tmp_path_factory.mktemp("counted"), max_tiles=2))
    model = load_family(folder, dtype=torch.float32, device="cpu")
    return SimpleNamespace(model=model, preprocessor=load_preprocessor(folder), shape=load_model_shape(folder))
