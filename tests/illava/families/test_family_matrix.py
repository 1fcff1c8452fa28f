"""Every family x every registered method x every modality, as `check` promises.

What it accepts runs through `VLM.generate`, a batch equals its items alone, and all else is refused in words. A tiled
and a native-resolution family run in `make test`, all in `make test-long`; what is refused is asked of all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from benchmarks.tables.family_matrix import (
    ROOT,
    SETTINGS,
    STAGES,
    candidates,
    cell_of,
    plan_of,
    stages_of,
)
from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.engine.prompt import assemble
from illava.errors import PlanError, ReductionDidNotFireError
from illava.plan import EMPTY_PLAN
from illava.reducers import REDUCERS
from tests.support.models.cells import family_params
from tests.support.models.families import make_folder

NUM_NEW = 3
POOLS_VIDEO = {"llava_onevision"}  # restores a frame's grid behind the tower and pools it: its count stays
IN_TOWER = ("vision_block", "vision_output")
IN_MAKE_TEST = {"llava_onevision", "qwen2_5_vl"}  # tiled; native resolution with windows
FAMILIES_TO_RUN = family_params(in_make_test=IN_MAKE_TEST)


@dataclass
class Tiny:
    """One family's tiny model, its requests by modality, and what the unreduced model counts for each."""

    vlm: VLM
    requests: dict[str, Request]
    whole: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module", params=family_params())
def tiny(request, tmp_path_factory) -> Tiny:
    folder = str(make_folder(request.param, tmp_path_factory.mktemp(request.param)))
    vlm = VLM.from_pretrained(folder, kv_cache_bytes=8 << 20)
    found = Tiny(vlm, requests_of(load_preprocessor(folder), video="video" in vlm.family.media_kinds))
    for modality, generation in zip(found.requests, vlm.generate(list(found.requests.values())), strict=True):
        assert generation.error is None
        found.whole[modality] = generation.usage.num_vision_tokens
        assert generation.usage.num_decoder_tokens_kept == generation.usage.num_vision_tokens
    return found


def requests_of(preprocessor, *, video: bool) -> dict[str, Request]:
    rng = np.random.default_rng(8)

    def picture(height, width):
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    alone, first, second = (preprocessor.images([picture(*size)])[0] for size in ((64, 48), (40, 56), (56, 40)))
    content = {"image": (alone, "What?"), "images": ("A:", first, "then B:", second, "Compare.")}
    if video:
        content["video"] = ("See", preprocessor.video([picture(40, 40) for _ in range(6)]), "what happens?")
    sampling = SamplingParams(max_new_tokens=NUM_NEW)
    return {modality: Request(modality, parts, sampling) for modality, parts in content.items()}


@pytest.mark.parametrize("tiny", FAMILIES_TO_RUN, indirect=True, scope="module")
@pytest.mark.parametrize("row", SETTINGS)
def test_what_check_accepts_runs_and_a_batch_equals_its_items_alone(tiny, row):
    for stage in set(stages_of(tiny.vlm.family, SETTINGS[row])) - {"media"}:  # tests/illava/engine/test_media_phase.py
        plan = plan_of(tiny.vlm.family, SETTINGS[row], stage)
        together = tiny.vlm.generate(list(tiny.requests.values()), plan=plan, errors="return")
        for (modality, request), batched in zip(tiny.requests.items(), together, strict=True):
            (alone,) = tiny.vlm.generate([request], plan=plan, errors="return")
            where = (row, stage, modality)
            if modality != "video" and REDUCERS[SETTINGS[row]["kind"]].merges_frames:
                for generation in (alone, batched):  # nothing to join: this request's error, in a batch too
                    assert isinstance(generation.error, ReductionDidNotFireError), where
                continue
            assert alone.error is None, where
            assert batched.error is None, where
            assert batched.usage == alone.usage, where
            assert batched.token_ids == alone.token_ids, where
            usage = alone.usage
            assert usage.num_vision_tokens == tiny.whole[modality], where
            assert 0 < usage.num_decoder_tokens_kept <= usage.num_vision_tokens_kept, where
            if not (stage in IN_TOWER and modality == "video" and tiny.vlm.family.model_type in POOLS_VIDEO):
                assert usage.num_decoder_tokens_kept < tiny.whole[modality], where
            if stage == "decoder_layer":
                assert usage.num_decoder_tokens_kept < usage.num_vision_tokens_kept == tiny.whole[modality], where


@pytest.mark.parametrize("row", SETTINGS)
def test_everything_else_is_refused_in_words(tiny, row):
    family, setting = tiny.vlm.family, SETTINGS[row]
    kind = setting["kind"]
    for stage in sorted(set(STAGES) - set(stages_of(family, setting))):
        if stage not in REDUCERS[kind].stages:
            with pytest.raises(ValueError, match=rf"'{kind}' cannot act at stage '{stage}'; it can at: \w+"):
                candidates(family, setting, stage)
            continue
        for plan in candidates(family, setting, stage):
            refusal = rf"'{kind}' .*needs cls_attention: not known|attend within windows|images only"
            with pytest.raises(PlanError, match=refusal):
                tiny.vlm.generate(list(tiny.requests.values()), plan=plan)


def test_a_tower_with_cls_takes_what_the_others_refuse(tiny):
    """The promise itself, apart from the code that asks `check`."""
    expected = ("vision_block", "vision_output") if tiny.vlm.family.model_type in ("llava_next", "internvl") else ()
    for row in ("prumerge, CLS", "visionzip, CLS", "scope, CLS"):
        assert stages_of(tiny.vlm.family, SETTINGS[row]) == expected
    every = ("vision_block", "vision_output", "decoder_input", "decoder_layer")
    assert stages_of(tiny.vlm.family, SETTINGS["illava"]) == every
    assert stages_of(tiny.vlm.family, SETTINGS["fastv"]) == every[-1:]


@torch.inference_mode()
def test_text_between_images_and_after_a_video_stays_whole_where_it_was(tiny):
    family, plan = tiny.vlm.family, plan_of(tiny.vlm.family, SETTINGS["illava"], "vision_block")
    for request in tiny.requests.values():
        whole, merged = (
            assemble(family, request, family.encode(request.media, which, trace=False)) for which in (EMPTY_PLAN, plan)
        )
        is_text, still_text = whole.coord_T4[:, 0] < 0, merged.coord_T4[:, 0] < 0
        assert torch.equal(whole.hidden_TD[is_text], merged.hidden_TD[still_text])
        assert torch.equal(whole.position_PT[:, is_text], merged.position_PT[:, still_text])
        assert torch.equal(whole.next_position_P, merged.next_position_P)
        before, after = ({tuple(place) for place in prompt.position_PT.T.tolist()} for prompt in (whole, merged))
        assert after <= before
        order = [prompt.coord_T4[:, 0].unique_consecutive().tolist() for prompt in (whole, merged)]
        assert order[0] == order[1]


def test_the_docs_show_this_matrix(tiny):
    """Else run: python benchmarks/tables/readme_tables.py --write."""
    block = (ROOT / "docs" / "plans-and-methods.md").read_text()
    table = block.split("<!-- table:families -->")[1].split("<!-- end:families -->")[0]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines())
    column = head.index(tiny.vlm.family.model_type)
    shown = {row[0]: row[column] for row in rows}
    assert shown == {row: cell_of(tiny.vlm.family, setting) for row, setting in SETTINGS.items()}
