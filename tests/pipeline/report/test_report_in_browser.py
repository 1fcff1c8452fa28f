"""The report of a real run in headless Chromium: a silent console, no request, overlays there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.load import load_config
from pipeline.execution.runner import run_job
from pipeline.report.figures import run_figures
from pipeline.report.page import render_report
from pipeline.report.write import write_report

ROOT = Path(__file__).resolve().parents[3]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # what the browser itself would like to ask its maker
]
HOSTILE = "<script>console.error('ran')</script><img src=http://127.0.0.1:9/x onerror=console.error('ran')>\x1b[31m\x00"
pytestmark = pytest.mark.long


class Opened:
    """A page as the browser had it.

    Attributes:
        dom: serialised once it was loaded.
        console: what it wrote there.
        requests: every address that the page, not the browser for itself, asked for.
    """

    def __init__(self, path: Path, folder: Path, *, width: int = 1100) -> None:
        browser = shutil.which("chromium")
        if browser is None:
            pytest.fail("no chromium: apt-get install -y --no-install-recommends chromium")
        log = folder / "net.json"
        shutil.rmtree(folder / "profile", ignore_errors=True)
        command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
        command += [f"--window-size={width},2000", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
        self.dom = done.stdout
        self.console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        asked = re.findall(r'"initiator":"([^"]*)".*"url":"([^"]+)"', log.read_text())
        self.requests = [url for initiator, url in asked if initiator != "not an origin"]


@pytest.fixture(scope="module")
def run_uri(tmp_path_factory) -> str:
    """The demo's clips, captioned by the bundled model."""
    output = tmp_path_factory.mktemp("run") / "out"
    keys = ["runtime.executor=local", "prices.cpu_hour_usd=0.04", f"output.uri={output}", "input.limit=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run_job(load_config("configs/demo.yaml", keys))
    return str(output)


def test_the_browser_is_seen_to_complain_and_to_ask(tmp_path) -> None:
    """What the other tests look for can be found at all."""
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('ran')</script><img src=http://127.0.0.1:9/x>")
    opened = Opened(page, tmp_path)
    assert any("ran" in line for line in opened.console)
    assert "http://127.0.0.1:9/x" in opened.requests


def test_the_report_opens_in_peace_with_frames_and_overlays(run_uri, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    opened = Opened(Path(write_report(run_uri, num_samples=3, num_overlays=2)), tmp_path)
    assert (opened.console, opened.requests) == ([], [])
    text = re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", opened.dom)))
    assert "3 ok, 0 partial, 0 failed" in text
    assert text.count("8 of 8 frames, as the model got them") == 3
    assert text.count("kept tokens into the language model: 104 of 1568 patches") == 2
    assert text.count("kept tokens in its last layer: 104 of 1568 patches") == 2
    assert text.count("What the model kept is drawn of the first 2: ") == 1
    assert "differs from the row's" not in text
    assert opened.dom.count('src="data:image/png;base64,') == 3 * 8 + 2 * 2 * 4


def test_hostile_texts_are_texts_in_a_browser_too(run_uri, tmp_path) -> None:
    figures = run_figures(run_uri, num_samples=1)
    row = replace(figures.samples[0], uri=HOSTILE, text=HOSTILE, prompt=HOSTILE, reference=HOSTILE)
    figures.record["config"]["name"] = HOSTILE
    page = tmp_path / "report.html"
    page.write_text(render_report(replace(figures, uri=HOSTILE, samples=(row,), slowest=(row,)), [[]]))
    opened = Opened(page, tmp_path, width=390)
    assert (opened.console, opened.requests) == ([], [])
    assert "<script" not in opened.dom
    assert "<img" not in opened.dom
    shown = "&lt;script&gt;console.error('ran')&lt;/script&gt;&lt;img src=http://127.0.0.1:9/x"
    assert opened.dom.count(shown) >= 6
    assert r"\x1b[31m\x00" in opened.dom


@pytest.mark.parametrize(("scheme", "corner"), [(1, (244, 246, 249)), (0, (17, 21, 27))], ids=["light", "dark"])
def test_the_page_is_light_or_dark_as_the_reader_has_it(run_uri, tmp_path, scheme, corner) -> None:
    page, picture = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(render_report(run_figures(run_uri, num_samples=0), []))
    wanted = [f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}", "--window-size=1280,900"]
    command = [shutil.which("chromium"), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *wanted, page.as_uri()]
    subprocess.run(command, capture_output=True, check=True, timeout=240)
    shown = np.asarray(Image.open(picture).convert("RGB"))
    assert tuple(shown[5, 5]) == corner
    text = shown[:200].mean(-1)
    assert (text < 60).any(), "dark ink, or a dark page"
    assert (text > 220).any()


def test_figures_of_the_report_are_those_of_the_run(run_uri) -> None:
    figures = run_figures(run_uri, num_samples=2)
    finished = json.loads(Path(run_uri, "_RUN.json").read_text())
    assert figures.totals.as_dict() == finished["totals"]
    assert figures.cost == finished["cost"]
    assert figures.finished_at == finished["finished_at"]
