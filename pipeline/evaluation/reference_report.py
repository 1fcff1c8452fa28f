"""Prints finished runs over one manifest side by side: texts beside their references, scores, tokens, time.

For intervals see `pipeline.evaluation.compare`.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.evaluation.run_columns import RunColumns, read_run_columns
from pipeline.retention import Retention
from pipeline.storage.uris import printable

_COLUMNS = ("uris", "status", "prompt", "category", "text", "reference", "score")
_COUNTS = (
    "num_patches",
    "num_patches_kept",
    "num_vision_tokens",
    "num_vision_tokens_kept",
    "num_decoder_tokens_kept",
)


def render_references(uris: Mapping[str, str], *, num_shown: int = 6) -> str:
    """Show a few items of each run beside their references, then each run's figures.

    Args:
        uris: run folder by the name it is printed under; all of one manifest.
        num_shown: items printed, spread over the manifest.

    Raises:
        RefusedError: a run that is not finished.
    """
    runs = {name: read_run_columns(uri, (*_COLUMNS, *_COUNTS, "gpu_s")) for name, uri in uris.items()}
    first = next(iter(runs.values()))
    lines = []
    for row in range(0, len(first), -(-len(first) // num_shown)):
        clip = first.columns["uris"][row][0].rpartition("/")[2]
        lines.append(f"{printable(clip, 40)}: {printable(str(first.columns['prompt'][row]), 100)}")
        lines.append(f"  {'reference':<10} {printable(str(first.columns['reference'][row]), 100)}")
        for name, run in runs.items():
            mark = "" if run.columns["score"][row] == 1 else "   (wrong)"
            lines.append(f"  {name:<10} {printable(str(run.columns['text'][row]).strip(), 100)}{mark}")
    lines += ["", *(_figures(name, run, uris[name]) for name, run in runs.items())]
    return "\n".join(lines)


def _figures(name: str, run: RunColumns, uri: str) -> str:
    columns = run.columns
    retention = Retention.of({key: None if None in columns[key] else sum(columns[key]) for key in _COUNTS})
    num_failed = columns["status"].count("failed")
    scores = [
        (category == "caption", score)
        for category, score in zip(columns["category"], columns["score"], strict=True)
        if score is not None
    ]
    captions, answers = ([score for is_caption, score in scores if is_caption is kind] for kind in (True, False))
    return (
        f"{name:<10} captions {sum(captions):.0f}/{len(captions)}, answers {sum(answers):.0f}/{len(answers)} right"
        f"{f', {num_failed} failed' if num_failed else ''}; "
        f"{retention.brief}; "
        f"{sum(columns['gpu_s']):.1f} s of the model's device; {uri}"
    )
