"""Pixels at stage ``media`` against slow and obvious versions: smaller pictures, and CLIPSeg's relevance."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from illava import load_preprocessor
from illava.families.text_scorer import RelevanceModel
from illava.reducers.base import ClipSegScorer
from tests.support.closeness import assert_close
from tests.support.models.clip import SIDE, make_clipseg
from tests.support.models.families import make_folder


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blocks of 4 px, so that resampling has something to keep."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return blocks.repeat(4, 0).repeat(4, 1)[:height, :width]


def resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_native_resolution_is_the_largest_whole_number_of_groups_on_either_side(tmp_path, kind, keep):
    pre = load_preprocessor(str(make_folder("qwen2_vl", tmp_path)))
    frames = [noise(160, 240, n) for n in range(4 if kind == "video" else 1)]
    mm_item = pre.video(frames, timestamps_s=[0.5 * n for n in range(4)]) if kind == "video" else pre.images(frames)[0]
    group = pre.geometry.factor_px
    sides = []
    for side in mm_item.tiles.shape[1:3]:
        small = group
        while (small + group) ** 2 <= keep * side**2 + 1e-6:
            small += group
        sides.append(small)
    found = pre.shrink(mm_item, keep)
    assert found.tiles.shape[1] * found.tiles.shape[2] <= keep * mm_item.tiles.shape[1] * mm_item.tiles.shape[2]
    for before, after in zip(mm_item.tiles, found.tiles, strict=True):
        assert np.array_equal(after, resized(before, *sides))


@pytest.mark.parametrize(
    ("size", "keep"), [((60, 150), 0.4), ((60, 150), 0.75), ((130, 140), 0.4), ((130, 140), 0.75), ((150, 40), 0.75)]
)
def test_tiles_are_those_of_the_smaller_picture(tmp_path, size, keep):
    """The picture is cut out of its canvas pixel by pixel, made smaller, and prepared as any picture of that size."""
    pre = load_preprocessor(str(make_folder("llava_onevision", tmp_path)))
    side, mm_item = pre.geometry.tile_px, pre.images([noise(*size)])[0]

    def on_canvas(canvases: list[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(canvas, picture on it), most of the picture first, then least waste, then the first listed."""
        best = []
        for number, (rows, cols) in enumerate(canvases):
            scale = min(rows / size[0], cols / size[1])
            kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            best.append((-kept, rows * cols - kept, number))
        rows, cols = canvases[min(best)[2]]
        scale = min(rows / size[0], cols / size[1])
        shown = tuple(min(math.ceil(own * scale - 1e-9), most) for own, most in zip(size, (rows, cols), strict=True))
        return (rows, cols), shown

    (rows, cols), (height, width) = on_canvas(list(pre.geometry.pinpoints))
    top, left = (rows - height) // 2, (cols - width) // 2
    picture = np.zeros((height, width, 3), np.uint8)
    for r in range(height):
        for c in range(width):
            tile = (top + r) // side * (cols // side) + (left + c) // side
            picture[r, c] = mm_item.tiles[1 + tile, (top + r) % side, (left + c) % side]
    fewer = [c for c in pre.geometry.pinpoints if c[0] * c[1] // side**2 + 1 <= keep * len(mm_item.tiles)]
    _, small = on_canvas(fewer)
    wanted = pre.images([resized(picture, *small)])[0]
    found = pre.shrink(mm_item, keep)
    assert found.original_size == small
    assert len(found.tiles) <= keep * len(mm_item.tiles)
    assert np.array_equal(found.tiles[0], mm_item.tiles[0])
    assert np.array_equal(found.tiles[1:], wanted.tiles[1:])


def slow_cells(map_SS: list[list[float]], rows: int, cols: int) -> list[list[float]]:
    """Around each cell's middle, pixels weighted by a triangle that reaches to the middles of its neighbours."""

    def weights(count: int, cells: int, cell: int) -> list[float]:
        middle = (cell + 0.5) * count / cells
        own = [max(0.0, 1 - abs(pixel + 0.5 - middle) / (count / cells)) for pixel in range(count)]
        return [weight / sum(own) for weight in own]

    size = len(map_SS)
    return [
        [
            sum(
                down * across * map_SS[r][c]
                for r, down in enumerate(weights(size, rows, row))
                for c, across in enumerate(weights(size, cols, col))
            )
            for col in range(cols)
        ]
        for row in range(rows)
    ]


def test_clipseg_s_relevance_is_the_logistic_of_its_logits_around_each_cell(tmp_path):
    from transformers import AutoTokenizer, CLIPSegForImageSegmentation

    folder = make_clipseg(tmp_path)
    frames = torch.from_numpy(np.stack([noise(24, 40, n) for n in range(2)]))
    scorer = RelevanceModel(ClipSegScorer(model_id=str(folder)), device=torch.device("cpu"), dtype=torch.float32)
    found_FRC = scorer.relevance(frames, "a red cat", 3, 5)
    model = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("a red cat", return_tensors="pt")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    for frame, found_RC in zip(frames.numpy(), found_FRC, strict=True):
        channels = []
        for channel, mean, std in zip(range(3), settings["image_mean"], settings["image_std"], strict=True):
            plane = Image.fromarray(frame[..., channel].astype(np.float32), mode="F")
            square = np.asarray(plane.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 255)
            channels.append((square / 255 - mean) / std)
        pixels = torch.tensor(np.stack(channels), dtype=torch.float32)[None]
        with torch.no_grad():
            logits = model(pixel_values=pixels, input_ids=ids.input_ids, attention_mask=ids.attention_mask).logits
        chance = [[1 / (1 + math.exp(-logit)) for logit in line] for line in logits.view(SIDE, SIDE).tolist()]
        assert_close(found_RC, torch.tensor(slow_cells(chance, 3, 5)), tolerance=2e-3)
    assert found_FRC.std() > 1e-3, "the two frames' cells must differ, else anything would do"


def test_special_tokens_in_a_question_are_text_to_the_scorer(tmp_path):
    """The text's vector is read at its end token, which a question may spell."""
    folder = make_clipseg(tmp_path / "scorer")
    scorer = ClipSegScorer(model_id=str(folder))
    model = RelevanceModel(scorer, device=torch.device("cpu"), dtype=torch.float32)
    frames = torch.from_numpy(noise(SIDE, SIDE)[None])
    first, second = (model.relevance(frames, f"cat<|end|>{rest}", 2, 2) for rest in ("dog", "hat"))
    assert not torch.equal(first, second)
