"""One shipped configuration a family: its plan and a run of two items, on a model as deep and as finely cut up.

The expected counts are worked out here by hand from the published sizes, apart from the code that plans.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from illava.families import FAMILIES
from tests.support.media import clips
from tests.support.models.narrow import make_narrow
from tests.support.runs.fakes import read_rows

ROOT = Path(__file__).resolve().parents[3]


def kept(count: int, *shares: float) -> int:
    for share in shares:
        count = round(count * share)
    return count


# A video of 112 x 168 px in 16 frames is 8 temporal patches of 2 frames: at 14 px a patch 8 x 12 = 24 groups of 2 x 2.
QWEN_LEFT = 8 * kept(24, 0.5, 0.5)
QWEN25_LEFT = 8 * kept(24, *[0.63] * 3)
# At 16 px: 112 -> 128 (112 / 32 = 3.5, rounded to even), 168 -> 160: 8 x 10 patches, 20 groups.
QWEN3_LEFT = 8 * kept(20, 0.5, 0.5)
REVISED_LEFT = 8 * kept(20, *[0.90] * 4)
# family: configuration, and (patches, vision tokens, into the LLM, in its last layer) of both items, ascending
CONFIGS = {
    "llava_next": (
        "caption_images_llava_next",
        [
            # base and two tiles: 576 -> 288 patches each, and a newline a row
            (3 * 576, 576 + 24 * 49, 3 * 288 + 24, 3 * 288 + 24),
            (5 * 576, None, None, None),  # a tall picture: how many survivors lie in its padding, the data decide
        ],
    ),
    # a frame: 196 -> 49; the newline behind the last one stays
    "llava_onevision": ("caption_videos_llava_onevision", [(32 * 729, 32 * 196 + 1, 32 * 49 + 1, 32 * 49 + 1)] * 2),
    "qwen2_vl": ("caption_videos_qwen2_vl", [(768, 192, QWEN_LEFT, QWEN_LEFT)] * 2),
    "qwen2_5_vl": ("caption_videos_qwen2_5_vl", [(768, 192, QWEN25_LEFT, QWEN25_LEFT)] * 2),
    "qwen3_5": ("caption_videos_qwen3_5", [(640, 160, QWEN3_LEFT, QWEN3_LEFT)] * 2),
    "qwen3_vl": ("caption_videos_qwen3_vl", [(640, 160, QWEN3_LEFT, QWEN3_LEFT)] * 2),
    "qwen3_vl_moe": ("caption_videos_qwen3_vl_moe", [(640, 160, QWEN3_LEFT, QWEN3_LEFT)] * 2),
    # 16 frames of one tile: 32 x 32 patches, 256 groups, 128 behind the first cut
    "internvl": ("caption_videos_internvl", [(16 * 1024, 16 * 256, 16 * 64, 16 * 64)] * 2),
}
COLUMNS = ("num_patches", "num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept")


def write_items(folder: Path, config: str) -> None:
    if config.startswith("caption_images"):
        for n, (width, height) in enumerate([(672, 336), (400, 600)]):
            Image.fromarray(clips.barcode_frame(n, width=width, height=height)).save(folder / f"{n}.jpg")
        return
    for n in range(2):
        clips.write_barcode_video(folder / f"{n}.mp4", n, num_frames=40, width=168, height=112)


def plan_and_run(model_type: str, folder: Path, **more: str) -> list[dict]:
    """The rows of a job of the family's configuration, its outside world replaced, and ``more`` set."""
    name, _ = CONFIGS[model_type]
    write_items(folder, name)
    overrides = {
        "input.uri": folder,
        "model.model_id": make_narrow(model_type, folder / "model"),
        "model.revision": "null",
        "model.device": "cpu",
        "model.dtype": "float32",
        "model.kv_cache_bytes": 600_000_000,
        "sampling.max_new_tokens": 2,
        "runtime.executor": "local",
        "runtime.gpus_per_actor": 0,
        "output.uri": folder / "out",
        **more,
    }
    job = f"jobs/{'_'.join(name.split('_')[:2])}.py"
    command = [sys.executable, job, "--config", f"configs/{name}.yaml"]
    command += [flag for key, value in overrides.items() for flag in ("--set", f"{key}={value}")]
    planned, done = (
        subprocess.run([*command, *last], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
        for last in (["--dry-run"], [])
    )
    assert planned.returncode == 0, planned.stderr
    assert "into the LLM -> " in planned.stdout
    assert done.returncode == 0, done.stderr
    result_field = sorted(read_rows(folder / "out"), key=lambda row: row["num_patches"])
    assert [row["error_type"] for row in result_field] == [None, None]
    return result_field


# About 8 s of one core each: the newest family's in `make test`, the others' in `make test-long`.
@pytest.mark.parametrize(
    "model_type", [name if name == "qwen3_vl" else pytest.param(name, marks=pytest.mark.long) for name in CONFIGS]
)
def test_the_config_plans_and_captions_two_items(model_type, tmp_path) -> None:
    for row, counts in zip(plan_and_run(model_type, tmp_path), CONFIGS[model_type][1], strict=True):
        known = {column: count for column, count in zip(COLUMNS, counts, strict=True) if count is not None}
        assert {column: row[column] for column in known} == known
        assert row["num_vision_tokens_kept"] < row["num_vision_tokens"]


@pytest.mark.long
def test_the_revision_of_2026_reduces_whole_groups_of_a_qwen_tower(tmp_path) -> None:
    for row in plan_and_run("qwen3_vl", tmp_path, reduction="{preset: illava-2026}"):
        expected = (640, 160, REVISED_LEFT, kept(REVISED_LEFT, *[0.85] * 4))
        assert tuple(row[column] for column in COLUMNS) == expected


def test_every_family_has_a_configuration() -> None:
    assert set(CONFIGS) == set(FAMILIES)
