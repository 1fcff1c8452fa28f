"""The shipped LLaVA-NeXT configuration: its plan and a run of two items, on a model as deep and as finely tiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import clips
from fakes import read_rows
from models_llava_next import VICUNA, make_llava_next
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/caption_images_llava_next.yaml"


def run(*flags: str):
    command = [sys.executable, "jobs/caption_images.py", "--config", CONFIG, *flags]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


def test_the_config_plans_and_captions_two_images(tmp_path) -> None:
    model = make_llava_next(
        tmp_path / "model",
        side=336,
        patch=14,
        template=VICUNA,
        vision={"num_hidden_layers": 24},
        text={"num_hidden_layers": 32},
    )
    for n, (width, height) in enumerate([(672, 336), (400, 600)]):
        Image.fromarray(clips.barcode_frame(n, width=width, height=height)).save(tmp_path / f"{n}.jpg")
    overrides = {
        "input.uri": tmp_path,
        "model.model_id": model,
        "model.revision": "null",
        "model.device": "cpu",
        "model.dtype": "float32",
        "model.kv_cache_bytes": 300_000_000,
        "sampling.max_new_tokens": 2,
        "runtime.executor": "local",
        "runtime.gpus_per_actor": 0,
        "output.uri": tmp_path / "out",
    }
    flags = [flag for key, value in overrides.items() for flag in ("--set", f"{key}={value}")]
    planned = run(*flags, "--plan")
    assert planned.returncode == 0, planned.stderr
    assert "reach the LLM" in planned.stdout
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "out")
    assert [row["error_type"] for row in rows] == [None, None]
    wide, tall = sorted(rows, key=lambda row: row["num_patches"])
    assert tall["num_patches"] == 5 * 576
    assert wide["num_patches"] == 3 * 576  # base and two tiles
    assert wide["num_vision_tokens"] == 576 + 24 * 49
    assert wide["num_vision_tokens_kept"] == 3 * 288 + 24  # a newline per row
    assert wide["num_decoder_tokens_kept"] == round(0.7 * (3 * 288 + 24))
