"""Says what a job would do: items, bytes, shards, expected tokens before and after reduction.

Starts neither Ray nor a model, and writes nothing. Counts come from geometry (`illava.token_counts`); rows later carry
what was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from illava.families.model_shape import ModelShape, load_model_shape
from illava.families.qwen.geometry import NativeGeometry
from illava.pixel_limits import PixelLimits
from illava.token_counts import TokenCounts, expected_counts
from pipeline.config.schema import JobConfig
from pipeline.execution.batch_limit import ASSUMED_IMAGE_PX, ItemShape, item_shapes, requests_media
from pipeline.inputs.build_manifest import readable_roots
from pipeline.inputs.links import count_links
from pipeline.inputs.manifest import Manifest
from pipeline.planning.model_fit import model_fit
from pipeline.retention import Retention
from pipeline.runs.earlier_runs import say_earlier_runs
from pipeline.runs.run import pending_shards, plan_run
from pipeline.runs.run_folder import Run
from pipeline.storage import storage
from pipeline.storage.uris import printable


def render_dry_run(config: JobConfig, *, accept: Collection[str] = ()) -> str:
    """Say what the job would do, as text; ``accept`` is as `pipeline.runs.run.plan_run` takes it.

    Raises:
        ConfigError, InputError, RefusedError, StorageError: as the run itself would.
        PlanError, ModelLoadError: the reduction does not fit the model, or its configuration cannot be read.
    """
    run = plan_run(config, accept=accept)
    pending = pending_shards(run)
    shapes = item_shapes(run, pending)
    num_items = sum(shapes.values())
    lines = [
        f"{config.name}: dry run, nothing is run or written",
        _line("items", f"{len(run.manifest):,} ({_kinds(run)}), {_size(run.manifest)}"),
        _line("shards", f"{len(pending):,} of {run.num_shards:,} to do, {run.items_per_shard} items each"),
        _line("model", f"{config.model.model_id}" + (f"@{config.model.revision}" if config.model.revision else "")),
        _line("reduction", _reduction(config)),
        *(_line(*line) for line in model_fit(run, shapes)),
    ]
    if run.manifest.counts:
        lines[2:2] = _labelled("input", run.manifest.counts.lines())
    if config.input.exclude_runs:
        lines += _labelled("earlier runs", say_earlier_runs(run.earlier))
    lines += _labelled("accepted", [str(one) for one in run.accepted])
    lines += _link_lines(run)
    if num_items:
        lines += _token_lines(config, shapes, num_items)
    lines += _cache_lines(run)
    lines.append(_line("output", f"{run.uri} ({_state(run)})"))
    return "\n".join(lines)


def _labelled(label: str, texts: list[str]) -> list[str]:
    """Lines of which the first has the label."""
    return [_line("" if number else label, text) for number, text in enumerate(texts)]


def _state(run: Run) -> str:
    if run.replaces:
        return "takes over from a run of another configuration that published nothing"
    return "resumes" if run.resumed else "new"


def _token_lines(config: JobConfig, shapes: Counter[ItemShape], num_items: int) -> list[str]:
    limits = config.media.pixel_limits
    model = load_model_shape(config.model.model_id, revision=config.model.hub_revision, pixel_limits=limits)
    total = TokenCounts(0, 0, 0, 0, 0)
    for shape, count in shapes.items():
        total += _counts(config, model, shape).times(count)
    lines = _limit_lines(model, limits)
    lines += [_line(label, text) for label, text in Retention.of(total).lines]
    lines.append(_line("an item", Retention.of(total, num_items=num_items).brief))
    notes = []
    if any(kind == "video" for kind, _ in shapes):
        notes.append(f"videos of at least {config.media.num_frames} frames")
    if any(kind == "document" for kind, _ in shapes):
        notes.append("documents of one A4 page each (a document of n pages takes n times that)")
    if any(kind not in {"video", "document"} and count == 1 for kind, count in shapes):
        notes.append(f"images of {ASSUMED_IMAGE_PX} x {ASSUMED_IMAGE_PX} px")
    return [*lines, _line("", "counted for " + " and ".join(notes))] if notes else lines


def _limit_lines(model: ModelShape, limits: PixelLimits) -> list[str]:
    """What the limits of the pictures' sizes are in tokens, or in patches where tiles are read."""
    geometry, lines = model.geometry, list[str]()
    for name, value in limits.named.items():
        if isinstance(geometry, NativeGeometry):
            tokens = value // geometry.factor_px**2
            of_what = "a video" if name == "total_pixels" else f"an image or {geometry.frames_per_patch} frames"
            most = "least" if name == "min_pixels" else "most"
            meaning = f"at {most} about {tokens:,} tokens for {of_what}"
        else:
            meaning = f"at most {(1 + value) * geometry.patches_per_tile:,} patches for an image"
        lines.append(_line("" if lines else "pixels", f"media.{name} {value:,}: {meaning}"))
    return lines


def _link_lines(run: Run) -> list[str]:
    """Links among the media, and those that will be failed rows."""
    roots = readable_roots(run.config)
    if not roots:
        return []
    listed = None if run.config.input.manifest else storage.local_path(run.config.input.uri or "")
    found = count_links(run.manifest, roots, listed=listed)
    lines = []
    if found.num_files:
        lines.append(_line("links", f"{found.num_files:,} objects are links"))
    if found.num_outside:
        lines += [
            _line("", f"{found.num_outside:,} objects lie outside the allowed folders ({', '.join(roots)})"),
            _line(
                "",
                f"and will be failed rows unsafe_uri; --set input.follow_links={printable(found.targets)} allows them",
            ),
        ]
    if found.num_not_followed:
        lines.append(_line("", f"{found.num_not_followed:,} links to folders or to nothing are left out"))
    return lines


def _cache_lines(run: Run) -> list[str]:
    """What ``media.max_bytes`` admits and a reader's share of the cache does not hold."""
    share = run.config.runtime.reader_cache_bytes
    count = run.manifest.num_stored(above=share, most=run.config.media.max_bytes)
    if not count:
        return []
    return [
        _line("above cache", f"{count:,} objects exceed a reader's share of runtime.cache_bytes ({_bytes(share)}, by"),
        _line("", "runtime.num_reader_actors): those not read by ranges will be failed rows too_large"),
    ]


def _counts(config: JobConfig, model: ModelShape, shape: ItemShape) -> TokenCounts:
    total = TokenCounts(0, 0, 0, 0, 0)
    for media in requests_media(config, shape):
        total += expected_counts(
            model.geometry,
            config.reduction,
            media,
            num_vision_blocks=model.num_vision_blocks,
            num_decoder_layers=model.num_decoder_layers,
        )
    return total


def _kinds(run: Run) -> str:
    names = {"video": "videos", "image": "images", "images": "image sets", "document": "documents"}
    found = Counter(run.manifest.table["media_kind"].to_pylist())
    return ", ".join(f"{count:,} {names[kind]}" for kind, count in found.most_common())


def _reduction(config: JobConfig) -> str:
    plan = config.reduction
    if plan.budget is not None:
        return f"budget {plan.budget}, epsilon {plan.epsilon:g}: each item's content chooses its steps"
    if not plan.steps:
        return "none"
    places = (
        step.stage + (f" {','.join(map(str, step.layers))}" if step.layers else "") + f": {step.reducer.kind}"
        for step in plan.steps
    )
    return f"{'; '.join(places)} ({plan.layout} layout)"


def _size(manifest: Manifest) -> str:
    """The bytes of all objects, as far as a listing or the manifest says them."""
    unknown = f"{manifest.num_unsized:,} of unknown size" if manifest.num_unsized else ""
    known = "" if unknown and not manifest.num_bytes else _bytes(manifest.num_bytes)
    return " and ".join(filter(None, (known, unknown)))


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _line(label: str, value: str) -> str:
    return f"  {label:<14} {value}"
