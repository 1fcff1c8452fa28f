"""Limits of the pictures' sizes in a job: the documented examples run, dry runs tell of them. Takes 4 s."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml
from PIL import Image

from docs.generators.configuration import EXAMPLES
from pipeline.config.load import parse_config
from pipeline.errors import ConfigError
from pipeline.execution.runner import run_job
from pipeline.planning.dry_run import ASSUMED_IMAGE_PX, render_dry_run
from pipeline.runs.run import plan_run
from tests.support.models.families import make_folder
from tests.support.runs.fakes import job_config, read_rows, violations

NATIVE, TILED = (yaml.safe_load(text)["media"] for text in EXAMPLES["media"].split("---\n"))
# The tiny model's tokens are 8 x 8 px, those of the example 28 x 28: as many tokens.
SMALL = NATIVE | {name: value * 64 // 28**2 for name, value in NATIVE.items() if name.endswith("_pixels")}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {name: make_folder(name, tmp_path_factory.mktemp(name)) for name in ("qwen2_5_vl", "llava_onevision")}


@pytest.fixture
def pictures(tmp_path):
    """As large as a dry run assumes, so that its counts are the rows'."""
    (tmp_path / "in").mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        side = ASSUMED_IMAGE_PX
        Image.fromarray(pixels).resize((side, side)).save(tmp_path / "in" / f"{number}.png")
    return {"uri": str(tmp_path / "in")}


def job(tmp_path, source, models, model_type, **media):
    return job_config(
        tmp_path / "out",
        source,
        model={"model_id": str(models[model_type]), "dtype": "float32", "kv_cache_bytes": 16 << 20},
        media=media,
        sampling={"max_new_tokens": 2},
    )


def counted(text: str) -> tuple[int, int]:
    """Patches and tokens of an item, by a dry run."""
    found = re.search(r"an item +patches ([\d,]+) -> .* tokens ([\d,]+) ->", text)
    return tuple(int(number.replace(",", "")) for number in found.groups())


@pytest.mark.parametrize(
    "case",
    [
        ("qwen2_5_vl", SMALL, "media.max_pixels 40,960: at most about 640 tokens for an image or 2 frames"),
        ("qwen2_5_vl", {"max_pixels": 1024}, "media.max_pixels 1,024: at most about 16 tokens"),
        ("llava_onevision", TILED, "media.max_tiles 4: at most 245 patches for an image"),
    ],
    ids=["documented, native", "native", "documented, tiled"],
)
def test_rows_have_the_counts_that_a_dry_run_foretold(tmp_path, models, pictures, case) -> None:
    model_type, media, told = case
    config = job(tmp_path, pictures, models, model_type, **media)
    text = render_dry_run(config)
    assert told in text
    without = render_dry_run(job(tmp_path, pictures, models, model_type))
    assert counted(text) != counted(without)
    assert "media.max" not in without
    run_job(config)
    rows = read_rows(tmp_path / "out")
    assert {(row["num_patches"], row["num_vision_tokens"]) for row in rows} == {counted(text)}
    assert violations(tmp_path / "out") == []


def test_a_key_that_the_family_does_not_have_is_refused_before_anything_runs(tmp_path, models, pictures) -> None:
    for model_type, media, words in (
        ("llava_onevision", {"max_pixels": 9000}, r"media: max_pixels has no meaning .* set max_tiles instead"),
        ("llava_onevision", {"total_pixels": 9000, "min_pixels": 9}, "media: min_pixels, total_pixels have no meaning"),
        ("qwen2_5_vl", {"max_tiles": 4}, "media: max_tiles has no meaning for a qwen2_5_vl model"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            plan_run(job(tmp_path, pictures, models, model_type, **media))
        assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    base = {"input": {"uri": "a"}, "model": {"model_id": "b"}, "output": {"uri": "c"}}
    with pytest.raises(ConfigError, match="min_pixels is 9 and max_pixels is 4: lower min_pixels"):
        parse_config(base | {"media": {"min_pixels": 9, "max_pixels": 4}}, source="x")
