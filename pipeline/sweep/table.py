"""Renders a sweep's rows as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.sweep.results import COMPONENTS, SweepRow


def markdown_table(rows: Sequence[SweepRow]) -> str:
    """Render the layout of the paper's tables: a row a plan; tokens, quality, seconds by component, memory."""
    head = "| row | model | kept | quality | change [95 %] | top-1 agreement, KL | tower, prefill, decode vs whole | "
    lines = [head + "s an item | memory MiB |", "|---" * 9 + "|"]
    for row in rows:
        quality, change, agreement = "-", "-", "-"
        if row.accuracy is not None:
            quality = f"{row.accuracy:.3f}"
            change = f"{row.difference:+.3f} [{row.difference_low:+.3f}, {row.difference_high:+.3f}]"
        if row.agreement_top1 is not None:
            agreement = f"{row.agreement_top1:.3f}, {row.agreement_kl_nats:.3f}"
        ratios = [_ratio(getattr(row, f"whole_{name}"), getattr(row, name)) for name in COMPONENTS]
        cells = [
            row.row,
            row.model,
            _cell(row.kept_percent, ".0f", " %"),
            quality,
            change,
            agreement,
            ", ".join(ratios),
        ]
        cells += [_cell(row.s_per_item, ".3g"), _cell(row.peak_memory_mib, ".0f")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(whole: float | None, own: float | None) -> str:
    return "-" if whole is None or not own else f"{whole / own:.2f}x"


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
