"""The job scripts themselves, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

from tests.support.media import clips
from tests.support.runs.fakes import read_rows, violations

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, cwd: Path = ROOT, options: tuple[str, ...] = (), **environment: str):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    return subprocess.run(
        [sys.executable, *options, *arguments],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("job", ["caption_videos", "caption_images"])
def test_a_job_finds_the_packages_without_an_installation_from_any_folder(tmp_path, job) -> None:
    """-S leaves out .pth files, so an editable install is not seen; the other packages come in by PYTHONPATH."""
    packages = sysconfig.get_path("purelib")
    found = run("-c", "import pipeline", cwd=tmp_path, options=("-S",), PYTHONPATH=packages)
    assert "No module named 'pipeline'" in found.stderr, "the test itself must hide the installation"
    done = run(f"{ROOT}/jobs/{job}.py", "--help", cwd=tmp_path, options=("-S",), PYTHONPATH=packages)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_the_demo_captions_on_local_ray_and_the_same_command_recomputes_nothing(tmp_path) -> None:
    command = ["jobs/caption_videos.py", "--config", "configs/demo.yaml", "--set", f"output.uri={tmp_path / 'out'}"]
    first = run(*command, HOME=str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert "8 ok, 0 partial, 0 failed" in first.stdout
    assert "Traceback" not in first.stderr
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 8
    assert violations(str(tmp_path / "out")) == []
    [example] = [line for line in first.stdout.splitlines() if line.startswith("  example")]
    assert any(f"{Path(row['uri']).name}: {' '.join(row['text'].split())}"[:150] in example for row in rows)
    assert all(row["num_decoder_tokens_kept"] < 0.31 * row["num_vision_tokens"] for row in rows), "merging is on"
    page = (ROOT / "docs/screens.md").read_text("utf-8").partition("## Summary")[2].partition("## Status")[0]
    shown, printed = ([line[:17] for line in text.splitlines() if line[:2] == "  "] for text in (page, first.stdout))
    assert printed == shown, "docs/screens.md shows this command's summary"
    lines = (ROOT / "configs/demo/clips/manifest.jsonl").read_text().splitlines()
    references = {line["uri"]: line["reference"] for line in map(json.loads, lines)}
    num_true = sum(row["text"].strip() == references[Path(row["uri"]).name] for row in rows)
    assert num_true >= 5, "7 where it was made; a near-tie may fall the other way on another machine"
    assert not (tmp_path / ".ray").exists(), "no default token is left in the user's home"
    again = run(*command, HOME=str(tmp_path))
    assert again.returncode == 0
    assert "nothing to do, all 8 items have their rows" in again.stdout


def test_images_and_image_sets_are_captioned(tmp_path, onevision_folder) -> None:
    for n in range(3):
        Image.fromarray(clips.barcode_frame(n, width=120, height=80)).save(tmp_path / f"{n}.png")
    manifest = tmp_path / "items.jsonl"
    manifest.write_text('{"id": "one", "uris": ["0.png"]}\n{"id": "set", "uris": ["1.png", "2.png"]}\n')
    overrides = {
        "input.uri": tmp_path,
        "input.manifest": manifest,
        "model.model_id": onevision_folder,
        "model.revision": "null",
        "model.device": "cpu",
        "model.dtype": "float32",
        "reduction": "{steps: [{stage: decoder_layer, layers: [1], reducer: {kind: illava, keep_ratio: 0.5}}]}",
        "sampling.max_new_tokens": 3,
        "runtime.executor": "local",
        "runtime.gpus_per_actor": 0,
        "output.uri": tmp_path / "out",
    }
    flags = [flag for key, value in overrides.items() for flag in ("--set", f"{key}={value}")]
    done = run("jobs/caption_images.py", "--config", "configs/caption_images_llava_onevision.yaml", *flags)
    assert done.returncode == 0, done.stderr
    rows = {row["item_id"]: row for row in read_rows(tmp_path / "out")}
    assert (rows["one"]["num_frames"], rows["set"]["num_frames"]) == (1, 2)
    assert all(row["decoder"] == "pillow" for row in rows.values())
    assert all(row["num_decoder_tokens_kept"] < row["num_vision_tokens_kept"] for row in rows.values())
