"""Stage ``media`` in every family, through `VLM.generate`: what is left out, what stays, and `budget: auto`."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.engine.media_phase import MediaPhase, plan_for
from illava.engine.prompt import assemble
from illava.errors import ModelLoadError, PlanError, ReductionDidNotFireError, RequestError
from illava.families.text_scorer import RelevanceModel
from illava.plan import EMPTY_PLAN
from illava.reducers import Evidence
from illava.tokens import Tokens
from tests.support.models.cells import family_params
from tests.support.models.clip import make_clip, make_clipseg
from tests.support.models.families import make_folder

SAMPLING = SamplingParams(max_new_tokens=2)
CELLS = ("pixel_prune", "clip_crop", "clipseg_crop")
ON_VIDEO = ("pixel_dedup", "free_videollm")


@dataclass
class Tiny:
    """One family's tiny model, its preprocessor, and requests whose pictures hold much that repeats."""

    vlm: VLM
    pre: object
    requests: dict[str, Request]

    @property
    def reads_videos(self) -> bool:
        return "video" in self.requests


def block(height: int, width: int, seed: int = 0) -> np.ndarray:
    """White, with one block of noise."""
    picture = np.full((height, width, 3), 255, np.uint8)
    block = picture[height // 4 : height // 2, width // 4 : width // 2]
    block[:] = np.random.default_rng(seed).integers(0, 256, block.shape)
    return picture


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    root = tmp_path_factory.mktemp("scorers")
    clip, seg = str(make_clip(root / "clip")), str(make_clipseg(root / "clipseg"))
    return {"clip_crop": clip, "clipseg_crop": seg, "free_videollm": clip}


@pytest.fixture(scope="module", params=family_params())
def tiny(request, tmp_path_factory) -> Tiny:
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    pre = load_preprocessor(folder)
    content = {
        "image": (pre.images([block(64, 160)])[0], "What?"),
        "images": (*pre.images([block(64, 48), block(40, 80, 1)]), "Which?"),
    }
    if request.param != "llava_next":
        frames = [block(48, 48, n // 2) for n in range(7)]
        content["video"] = (pre.video(frames), "Then", pre.images([block(40, 40)])[0], "What?")
    requests = {name: Request(name, parts, SAMPLING, trace=True) for name, parts in content.items()}
    return Tiny(VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), pre, requests)


def plan_of(kind: str, scorers=None, **fields) -> ReductionPlan:
    own = {"clip_crop": {"keep_ratio": 0.4}, "clipseg_crop": {"keep_ratio": 0.4}}.get(kind, {})
    if kind == "free_videollm":
        own = {"num_slow": 1, "num_middle": 1, "fast_grid": (2, 2)}
    if scorers and kind in scorers:
        own = {**own, "scorer": {"model_id": scorers[kind]}}
    return ReductionPlan.model_validate({"steps": [{"stage": "media", "reducer": {"kind": kind, **own, **fields}}]})


@pytest.mark.parametrize("kind", [*CELLS, *ON_VIDEO])
def test_cells_left_out_leave_gaps_and_a_batch_equals_its_items_alone(tiny, scorers, kind):
    plan = plan_of(kind, scorers)
    if kind in ON_VIDEO and not tiny.reads_videos:
        with pytest.raises(PlanError, match=f"'{kind}' at media acts on videos"):
            tiny.vlm.generate(list(tiny.requests.values()), plan=plan)
        return
    requests = list(tiny.requests.values())[-1:] if kind in ON_VIDEO else list(tiny.requests.values())
    whole = tiny.vlm.generate(requests)
    for request, batched, before in zip(requests, tiny.vlm.generate(requests, plan=plan), whole, strict=True):
        (alone,) = tiny.vlm.generate([request], plan=plan)
        assert batched.error is None
        assert (batched.usage, batched.token_ids) == (alone.usage, alone.token_ids)
        usage, trace = alone.usage, alone.trace
        assert usage.num_vision_tokens == before.usage.num_vision_tokens == before.usage.num_vision_tokens_kept
        assert 0 < usage.num_patches < before.usage.num_patches
        assert trace.steps[0].stage == "media"
        assert trace.steps[0].matrix.shape == (usage.num_patches, before.usage.num_patches)
        matrix = trace.steps[0].matrix.to_dense()
        place = trace.patch_coords[matrix.argmax(1)]
        assert torch.equal(place, trace.steps[0].coords)  # what enters stands where it stood
        assert torch.equal(matrix.sum(1), torch.ones(len(matrix)))
        tiles = {tuple(p) for p in trace.patch_coords[:, :2].tolist()}
        assert tiles == {tuple(p) for p in place[:, :2].tolist()}  # no tile and no frame is left empty


@torch.inference_mode()
def test_kept_tokens_keep_the_positions_of_the_unreduced_prompt(tiny):
    stage, family = MediaPhase(tiny.vlm.family), tiny.vlm.family
    for request in tiny.requests.values():
        shown = stage.apply(request, plan_of("pixel_prune"))
        whole, less = (
            assemble(family, one, family.encode(one.media, EMPTY_PLAN, trace=False)) for one in (request, shown)
        )
        if family.model_type.startswith("qwen"):
            where = {tuple(p): q for p, q in zip(whole.coord_T4.tolist(), whole.position_PT.T.tolist(), strict=True)}
            for place, position in zip(less.coord_T4.tolist(), less.position_PT.T.tolist(), strict=True):
                assert place[0] < 0 or where[tuple(place)] == position
        assert torch.equal(whole.next_position_P, less.next_position_P)
        text = [prompt.position_PT[:, prompt.coord_T4[:, 0] < 0] for prompt in (whole, less)]
        assert torch.equal(*text)


def test_noise_has_nothing_to_leave_out_and_is_answered_as_without_the_step(tiny):
    noise = np.random.default_rng(3).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    request = Request("noise", (tiny.pre.images([noise])[0], "What?"), SAMPLING)
    reducer = {"skip_padding": False} if tiny.vlm.family.model_type.startswith("llava") else {}
    (plain,), (kept,) = (
        tiny.vlm.generate([request], plan=plan) for plan in (EMPTY_PLAN, plan_of("pixel_prune", **reducer))
    )
    assert kept.error is None
    assert kept.token_ids == plain.token_ids
    if tiny.vlm.family.model_type.startswith("qwen"):
        assert kept.usage == plain.usage


def test_fewer_frames_are_an_ordinary_video_of_as_many(tiny):
    plan = plan_of("fewer_frames", keep_ratio=0.5)
    if not tiny.reads_videos:
        with pytest.raises(PlanError, match="'fewer_frames' at media acts on videos, but llava_next reads images only"):
            tiny.vlm.generate(list(tiny.requests.values()), plan=plan)
        return
    frames = [block(48, 48, n) for n in range(8)]
    timed = tiny.vlm.family.model_type.startswith("qwen")
    times_s = {"timestamps_s": [n * 0.7 for n in range(8)]} if timed else {}
    whole = tiny.pre.video(frames, **times_s)
    chosen = [2, 3, 6, 7] if timed else [1, 3, 5, 7]  # pairs: floor(1/2 4/2) = 1, 3
    few = tiny.pre.with_frames(whole, [1, 3] if timed else chosen)
    assert np.array_equal(few.tiles, whole.tiles[chosen])
    assert few.timestamps_s == tuple(whole.timestamps_s[n] for n in chosen) if timed else True
    asked, direct = (Request("r", (video, "What?"), SAMPLING) for video in (whole, few))
    (reduced,), (plain,) = tiny.vlm.generate([asked], plan=plan), tiny.vlm.generate([direct])
    assert reduced.token_ids == plain.token_ids
    assert reduced.usage.num_vision_tokens > plain.usage.num_vision_tokens
    assert reduced.usage.num_vision_tokens_kept == plain.usage.num_vision_tokens_kept
    assert reduced.usage.num_patches == plain.usage.num_patches
    (error,) = tiny.vlm.generate([tiny.requests["image"]], plan=plan, errors="return")
    assert isinstance(error.error, ReductionDidNotFireError)
    by_packets = plan_of("fewer_frames", keep_ratio=0.5, by="packets")
    (unknown,) = tiny.vlm.generate([asked], plan=by_packets, errors="return")
    assert "how many bytes" in str(unknown.error)
    moving = replace(whole, packet_bytes=(1, 1, 90, 90, 70, 1, 1, 1))  # of pairs: 2, 180, 71, 2
    chosen = [1, 2] if timed else [2, 3, 4, 6]
    asked, direct = (
        Request("r", (video, "What?"), SAMPLING) for video in (moving, tiny.pre.with_frames(moving, chosen))
    )
    (reduced,), (plain,) = tiny.vlm.generate([asked], plan=by_packets), tiny.vlm.generate([direct])
    assert (reduced.token_ids, reduced.usage.num_patches) == (plain.token_ids, plain.usage.num_patches)


def test_lower_resolution_is_the_model_s_own_smaller_picture(tiny):
    plan = plan_of("lower_resolution", keep_ratio=0.5)
    picture = block(112, 112)
    mm_item = tiny.pre.images([picture])[0]
    single = Request("single", (mm_item, "What?"), SAMPLING)
    if tiny.vlm.family.model_type == "llava_next":  # no canvas of half its tiles
        (refused,) = tiny.vlm.generate([single], plan=plan, errors="return")
        assert isinstance(refused.error, RequestError)
        assert "its tower takes tiles of one size" in str(refused.error)
        return
    small = tiny.pre.shrink(mm_item, 0.5)
    (reduced,), (plain,) = (
        tiny.vlm.generate([single], plan=plan),
        tiny.vlm.generate([Request("small", (small, "What?"), SAMPLING)]),
    )
    assert (reduced.error, reduced.token_ids) == (None, plain.token_ids)
    usage = reduced.usage
    assert usage.num_patches == plain.usage.num_patches <= 0.5 * tiny.vlm.family.num_patches(mm_item)
    assert usage.num_vision_tokens == tiny.vlm.family.num_vision_tokens(mm_item) > usage.num_vision_tokens_kept
    if tiny.vlm.family.model_type == "llava_onevision":
        refused = tiny.vlm.generate([tiny.requests["images"], tiny.requests["video"]], plan=plan, errors="return")
        assert ["a video frame" in str(one.error) or "in 1 tiles" in str(one.error) for one in refused] == [True, True]


def test_the_scorer_s_seconds_are_the_tower_s(tiny, scorers, monkeypatch):
    real = RelevanceModel.relevance

    def slow(self, *args):
        time.sleep(0.4)
        return real(self, *args)

    monkeypatch.setattr(RelevanceModel, "relevance", slow)
    (one,) = tiny.vlm.generate([tiny.requests["image"]], plan=plan_of("clip_crop", scorers))
    assert one.timing.vision_s >= 0.4
    assert one.timing.device_s >= 0.4


def test_what_cannot_be_is_refused_in_words(tiny, scorers, tmp_path):
    if tiny.vlm.family.model_type != "llava_onevision":
        return
    image = tiny.requests["image"]
    (silent,) = tiny.vlm.generate(
        [Request("silent", (image.content[0],), SAMPLING)], plan=plan_of("clip_crop", scorers), errors="return"
    )
    assert "compares pictures with a text, but there is none" in str(silent.error)
    with pytest.raises(ModelLoadError, match="is a 'clipseg' model; this method needs a 'clip' model"):
        tiny.vlm.generate([image], plan=plan_of("clip_crop", {"clip_crop": scorers["clipseg_crop"]}))
    with pytest.raises(ModelLoadError, match="no model folder"):
        tiny.vlm.generate([image], plan=plan_of("clip_crop", {"clip_crop": str(tmp_path / "none")}))
    released = plan_of("pixel_prune").model_copy(update={"layout": "released"})
    with pytest.raises(PlanError, match="use layout 'geometric'"):
        tiny.vlm.generate([image], plan=released)


AUTO = ReductionPlan.model_validate({"budget": "auto", "epsilon": 0.3})


def rendered(height: int, width: int) -> np.ndarray:
    """A page of text: lines of little strokes on white."""
    rng, picture = np.random.default_rng(1), np.full((height, width, 3), 255, np.uint8)
    for top in range(4, height // 2, 8):
        strokes = rng.random((4, width - 8)) < 0.5
        picture[top : top + 4, 4 : width - 4][strokes] = 0
    return picture


def natural(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth colours everywhere, no two cells alike."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(3 * x + 5 * y + seed + c) + np.cos(4 * y - 2 * x * (c + 1)) for c in range(3)]
    return ((np.stack(waves, -1) + 2) * 63).astype(np.uint8)


def test_auto_says_what_it_took_each_item_for(tiny):
    content = {
        "document": (tiny.pre.images([rendered(64, 64)])[0], "Read."),
        "image": (tiny.pre.images([natural(64, 64)])[0], "What?"),
    }
    if tiny.reads_videos:
        content["video"] = (tiny.pre.video([natural(40, 40, n) for n in range(4)]), "What?")
    requests = [Request(name, parts, SAMPLING) for name, parts in content.items()]
    together = tiny.vlm.generate(requests, plan=AUTO)
    for request, batched in zip(requests, together, strict=True):
        (alone,) = tiny.vlm.generate([request], plan=AUTO)
        assert batched.error is None
        assert batched.usage == alone.usage
        assert batched.usage.content == request.request_id
    assert tiny.vlm.generate(requests[:1])[0].usage.content is None


@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.3])
def test_documents_keep_more_than_natural_images_at_the_same_epsilon(epsilon):
    """On cells of pixels: random weights say nothing of what features are worth."""
    share = {}
    for content, picture in (("document", rendered(64, 64)), ("image", natural(64, 64))):
        cells = picture.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, -1)
        place = torch.cartesian_prod(torch.arange(1), torch.arange(8), torch.arange(8))
        tokens = Tokens(torch.from_numpy(cells).float(), (64,), place)
        reducer = plan_for(content, epsilon).at("decoder_input")
        assert reducer.epsilon <= epsilon
        share[content] = reducer.assign(tokens, Evidence(), "decoder_input").num_kept / 64
    assert share["document"] > share["image"]
