"""The first hour of a new user: the commands of two pages, one after the other, as they stand there.

On the bundled model and clips, without Ray. Estimates have a suite of their own (test_probe_and_budget). Time: 50 s of
one core.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.docs_pages import ROOT, blocks, commands_of

pytestmark = pytest.mark.long
FIRST_HOUR = {"docs/quickstart.md": 5, "docs/recipes/evaluate-a-plan.md": 6}
OUTSIDE = ("s3://", "huggingface_hub", "--estimate", "configs/answer_questions.yaml", "mmvet", "illava sweep")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The repository as far as a job needs it, and nothing that an earlier run has written."""
    for name in ("jobs", "configs", "pipeline", "illava"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("page", FIRST_HOUR)
def test_the_commands_of_a_page_run_in_their_order(page, checkout) -> None:
    done = 0
    for block in (one for one in blocks("sh", "yaml") if one.page == ROOT / page):
        if block.language == "yaml":
            if block.mark == "job":
                (checkout / "my_job.yaml").write_text(block.text)
            continue
        for words in commands_of(block.text):
            if words[0] != "illava" or any(sign in " ".join(words) for sign in OUTSIDE):
                continue
            local = ["--set", "runtime.executor=local"] if words[1] in ("caption", "answer", "draw") else []
            ended = subprocess.run(
                [sys.executable, "-m", "pipeline", *words[1:], *local],
                cwd=checkout,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stderr[-2000:]}"
            done += 1
    assert done == FIRST_HOUR[page]
