"""`jobs/process_documents.py` as it is called: it plans, and reads a document with the bundled model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.report.write import write_report
from tests.support.media.pdf_files import page, write_pdf
from tests.support.runs.fakes import read_rows, violations

ROOT = Path(__file__).resolve().parents[3]


def job(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess:
    write_pdf(tmp_path / "a.pdf", [page(n) for n in range(2)])
    command = [sys.executable, "jobs/process_documents.py", "--config", "configs/process_documents.yaml", *flags]
    overrides = {
        "input.uri": str(tmp_path),
        "media.page_dpi": 36,
        "model.model_id": "configs/demo/model",
        "model.revision": "null",
        "model.dtype": "float32",
        "model.device": "cpu",
        "model.kv_cache_bytes": 50_000_000,
        "reduction": "{preset: none}",
        "sampling.max_new_tokens": 2,
        "runtime.executor": "local",
        "runtime.gpus_per_actor": 0,
        "output.uri": str(tmp_path / "out"),
    }
    command += [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_job_plans(tmp_path) -> None:
    plan = job(tmp_path, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "1 (1 documents)" in plan.stdout
    assert "documents of one A4 page each" in plan.stdout


@pytest.mark.long
def test_the_job_reads_documents_with_the_bundled_model(tmp_path) -> None:
    done = job(tmp_path)
    assert done.returncode == 0, done.stderr
    [row] = read_rows(tmp_path / "out")
    assert [one["status"] for one in row["pages"]] == ["ok", "ok"]
    assert violations(tmp_path / "out") == []
    report = Path(write_report(str(tmp_path / "out"), num_samples=1, num_overlays=1)).read_text()
    assert "kept tokens in its last layer: " in report, "of the first window, as it was asked"
    assert "differs from the row" not in report
