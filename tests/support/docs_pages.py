"""README and docs as the tests read them: fenced blocks with their language and mark, tables, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^(?:<!-- run: (?P<mark>[a-z-]+) -->\n\n?)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block.

    Attributes:
        page: its file.
        line: of the fence, from 1.
        language: behind the fence.
        text: inside it.
        mark: of `<!-- run: MARK -->` above it, "" without one.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(text: str, page: Path) -> Iterator[Block]:
    """Every fenced block of a page."""
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"], found["text"], found["mark"] or "")


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in one of these languages."""
    return [one for page in PAGES for one in blocks_of(page.read_text("utf-8"), page) if one.language in languages]


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell block as words: lines joined, `a && b` apart, comments and `[--optional]` gone."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\[--.*?\]", "", line).replace("$(date +%F)", "2026-12-01"), comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


def tables(text: str) -> list[int]:
    """Rows of each table of a page, its head not counted."""
    runs = re.findall(r"(?:^\|.*\|$\n?)+", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), flags=re.M)
    return [run.strip().count("\n") - 1 for run in runs]


def links(text: str) -> list[str]:
    """Targets of links and pictures that are files of this repository, without their anchors."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    return [one for one in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in one]


def paths_named(text: str) -> set[str]:
    """Paths of this repository that a page names in backticks, such as `pipeline/cost.py`."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
    words = {word for span in spans for word in span.split()}
    top = r"(?:illava|pipeline|jobs|configs|benchmarks|tests|docs)/"
    return {word for word in words if re.fullmatch(rf"{top}[\w./-]+|[A-Z]+\.md", word) and "..." not in word}


def modules_named(text: str) -> set[str]:
    """Dotted names of the two packages in backticks or behind `:::`, such as `pipeline.tasks.base.Task`."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M))
    words = {
        word.strip("(),") for span in [*spans, *re.findall(r"^::: (\S+)$", text, flags=re.M)] for word in span.split()
    }
    return {word for word in words if re.fullmatch(r"(?:illava|pipeline)(?:\.\w+)+", word)}
