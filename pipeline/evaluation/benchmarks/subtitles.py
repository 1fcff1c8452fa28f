"""Reads the text of SubRip (``.srt``) subtitles, whole or at given times."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CUE_TIMES = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")
_TAG = re.compile(r"<[^>]*>")


def subtitle_text(srt: str, *, times_s: Sequence[float] | None = None) -> str:
    """Return one cue a line, markup taken off.

    Args:
        srt: content of the file.
        times_s: only cues that are shown at one of these times; all cues where None.

    Source: lmms-eval 0.7.3 ``lmms_eval/tasks/videomme/utils.py``: all cues under ``gemini_api_flag: full subtitle``,
        those at the sampled frames otherwise. There a cue without a font tag is dropped; here its text is kept.
    """
    lines = []
    for block in re.split(r"\r?\n\s*\r?\n", srt.strip()):
        match = _CUE_TIMES.search(block)
        if match is None:
            continue
        start_s, end_s = _seconds(match.groups()[:4]), _seconds(match.groups()[4:])
        if times_s is not None and not any(start_s <= time_s < end_s for time_s in times_s):
            continue
        text = " ".join(_TAG.sub("", block[match.end() :]).split())
        if text:
            lines.append(text)
    return "\n".join(lines)


def _seconds(parts: Sequence[str]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction) / 10 ** len(fraction)
