"""The tables of what readers cost and what packet sizes are worth, each made of result files alone."""

from __future__ import annotations

from collections import Counter

from benchmarks.common.result_files import results


def capacity_table() -> str:
    """What one item costs a reader, and how many cores of readers a GPU of the predicted speed takes."""
    lines = [
        "| clip of 720p, 8 frames taken | read from | CPU seconds an item | fetched | items an hour and core "
        "| **cores a GPU** | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results("reader_capacity"):
        where = f"{result['machine']['cpu']}, {result['rounds']} items each"
        for one in result["results"]:
            clip = f"{one['setting']['duration_s']} s, {one['num_bytes'] / 1e6:.1f} MB"
            for name, side in one["sides"].items():
                low, high = side["cpu_s_range"]
                fetched = f"{side['bytes_fetched'] / 1e6:.1f} MB" if side["bytes_fetched"] else "-"
                lines.append(
                    f"| {clip} | {name} | {side['cpu_s']:.2f} ({low:.2f} to {high:.2f}) | {fetched} "
                    f"| {3600 / side['cpu_s']:,.0f} | **{side['cores_per_gpu']:.1f}** | {where} |"
                )
    return "\n".join(lines)


def waits_table() -> str:
    """What jobs of one reader wait for, by the rate of a model that only sleeps."""
    lines = ["| the model does | one reader | the job's progress lines |", "|---|---|---|"]
    for result in results("reader_capacity"):
        for job in result["jobs"]:
            said = Counter(line.partition(" (")[0] for line in job["waits"])
            most, count = said.most_common(1)[0]
            lines.append(
                f"| {job['model_items_per_h']:,.0f} items an hour | {job['items_per_h']:,.0f} items an hour came out "
                f"| {most}: {count} of {len(job['waits'])} |"
            )
    return "\n".join(lines)


def frame_budgets_table() -> str:
    """What is answered right with fewer frames: evenly spread, or where the file spends its bytes."""
    lines = [
        "| clips | questions | all 8 frames | kept | evenly spread | `by: packets` | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results("frame_budgets"):
        for name, found in result["results"].items():
            for key in (key for key in found if key.endswith("_frames") and key != "all_frames"):
                pair = found[key]
                change = [100 * pair["difference"][end] for end in ("mean", "low", "high")]
                lines.append(
                    f"| {name} | {found['num_questions']} | {found['all_frames']['mean']:.1%} | {key[:-7]} "
                    f"| {pair['evenly']['mean']:.1%} | {pair['packets']['mean']:.1%} "
                    f"| {change[0]:+.1f} [{change[1]:+.1f}, {change[2]:+.1f}] |"
                )
    return "\n".join(lines)
