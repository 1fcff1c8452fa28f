"""Says how many requests a job's running batch may hold: as configured, or by what its key/value pool holds.

A dry run asks for every common card, a run for the device it is placed on. Tokens are counted from geometry, as a dry
run's are; torch-free. The engine admits by its true pool besides, so a count that is too high only lets requests wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from illava.decoder.state_shape import num_state_slots
from illava.engine.config import CPU_BATCH_REQUESTS, GPU_BATCH_REQUESTS, EngineConfig
from illava.families import load_spec
from illava.families.model_shape import ModelShape, load_model_shape
from illava.memory_counts import fit, memory_counts
from illava.plan import ReductionPlan
from illava.token_counts import VisualShape, expected_counts
from pipeline.config.preflight import ITEMSIZES, Preflight
from pipeline.config.schema import JobConfig
from pipeline.runs.run_folder import Run
from pipeline.tasks.build import build_task

ASSUMED_IMAGE_PX = 1024  # the tiles of a single image depend on its size, which is known only once it is read
ASSUMED_TEXT_TOKENS = 100  # of a prompt, with the model's own template
_A4_INCHES = (11.69, 8.27)  # how many pages a document has is known only once it is read

ItemShape = tuple[str, int]  # media kind, number of objects


def with_batch_limit(config: JobConfig, run: Run, shards: Sequence[int], found: Preflight) -> JobConfig:
    """Fill in ``model.max_batch_requests`` of a placed job where it is null.

    On CPU, and where the device's memory is not known here, it is what it was before it could be null.
    """
    if config.model.max_batch_requests is not None:
        return config
    limit = CPU_BATCH_REQUESTS
    if config.model.device == "cuda" and found.memory_bytes is not None and found.weights_bytes is not None:
        pool = pool_tokens(config, found, found.weights_bytes, found.memory_bytes)
        limit = batch_limit(pool or 0, most_request_tokens(config, item_shapes(run, shards)))
    return config.model_copy(update={"model": config.model.model_copy(update={"max_batch_requests": limit})})


def batch_limit(pool: int, request_tokens: int) -> int:
    """Requests of so many tokens that a pool holds, between both defaults of `EngineConfig`."""
    return min(GPU_BATCH_REQUESTS, max(CPU_BATCH_REQUESTS, pool // request_tokens))


def pool_tokens(config: JobConfig, found: Preflight, weights_bytes: int, card_bytes: int) -> int | None:
    """Tokens that the pool of an actor caches on a card of this size; None where the model does not fit it."""
    model = config.model
    _, files = load_spec(model.model_id, revision=model.hub_revision)
    engine = EngineConfig(max_batch_requests=model.max_batch_requests)
    counts = memory_counts(files, ITEMSIZES[found.dtype], engine)
    if counts is None:
        return None
    gpus = config.runtime.gpus_per_actor
    share = gpus if isinstance(gpus, float) and 0 < gpus < 1 else 1.0
    card = fit(counts, weights_bytes, card_bytes, cache_bytes=model.kv_cache_bytes, share=share)
    one = 0 if found.states is None else found.states.state_bytes
    held = one * num_state_slots(card.cache_bytes, one, max_requests=engine.batch_limit("cuda"))
    return (card.cache_bytes - held) // counts.kv_token_bytes if card.fits else None


def most_request_tokens(config: JobConfig, shapes: Iterable[ItemShape]) -> int:
    """Tokens a layer, in the mean, of the largest request about items of these shapes, its answer included."""
    limits = config.media.pixel_limits
    model = load_model_shape(config.model.model_id, revision=config.model.hub_revision, pixel_limits=limits)
    visual = [_cached_tokens(config, model, media) for shape in shapes for media in requests_media(config, shape)]
    return max(visual, default=0) + ASSUMED_TEXT_TOKENS + config.sampling.max_new_tokens


def item_shapes(run: Run, shards: Sequence[int]) -> Counter[ItemShape]:
    """Items of these shards, by kind and number of objects; reads columns, so that a million items take seconds."""
    shapes: Counter[ItemShape] = Counter()
    columns = run.manifest.table.select(["media_kind", "sizes"])
    for index in shards:
        part = columns.slice(index * run.items_per_shard, run.items_per_shard)
        counts = (len(sizes) for sizes in part["sizes"].to_pylist())
        shapes.update(zip(part["media_kind"].to_pylist(), counts, strict=True))
    return shapes


def requests_media(config: JobConfig, shape: ItemShape) -> Iterator[list[VisualShape]]:
    """What each request about an item of this shape is given to see, as far as it can be known before it is read."""
    kind, num_objects = shape
    if kind == "video":
        media = [VisualShape("video", ASSUMED_IMAGE_PX, ASSUMED_IMAGE_PX, num_frames=config.media.num_frames)]
    elif kind == "document":
        media = [VisualShape("image", *(round(side * config.media.page_dpi) for side in _A4_INCHES))]
    else:
        media = [VisualShape("image", ASSUMED_IMAGE_PX, ASSUMED_IMAGE_PX)] * num_objects
    per_request = build_task(config.task).media_per_request or len(media)
    for start in range(0, len(media), per_request):
        yield media[start : start + per_request]


def _cached_tokens(config: JobConfig, model: ModelShape, media: Sequence[VisualShape]) -> int:
    """Visual tokens of a request a layer, in the mean: a step of the decoder reduces the layers from its own on."""
    plan, num_layers = config.reduction, model.num_decoder_layers
    starts = sorted({0, *plan.layers("decoder_layer")})
    total = 0
    for first, stop in zip(starts, [*starts[1:], num_layers], strict=True):
        counts = expected_counts(
            model.geometry,
            _up_to_layer(plan, first),
            media,
            num_vision_blocks=model.num_vision_blocks,
            num_decoder_layers=num_layers,
        )
        total += (stop - first) * counts.num_decoder_tokens_kept
    return -(-total // num_layers)


def _up_to_layer(plan: ReductionPlan, layer: int) -> ReductionPlan:
    """The plan without what reduces tokens behind this layer of the decoder."""
    kept = []
    for step in plan.steps:
        if step.stage != "decoder_layer":
            kept.append(step)
        elif layers := [one for one in step.layers if one <= layer]:
            kept.append(step.model_copy(update={"layers": type(step.layers)(layers)}))
    return plan.model_copy(update={"steps": tuple(kept)})
