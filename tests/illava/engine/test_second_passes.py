"""A second turn about media that are encoded already, and several answers of one prompt. Takes 5 s."""

from __future__ import annotations

import numpy as np
import pytest

from illava import VLM, Message, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.errors import RequestError
from tests.support.models.families import make_folder

GREEDY = SamplingParams(max_new_tokens=3, min_new_tokens=3)
RANDOM = SamplingParams(max_new_tokens=3, min_new_tokens=3, temperature=1.0, top_k=3, seed=5)
TOWER = {"stage": "vision_block", "layers": [3], "reducer": {"kind": "illava", "keep_ratio": 0.6}}
DRAWN = {"stage": "vision_block", "layers": [3], "reducer": {"kind": "random", "keep_ratio": 0.6}}
BY_THE_QUESTION = {
    "stage": "decoder_layer",
    "layers": [2],
    "reducer": {"kind": "illava", "keep_ratio": 0.5, "per": "prompt", "score": "released"},
}
DRAWN_IN_DECODER = {"stage": "decoder_layer", "layers": [1], "reducer": {"kind": "random", "keep_ratio": 0.5}}
FRAMES = {"stage": "media", "reducer": {"kind": "fewer_frames", "num_frames": 2}}
PLANS = {
    "whole": [],
    "tower": [TOWER],
    "drawn": [DRAWN],
    "by the question": [BY_THE_QUESTION],
    "drawn in the decoder": [DRAWN_IN_DECODER],
    "frames": [FRAMES],
}


@pytest.fixture(scope="module", params=["llava_onevision", "qwen2_5_vl"])
def model(request, tmp_path_factory):
    folder = str(make_folder(request.param, tmp_path_factory.mktemp("model")))
    frames = np.random.default_rng(5).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    return VLM.from_pretrained(folder, kv_cache_bytes=8 << 20), load_preprocessor(folder).video(frames)


@pytest.fixture
def encoded(model, monkeypatch):
    """The numbers of media that the tower was given, call by call."""
    family, calls = model[0].family, []
    encode = family.encode
    monkeypatch.setattr(
        family, "encode", lambda media, *args, **options: calls.append(len(media)) or encode(media, *args, **options)
    )
    return calls


def plan_of(name: str) -> ReductionPlan:
    return ReductionPlan.model_validate({"steps": PLANS[name]})


@pytest.mark.parametrize("name", ["whole", "tower", "drawn", "frames", "by the question"])
def test_a_second_turn_answers_as_ever_and_the_tower_runs_once(model, encoded, name) -> None:
    (vlm, video), plan = model, plan_of(name)
    first = Request("a", (video, "What?"), GREEDY, keep_encoding=True)
    (draft,) = vlm.generate([first], plan=plan)
    history = (Message("user", first.content), Message("assistant", (draft.text,)))
    second = Request("a", ("Is that so?",), GREEDY, history=history)
    kept = Request("a", second.content, GREEDY, history=history, encoding=draft.encoding)
    (refined,) = vlm.generate([kept], plan=plan)
    assert encoded == [1]
    (afresh,) = vlm.generate([second], plan=plan)
    assert encoded == [1, 1]
    assert refined.error is None
    assert refined.token_ids == afresh.token_ids
    assert refined.usage.num_vision_tokens_kept == afresh.usage.num_vision_tokens_kept
    assert (refined.usage.num_patches, afresh.usage.num_patches) == (0, draft.usage.num_patches)
    assert refined.encoding is None  # nothing holds the features longer than it was asked to


def test_second_turns_and_first_ones_run_in_one_batch(model, encoded) -> None:
    vlm, video = model
    (draft,) = vlm.generate([Request("a", (video, "What?"), GREEDY, keep_encoding=True)])
    history = (Message("user", (video, "What?")), Message("assistant", (draft.text,)))
    mixed = [
        Request("a", ("Sure?",), GREEDY, history=history, encoding=draft.encoding),
        Request("b", (video, "Where?"), GREEDY),
        Request("c", ("Why?",), GREEDY),
        Request("d", ("Really?",), RANDOM, history=history, encoding=draft.encoding),
    ]
    together = [one.token_ids for one in vlm.generate(mixed)]
    assert sum(encoded) == 2
    assert together == [vlm.generate([one])[0].token_ids for one in mixed]


@pytest.mark.parametrize("name", sorted(PLANS))
def test_answers_of_one_prompt_take_one_tower_call_and_one_prefill(model, encoded, monkeypatch, name) -> None:
    (vlm, video), plan = model, plan_of(name)
    requests = [Request(f"a{n}", (video, "What?"), RANDOM, reduction_id="a") for n in range(3)]
    decoder, computed = vlm.family.decoder, []
    project = decoder.project
    monkeypatch.setattr(
        decoder,
        "project",
        lambda layer, hidden_TD, *args, **into: (
            computed.append(len(hidden_TD)) or project(layer, hidden_TD, *args, **into)
        ),
    )
    answers = vlm.generate(requests, plan=plan)
    together, computed[:] = sum(computed), []
    assert encoded == [1]
    alone = []
    for request in requests:
        alone += vlm.generate([request], plan=plan)
    assert [one.token_ids for one in answers] == [one.token_ids for one in alone]
    assert len({one.token_ids for one in answers}) > 1
    num_layers, num_new = decoder.num_layers, GREEDY.max_new_tokens
    decoded = num_layers * (num_new - 1)
    prefill = sum(computed) // 3 - decoded
    # each of the two others computes its last prompt token alone
    assert together <= prefill + 2 * num_layers + 3 * decoded


def test_an_encoding_of_something_else_is_refused(model) -> None:
    vlm, video = model
    (draft,) = vlm.generate([Request("a", (video, "What?"), GREEDY, keep_encoding=True)])
    with pytest.raises(RequestError, match="give the encoding of the same media under the same plan"):
        vlm.submit(Request("b", ("What?",), GREEDY, encoding=draft.encoding))
    with pytest.raises(RequestError, match="give the encoding of the same media under the same plan"):
        vlm.submit(Request("b", (video, "What?"), GREEDY, encoding=draft.encoding), plan=plan_of("tower"))
    with pytest.raises(RequestError, match="no trace of media that were encoded before"):
        vlm.submit(Request("b", (video, "What?"), GREEDY, encoding=draft.encoding, trace=True))
