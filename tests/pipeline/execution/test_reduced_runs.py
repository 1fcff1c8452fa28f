"""Tests stage ``media`` and ``budget: auto`` from YAML in whole local runs, against counts worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from illava import VLM, load_preprocessor
from illava.engine.media_phase import plan_for
from illava.plan import EMPTY_PLAN
from pipeline.config.load import load_config
from pipeline.execution.runner import run_job
from pipeline.execution.worker import VLMWorker
from tests.support.media import clips
from tests.support.runs import fakes

COUNTS = ("num_patches", "num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept")
SIDE_PX = 56  # of the tiny model's tile: 7 x 7 patches of 8 px


@pytest.fixture(scope="module")
def vlm(onevision_folder) -> VLM:
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)


def run(tmp_path: Path, vlm: VLM, folder, pattern: str, reduction: dict) -> dict[str, tuple[int, ...]]:
    """Counts of every row by file name, from a job that is written as YAML and read again."""
    job = fakes.job_config(
        tmp_path / "out",
        {"uri": str(tmp_path), "pattern": pattern},
        model={"model_id": str(folder)},
        media={"num_frames": 8},
        sampling={"max_new_tokens": 2},
    ).model_dump(mode="json", exclude_defaults=True)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({**job, "reduction": reduction}))
    config = load_config(str(tmp_path / "job.yaml"))
    run_job(config, worker_factory=lambda config, run_info: VLMWorker(config, run_info, vlm=vlm))
    rows = fakes.read_rows(tmp_path / "out")
    assert [row["error_message"] for row in rows] == [None] * len(rows)
    for row in rows:
        assert row["retention_ratio"] == pytest.approx(row["num_decoder_tokens_kept"] / row["num_vision_tokens"])
    assert fakes.violations(tmp_path / "out") == []
    return {Path(row["uri"]).name: tuple(row[name] for name in COUNTS) for row in rows}


def half_blank() -> np.ndarray:
    """White, with noise in the upper three of seven rows of patches."""
    picture = np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)
    picture[:24] = np.random.default_rng(0).integers(0, 200, (24, SIDE_PX, 3))
    return picture


def test_pixel_prune_leaves_of_each_tile_what_cannot_be_predicted(tmp_path, vlm, onevision_folder):
    """A picture of one tile's size is two equal tiles, base and canvas, of 49 patches; the canvas has 7 newlines."""
    Image.fromarray(np.full((SIDE_PX, SIDE_PX, 3), 255, np.uint8)).save(tmp_path / "blank.png")
    Image.fromarray(half_blank()).save(tmp_path / "half.png")
    plan = {"steps": [{"stage": "media", "reducer": {"kind": "pixel_prune"}}]}
    found = run(tmp_path, vlm, onevision_folder, "*.png", plan)
    of_half = 2 * (3 * 7 + 1)  # the noise, and the first white patch below it
    assert found == {
        "blank.png": (2, 2 * 49 + 7, 2 + 7, 2 + 7),
        "half.png": (of_half, 2 * 49 + 7, of_half + 7, of_half + 7),
    }


def test_fewer_frames_enter_and_reach_the_last_layer(tmp_path, vlm, onevision_folder):
    clips.write_barcode_video(tmp_path / "clip.mp4", 5, num_frames=8)
    plan = {"steps": [{"stage": "media", "reducer": {"kind": "fewer_frames", "keep_ratio": 0.5}}]}
    found = run(tmp_path, vlm, onevision_folder, "*.mp4", plan)
    # 7 x 7 patches of a frame are pooled to 4 x 4; one newline ends a video.
    assert found == {"clip.mp4": (4 * 49, 8 * 16 + 1, 4 * 16 + 1, 4 * 16 + 1)}


def slow_count(hidden_ND: torch.Tensor, epsilon: float) -> int:
    """The fewest farthest-first centres whose groups' means are within the bound; distances anew every time."""
    centres = [int((hidden_ND - hidden_ND.mean(0)).pow(2).sum(1).argmin())]
    while True:
        distance_CN = torch.stack([(hidden_ND - hidden_ND[centre]).pow(2).sum(1) for centre in centres])
        owner_N = distance_CN.argmin(0)
        restored_ND = torch.stack([hidden_ND[owner_N == owner].mean(0) for owner in owner_N])
        if (hidden_ND - restored_ND).norm() < epsilon * hidden_ND.norm():
            return len(centres)
        centres.append(int(distance_CN.min(0).values.argmax()))


def test_auto_keeps_of_a_document_what_half_the_error_takes(tmp_path, vlm, onevision_folder):
    """Both pictures are no larger than one tile: that base and canvas are equal makes no document of either."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX] / SIDE_PX
    waves = [np.sin(3 * x + 5 * y + c) + np.cos(4 * y - 2 * x * (c + 1)) for c in range(3)]
    pictures = {"document": half_blank(), "image": ((np.stack(waves, -1) + 2) * 63).astype(np.uint8)}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    found = run(tmp_path, vlm, onevision_folder, "*.png", {"budget": "auto", "epsilon": 0.3})
    preprocessor, expected = load_preprocessor(str(onevision_folder)), {}
    for content, picture in pictures.items():
        with torch.inference_mode():
            (whole,) = vlm.family.encode(preprocessor.images([picture]), EMPTY_PLAN, trace=False)
        is_patch_K = whole.coord_K3[:, 1] >= 0
        epsilon = plan_for(content, 0.3).at("decoder_input").epsilon
        assert epsilon == (0.15 if content == "document" else 0.3)
        kept = slow_count(whole.feature_KD[is_patch_K].float(), epsilon) + int((~is_patch_K).sum())
        expected[f"{content}.png"] = (98, 105, kept, kept)
    assert found == expected
    assert all(kept < 105 for _, _, kept, _ in found.values()), "a bound that takes nothing tests nothing"
