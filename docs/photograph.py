"""Make the pictures of docs/pictures.md: a report light and dark, wide and narrow, a drawn page, and a sweep.

  python docs/photograph.py [report] [drawn] [sweep]

Runs the shipped jobs with the bundled model over freshly rendered clips and one broken file; the sweep takes a quarter
of an hour on two cores. Pages are photographed by headless Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
NUM_CLIPS = 40
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking"]
_QUALITY, _MOST_PX = 82, 960


def main(names: list[str]) -> None:
    """Make the named pictures; all of them where none is named."""
    folder = Path("runs", "pictures")
    shutil.rmtree(ROOT / folder, ignore_errors=True)
    render = [sys.executable, "-m", "benchmarks.toy_model.data.render_clips", "--folder", str(folder / "clips")]
    _run(*render, "--count", str(NUM_CLIPS), "--kinds", "motion", "order")
    source = [f"input.uri={folder}/clips/", f"input.manifest={folder}/clips/questions.jsonl"]
    for each, make in {"sweep": _sweep, "report": _report, "drawn": _drawn}.items():
        if not names or each in names:
            make(folder, source)


def _report(folder: Path, source: list[str]) -> None:
    folder = ROOT / folder
    (folder / "clips" / "broken.mp4").write_text("no video\n")
    with (folder / "clips" / "questions.jsonl").open("a") as lines:
        lines.write(
            '{"uri": "broken.mp4", "question": "What shape is it?", "reference": "circle", "category": "what"}\n'
        )
    _illava("answer", "configs/demo_questions.yaml", "runs/pictures/run", source, codes=(3,))
    _run(sys.executable, "-m", "pipeline", "report", "runs/pictures/run", "--overlays", "2")
    page, items = _without_root(folder / "run" / "report.html"), folder / "items.html"
    text = page.read_text("utf-8")
    from_items = text.rindex("<h2>", 0, text.index('id="item-1"'))
    items.write_text(text[: text.index("<h1>")] + text[from_items:], "utf-8")
    _photograph(page, "report_light", folder, 1280, 1500)
    _photograph(items, "report_dark", folder, 1280, 1100, dark=True)
    _photograph(page, "report_phone_light", folder, 390, 1250)
    _photograph(items, "report_phone_dark", folder, 390, 1250, dark=True)


def _drawn(folder: Path, source: list[str]) -> None:
    settings = ["input.pattern=clip_003.mp4", "reduction.preset=tome-small-video"]
    _illava("draw", "configs/draw_demo.yaml", "runs/pictures/drawn", settings)
    folder = ROOT / folder
    _photograph(_without_root(folder / "drawn" / "kept_tokens.html"), "drawn_page", folder, 1280, 1640)


def _sweep(folder: Path, source: list[str]) -> None:
    _illava("sweep", "configs/sweep_demo.yaml", "runs/pictures/sweep", [*source, "only=[decoder]"])
    shutil.copy(ROOT / folder / "sweep" / "decoder.svg", IMAGES / "sweep.svg")


def _illava(command: str, config: str, output: str, sets: list[str], codes: tuple[int, ...] = (0,)) -> None:
    flags = [part for one in [*sets, f"output.uri={output}"] for part in ("--set", one)]
    _run(sys.executable, "-m", "pipeline", command, "--config", config, *flags, codes=codes)


def _without_root(page: Path) -> Path:
    """A copy of a page, whose addresses are those below the repository's root."""
    copy = page.with_suffix(".copy.html")
    copy.write_text(page.read_text("utf-8").replace(f"{ROOT}/", ""), "utf-8")
    return copy


def _photograph(page: Path, name: str, folder: Path, width: int, height: int, *, dark: bool = False) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("no chromium: apt-get install -y --no-install-recommends chromium")
    shot = folder / f"{name}.png"
    wanted = [f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}", f"--screenshot={shot}"]
    _run(browser, *FLAGS, *wanted, f"--blink-settings=preferredColorScheme={0 if dark else 1}", page.as_uri())
    picture = Image.open(shot).convert("RGB")
    picture.thumbnail((_MOST_PX, 4 * _MOST_PX), Image.Resampling.LANCZOS)
    picture.save(IMAGES / f"{name}.webp", quality=_QUALITY, method=6)


def _run(*command: str, codes: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode not in codes:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")


if __name__ == "__main__":
    main(sys.argv[1:])
