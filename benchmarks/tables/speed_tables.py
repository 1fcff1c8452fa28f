"""The tables of speed in docs/benchmarks.md and README, each made of result files alone.

Ratios only, wherever a CPU measured them; knows nothing of the pages.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.common.result_files import results


def summary_table() -> str:
    """Five rows for README: what reduction and the engine are worth, each beside what it was measured against."""
    (speed,) = (
        found
        for found in results("reduction_speed")
        if (found["setting"]["dtype"], found["setting"]["preset"]) == ("float32", "illava-video")
    )
    whole = [found for found in results("engine_vs_transformers") if found["cells"]]
    engine = max(whole, key=lambda found: found["cells"][0]["batch"])
    vllm = max(results("engine_vs_vllm"), key=lambda found: found["setting"]["dtype"] == "bfloat16")
    (cell,), (beside,) = engine["cells"], vllm["cells"]
    clips, pairs = speed["setting"]["frames"], beside["ratios"]
    rows = [
        (f"vision tower, 1 clip of {clips} frames", "no merging", speed["ratios"]["tower_plan_speedup"], speed),
        (f"prefill, 1 clip of {clips} frames", "no merging", speed["ratios"]["prefill_plan_speedup"], speed),
        (_end_to_end(cell), "stock transformers", cell["ratios"]["plan_vs_stock"]["total"]["median"], engine),
        (_end_to_end(beside), "vLLM, CPU build", pairs["plan_vs_vllm"], vllm),
        (_end_to_end(beside) + ", **nothing merged**", "vLLM, CPU build", pairs["empty_vs_vllm"], vllm),
    ]
    lines = ["| measured with `illava` presets | against | times as fast | processor, dtype |", "|---|---|---|---|"]
    return "\n".join(
        [
            *lines,
            *(
                f"| {what} | {peer} | **{ratio:.2f}x** | {_cpu_of(of['machine'])}, {of['setting']['dtype']} |"
                for what, peer, ratio, of in rows
            ),
        ]
    )


def _end_to_end(cell: dict[str, Any]) -> str:
    frames = f"{cell['frames']} frame{'s' * (cell['frames'] > 1)}"
    return f"end to end, {cell['batch']} clips of {frames}"


def speed_table() -> str:
    """Ratios of tower and prefill time, one row a measured setting."""
    lines = [
        "| model shapes (random weights) | preset, layout | input | dtype | tower | prefill | empty plan vs stock: "
        "tower | prefill | machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results("reduction_speed"):
        setting, ratio, machine = result["setting"], result["ratios"], result["machine"]
        side = setting.get("image")
        read = f"a picture of {side} px" if side else f"{setting['frames']} frame{'s' * (setting['frames'] > 1)}"
        where = device_of(machine)
        tower, prefill = (
            f"{ratio[key]:.2f}x" if key in ratio else "" for key in ("tower_empty_vs_stock", "prefill_empty_vs_stock")
        )
        lines.append(
            f"| {setting['size']} | {setting['preset']}, {setting['layout']} | {read} "
            f"| {setting['dtype']} "
            f"| **{ratio['tower_plan_speedup']:.2f}x** | **{ratio['prefill_plan_speedup']:.2f}x** "
            f"| {tower} | {prefill} | {where} |"
        )
    return "\n".join(lines)


def device_of(machine: dict[str, Any]) -> str:
    """The GPU, or the CPU and the threads that were used."""
    return machine["gpu"] or f"{_cpu_of(machine)}, {machine['torch_threads']} threads"


def _cpu_of(machine: dict[str, Any]) -> str:
    """The processor, and whether it multiplies bfloat16, where that was recorded."""
    native = {True: " with native bfloat16", False: " without native bfloat16"}
    return machine["cpu"] + native.get(machine.get("native_bfloat16"), "")


def family_speed_table() -> str:
    """The same ratios for other families, at true tower shapes."""
    lines = [
        "| tower (random weights) | preset | patches | visual tokens at the LLM's first, last layer | tower | prefill "
        "| empty plan vs stock: tower | prefill | decoder | machine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results("family_speed"):
        setting, ratio, machine = result["setting"], result["ratios"], result["machine"]
        empty, plan = result["median"]["empty"], result["median"]["plan"]
        where = device_of(machine)
        lines.append(
            f"| {setting['size']} | {setting['preset']}, {setting['layout']} | {empty['patches']:.0f} "
            f"| {empty['vision_tokens_kept']:.0f} -> {plan['vision_tokens_kept']:.0f}, "
            f"{plan['decoder_tokens_kept']:.0f} "
            f"| **{ratio['tower_plan_speedup']:.2f}x** | **{ratio['prefill_plan_speedup']:.2f}x** "
            f"| {ratio['tower_empty_vs_stock']:.2f}x | {ratio['prefill_empty_vs_stock']:.2f}x "
            f"| {setting['decoder_layers']} layers, {setting['decoder_narrower_by']} times narrower "
            f"| {where}, {setting['dtype']}, {setting['rounds']} rounds |"
        )
    return "\n".join(lines)


def engine_table() -> str:
    """The engine against stock `generate`, one row a cell and comparison: median ratio, range of the rounds."""
    lines = [
        "| model shapes (random weights) | clips x frames | what against what | tower | prefill | decode step "
        "| end to end | machine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    words = {
        "empty_vs_stock": "no merging against stock",
        "plan_vs_stock": "{} against stock",
        "plan_vs_empty": "{} against no merging",
    }
    for result in results("engine_vs_transformers"):
        setting, machine = result["setting"], result["machine"]
        where, rounds = device_of(machine), f"{setting['rounds']} rounds"
        whole = [(cell["batch"], cell["frames"], cell["ratios"], rounds) for cell in result["cells"]]
        for batch, frames, ratios, how in whole + _alone(result, setting):
            for name, said in words.items():
                by_stage = ratios[name]
                stages = " | ".join(_ratio(by_stage.get(stage)) for stage in ("tower", "prefill", "decode", "total"))
                lines.append(
                    f"| {setting['size']}, {setting['dtype']} | {batch} x {frames} "
                    f"| {said.format(setting['preset'])} | {stages} | {where}, {how} |"
                )
    return "\n".join(lines)


def _alone(result: dict[str, Any], setting: dict[str, Any]) -> list[tuple[int, int, dict[str, Any], str]]:
    """Batch, frames, ratios by pair and stage, and how: what was measured alone of a batch in one row."""
    cells, how = result.get("stage_cells", []), f"{setting['rounds']} rounds of each stage alone"
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for cell in cells:
        of_batch = found.setdefault((cell["batch"], cell["frames"]), {name: {} for name in cell["ratios"]})
        for name, ratio in cell["ratios"].items():
            of_batch[name][cell["stage"]] = ratio
    return [(*where, ratios, how) for where, ratios in found.items()]


def vllm_table() -> str:
    """End to end beside vLLM and stock transformers in one run; medians of the rounds."""
    lines = [
        "| model shapes (random weights) | clips x frames, tokens out | what | against vLLM | against stock "
        "| machine |",
        "|---|---|---|---|---|---|",
    ]
    for result in results("engine_vs_vllm"):
        setting, machine = result["setting"], result["machine"]
        for cell in result["cells"]:
            for side, said in (("empty", "no merging"), ("plan", setting["preset"])):
                vllm, stock = (cell["ratios"][f"{side}_vs_{peer}"] for peer in ("vllm", "stock"))
                lines.append(
                    f"| {setting['size']}, {setting['dtype']} | {cell['batch']} x {cell['frames']}, "
                    f"{setting['new_tokens']} | {said} | **{vllm:.2f}x** | **{stock:.2f}x** "
                    f"| {_cpu_of(machine)}, {machine['cores']} cores, {setting['rounds']} rounds |"
                )
    return "\n".join(lines)


def readers_table() -> str:
    """What isolation and ranged reads cost a reader, in wall time: median of the rounds and their range."""
    lines = [
        "| file | decord in its child against in this process | ... against decord alone, unchecked "
        "| PyAV in its child against in this process | ranged against whole, time "
        "| bytes a ranged read takes | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results("reader_throughput"):
        machine = result["machine"]
        for one in result["results"]:
            setting, wall = one["setting"], one["ratios"]["wall_s"]
            names = ("isolation", "isolated_against_decord_alone", "isolation_pyav", "ranged_against_whole")
            ratios = " | ".join(_ratio(wall[name]) for name in names)
            where = f"{machine['cpu']}, {machine['cores']} cores, {result['rounds']} rounds"
            taken = f"{setting['duration_s']} s, {setting['side_px']} px, {setting['num_frames']} frames taken"
            lines.append(f"| {taken} | {ratios} | {one['ranged_bytes_ratio']:.1%} | {where} |")
    return "\n".join(lines)


def pipeline_table() -> str:
    """What the pipeline costs beside a model that costs nothing."""
    lines = ["| measured | result | machine |", "|---|---|---|"]
    for result in results("pipeline_overhead"):
        machine, plan = result["machine"], result["plan"]
        where = f"{machine['cpu']}, {machine['cores']} cores"
        for run in result["runs"]:
            slope = run["driver_bytes_per_10k_items"]
            memory = f"; driver memory {slope / 2**20:+.2f} MiB per 10,000 items" if slope is not None else ""
            lines.append(
                f"| {run['num_items']:,} items through Ray | **{run['items_per_s']:.0f} items/s**, "
                f"{run['driver_cpu_ms_per_item']:.1f} ms of the driver's CPU each{memory} "
                f"| {where}, load {run['load_average']:.0f} |"
            )
        lines.append(f"| a manifest of {plan['num_items']:,} rows planned | **{plan['cpu_s']:.1f} s** CPU | {where} |")
    return "\n".join(lines)


def ray_data_table() -> str:
    """The same job through this pipeline and through Ray Data; then with one file that is no video."""
    said = {
        "ours": "this pipeline",
        "ray_data": "Ray Data",
        "ray_data_errors_allowed": "Ray Data, `max_errored_blocks=-1`",
    }
    lines = [
        "| one job on two cores | items/s, start of actors included | from the first file to the last "
        "| with one bad file: ended as | rows written | the bad file's row |",
        "|---|---|---|---|---|---|",
    ]
    for result in results("ray_data_baseline"):
        for name, words in said.items():
            bad = result["bad_item"][name]
            rates = [result[key].get(name) for key in ("items_per_s", "steady_items_per_s")]
            shown = " | ".join(f"{median(values):.2f}" if values else "-" for values in rates)
            lines.append(
                f"| {words} | {shown} | {bad['ended']} | {bad['num_rows']} of {result['bad_item']['num_items']} "
                f"| {bad['bad_item']} |"
            )
    return "\n".join(lines)


def grammar_table() -> str:
    """What grammars cost a decode step of a whole batch: the host's masks by kind, then the masked draw."""
    lines = [
        "| of a step of the whole batch | rows | logits | median | 99 % within | machine |",
        "|---|---|---|---|---|---|",
    ]
    for result in results("grammar_cost"):
        parts = {f"masks on the host: {kind}": taken for kind, taken in result["fill_step"].items()}
        parts |= {
            "masking the logits, on this CPU": result["mask_step_on_cpu"],
            "the greedy draw without a grammar, on this CPU": result["greedy_draw_on_cpu"],
        }
        lines += [
            f"| {part} | {result['batch']} | {result['num_logits']:,} | {taken['median_ms']:.2f} ms "
            f"| {taken['p99_ms']:.2f} ms | {device_of(result['machine'])} |"
            for part, taken in parts.items()
        ]
    return "\n".join(lines)


def quantization_table() -> str:
    """How each weight scheme agrees with the plain model, token by token."""
    lines = [
        "| `model.quantization` | top-1 agreement | KL, nats a token | tokens | machine |",
        "|---|---|---|---|---|",
    ]
    for result in results("quantization_agreement"):
        lines += [
            f"| `{scheme}` | {100 * found['top1_ratio']:.1f} % | {found['kl_nats']:.2g} | {found['num_tokens']} "
            f"| {device_of(result['machine'])} |"
            for scheme, found in result["schemes"].items()
        ]
    return "\n".join(lines)


def _ratio(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['median']:.2f}x ({found['min']:.2f} to {found['max']:.2f})"
