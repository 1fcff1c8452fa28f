"""Reads files of one's own, and says in three lines how a model's answers to them compare with stock transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from illava.families import load_preprocessor
from pipeline.own_files.media_reader import MediaReader
from pipeline.own_files.plain_pictures import PlainPictures
from pipeline.storage.uris import printable

if TYPE_CHECKING:
    from illava.analysis.stock_parity import CaseParity, Parity, ParityCase
    from illava.preprocess import Preprocessor

_MAX_PAGES = 3  # of one document


def parity_of_files(
    model: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    prompt: str = "Describe what you see.",
    num_frames: int = 8,
    max_new_tokens: int = 32,
) -> Parity:
    """Compare a model with stock transformers on these files; each picture and page is a request of its own.

    Args:
        model: folder or hub id.
        files: videos, pictures and documents; of a document the first pages. Without any, a drawn picture and a drawn
            video, where the model reads videos.
        revision: hub commit.
        dtype, device: as `VLM.from_pretrained` takes them.
        prompt: asked about each.
        num_frames: of a video.
        max_new_tokens: of each answer.

    Raises:
        ItemError: a file cannot be read.
        ILLaVAError: the model cannot be loaded, or a request not be answered.
    """
    preprocessor = load_preprocessor(model, revision=revision)
    cases = _of_files(files, preprocessor, prompt, num_frames) if files else _drawn(preprocessor, prompt)
    from illava.analysis.stock_parity import measure_parity  # loads torch, behind what may be refused

    return measure_parity(model, cases, revision=revision, dtype=dtype, device=device, max_new_tokens=max_new_tokens)


def render_parity(parity: Parity) -> str:
    """Say the comparison in three lines, and in one more for each request that differs."""
    cases, compared = parity.cases, [one for one in parity.cases if one.problem is None]
    worst = max((one.logit_difference for one in compared), default=float("nan"))
    same = sum(one.has_same_answer for one in compared)
    ties = sum(one.is_near_tie and not one.has_same_answer for one in compared)
    num_tokens, num_same = sum(one.num_tokens for one in compared), sum(one.num_same_tokens for one in compared)
    visual, prompt = sum(one.num_vision_tokens for one in cases), sum(one.num_prompt_tokens for one in cases)
    beside = f"; {ties} part where stock itself nearly ties" if ties else ""
    lines = [
        f"logits   first tokens' differ by {worst:.1e} of their scale at most; {parity.tolerance:.0e} is allowed in "
        f"{parity.dtype}",
        f"answers  {same} of {len(cases)} the same, token for token ({num_same:,} of {num_tokens:,} tokens){beside}",
        f"tokens   {visual:,} visual of {prompt:,} of prompts; stock makes as many in {len(compared)} of {len(cases)}",
    ]
    lines += [_difference(one) for one in cases if not one.has_same_answer]
    return "\n".join(lines)


def _difference(one: CaseParity) -> str:
    name = printable(one.name, 80)
    if one.problem is not None:
        return f"  {name}: {printable(one.problem, 300)}"
    tie = " (a near tie)" if one.is_near_tie else ""
    ours, stock = (printable(" ".join(text.split()), 120) for text in one.texts)
    return (
        f"  {name}: parts behind {one.num_same_tokens} of {one.num_tokens} tokens{tie}; ours {ours!r}, stock {stock!r}"
    )


def _of_files(files: Sequence[str], preprocessor: Preprocessor, prompt: str, num_frames: int) -> list[ParityCase]:
    from illava.analysis.stock_parity import ParityCase

    found = []
    with MediaReader(preprocessor, num_frames=num_frames) as reader, MediaReader(PlainPictures()) as plain:
        for file in files:
            if reader.kind(file) == "video":
                found.append(ParityCase(file, reader.read(file), prompt))
                continue
            pages = plain.read(file)
            for number, page in enumerate(pages[:_MAX_PAGES], start=1):
                name = f"{file}, page {number}" if len(pages) > 1 else file
                found.append(_picture(name, np.ascontiguousarray(page.tiles[0]), preprocessor, prompt))
    return found


def _picture(name: str, pixels: np.ndarray, preprocessor: Preprocessor, prompt: str) -> ParityCase:
    from illava.analysis.stock_parity import ParityCase

    return ParityCase(name, preprocessor.images([pixels]), prompt, (pixels,))


def _drawn(preprocessor: Preprocessor, prompt: str) -> list[ParityCase]:
    """A picture and a video of coloured waves: what a checkpoint may be tried with where no file is at hand."""
    from illava.analysis.stock_parity import ParityCase

    row, col = np.mgrid[0:336, 0:448]
    frames = np.stack(
        [
            np.stack([127 + 127 * np.sin((row * a + col * b) / 37 + n) for a, b in ((1, 2), (2, 1), (1, -1))], axis=2)
            for n in range(4)
        ]
    ).astype(np.uint8)
    found = [_picture("a drawn picture", frames[0], preprocessor, prompt)]
    if preprocessor.video_resample is not None:
        found.append(ParityCase("a drawn video", (preprocessor.video(frames),), prompt))
    return found
