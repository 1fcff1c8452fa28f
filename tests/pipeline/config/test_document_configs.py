"""The configurations of page readers: a dry run and two pages each, on a model as deep and as finely cut up.

About 10 s of one core each, in `make test-long`; one dry run in `make test`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.media.pdf_files import page, write_pdf
from tests.support.models.narrow import make_narrow
from tests.support.runs.fakes import read_rows, violations

ROOT = Path(__file__).resolve().parents[3]
READERS = {"process_documents_olmocr": "qwen2_5_vl", "process_documents_chandra": "qwen3_5"}


def job(config: str, folder: Path, *flags: str, **overrides: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/process_documents.py", "--config", f"configs/{config}.yaml", *flags]
    command += [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.long
@pytest.mark.parametrize("config", READERS)
def test_the_config_plans_and_reads_two_pages(config, tmp_path) -> None:
    write_pdf(tmp_path / "a.pdf", [page(n) for n in range(2)])
    overrides = {
        "input.uri": tmp_path,
        "model.model_id": make_narrow(READERS[config], tmp_path / "model"),
        "model.revision": "null",
        "model.dtype": "float32",
        "model.device": "cpu",
        "model.kv_cache_bytes": 800_000_000,
        "media.page_dpi": 72,  # half the pages' side: seconds, not minutes
        "sampling.max_new_tokens": 2,
        "runtime.executor": "local",
        "runtime.gpus_per_actor": 0,
        "output.uri": tmp_path / "out",
    }
    planned, done = job(config, tmp_path, "--dry-run", **overrides), job(config, tmp_path, **overrides)
    assert planned.returncode == 0, planned.stderr
    assert "into the LLM -> " in planned.stdout
    assert done.returncode == 0, done.stderr
    [row] = read_rows(tmp_path / "out")
    assert [one["status"] for one in row["pages"]] == ["ok", "ok"]
    assert 0 < row["num_decoder_tokens_kept"] == row["num_vision_tokens_kept"] < row["num_vision_tokens"], "blank paper"
    assert violations(tmp_path / "out") == []


def test_an_id_without_a_commit_is_refused_until_one_is_given(tmp_path) -> None:
    """None was seen of olmOCR-2 where its configuration was written, and none is made up."""
    config = yaml.safe_load((ROOT / "configs" / "process_documents_olmocr.yaml").read_text("utf-8"))
    assert config["model"]["revision"] is None
    write_pdf(tmp_path / "a.pdf", [page(0)])
    planned = job(
        "process_documents_olmocr",
        tmp_path,
        "--dry-run",
        **{"input.uri": tmp_path, "output.uri": tmp_path / "out", "runtime.executor": "local"},
    )
    assert planned.returncode == 2, planned.stdout
    assert "revision" in planned.stderr
