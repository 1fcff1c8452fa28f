"""How answers end, and what their text is: loops, stop texts, rows of all kinds in one batch. Takes 10 s of one core.

On a family of tiles and one of native resolution. Where tokens must be known they are told; the engine is the real one.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from illava import VLM, Grammar, Request, SamplingParams, load_preprocessor
from illava.engine import batching
from illava.engine.batching import to_outcomes
from illava.engine.decode_phase import DecodePhase
from illava.engine.engine import Engine
from illava.engine.sampling import draw_tokens
from tests.support.models.families import make_folder, stock_class
from tests.support.operations import Operations

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module", params=["llava_onevision", "qwen2_5_vl"])
def folder(request, tmp_path_factory):
    return make_folder(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def vlm(folder):
    return VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def image(folder):
    pixels = np.random.default_rng(3).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    return load_preprocessor(str(folder)).images([pixels])[0]


def ids_of(vlm, text):
    return list(vlm.family._tokenizer(text, add_special_tokens=False)["input_ids"])


def answers(vlm, told, **sampling):
    """The generations of requests whose tokens are told; what is not told is a stop token."""
    stop = min(vlm.family.stop_token_ids)
    tokens = {name: [*ids_of(vlm, text), stop] for name, (text, _) in told.items()}

    def draw(logits_BV, batch, group):
        drawn = [tokens[state.request_id][len(state.token_ids)] for state in group]
        return torch.tensor([drawn, [1] * len(group)])

    engine = Engine(vlm.engine.family, vlm.engine.cache, vlm.engine.config, draw=draw)
    params = {name: SamplingParams(**{"max_new_tokens": 60} | sampling | own) for name, (_, own) in told.items()}
    return engine.generate([Request(name, ("What?",), own) for name, own in params.items()])


def test_a_loop_ends_an_answer_as_it_is_told_to(vlm):
    looping, plain = "A dog. " + "ha " * 30, "A cat, a cow and a hen."
    told = {
        "off": (looping, {"loop_tokens": None}),
        "stop": (looping, {}),
        "cut": (looping, {"on_loop": "cut"}),
        "keep": (looping, {"on_loop": "keep"}),
        "keep what ends": ("ha " * 10 + "and so on.", {"on_loop": "keep"}),
        "forced": (looping, {"min_new_tokens": 40}),
        "plain": (plain, {"on_loop": "cut"}),
    }
    found = {one.request_id: one for one in answers(vlm, told, loop_tokens=12)}
    assert (
        {name: (one.finish_reason, one.text, len(one.token_ids)) for name, one in found.items()}
        == {
            "off": ("length", looping[:60], 60),
            "stop": ("loop", looping[:18], 18),  # the blank before it is part of the period
            "cut": ("loop", looping[:9], 18),
            "keep": ("loop", looping[:60], 60),
            "keep what ends": ("stop", "ha " * 10 + "and so on.", 41),
            "forced": ("loop", looping[:40], 40),
            "plain": ("stop", plain, len(plain) + 1),
        }
    )
    assert found["stop"].usage.num_generated_tokens == 18


def test_a_stop_text_ends_an_answer_and_is_not_part_of_it(vlm):
    told = {
        "first of two": ("One.\n\nTwo. END", {"stop": ("END", "\n\n")}),
        "none": ("One.\n\nTwo.", {"stop": ("END",)}),
        "at the start": ("END of it", {"stop": ("END",)}),
        "of several bytes": ("Das ist süß。Und", {"stop": ("。",)}),
        "far behind": ("word " * 9 + "é END more", {"stop": ("END",)}),
        "not yet": ("a END b END c", {"stop": ("END",), "min_new_tokens": 60}),
    }
    told["not yet"] = (told["not yet"][0] + "." * 60, told["not yet"][1])
    found = {one.request_id: (one.finish_reason, one.text) for one in answers(vlm, told)}
    assert found == {
        "first of two": ("stop", "One."),
        "none": ("stop", "One.\n\nTwo."),
        "at the start": ("stop", ""),
        "of several bytes": ("stop", "Das ist süß"),
        "far behind": ("stop", "word " * 9 + "é "),
        "not yet": ("length", ("a END b END c" + "." * 60)[:60]),
    }


SEED = 3  # of draws that hang on no near-tie
KINDS = {
    "greedy": {},
    "hot": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 0.9, "top_k": 5},
    "min_p": {"temperature": 0.9, "min_p": 0.1},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 0.5},
    "frequency": {"temperature": 0.7, "frequency_penalty": 0.4},
    "loop": {"loop_tokens": 8, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    "stop": {"stop": ("\x04",)},
    "told": {"logprobs": True, "choices": (("A", " A"), ("B",)), "repetition_penalty": 1.1},
    "json": {"grammar": Grammar(json_schema={"type": "array", "items": {"type": "integer"}})},
    "regex": {"grammar": Grammar(regex="[a-h]{3,}"), "temperature": 0.9, "top_p": 0.9, "frequency_penalty": 0.5},
    "choices": {"grammar": Grammar(choices=("red", "ready", "blue")), "logprobs": True},
}


def test_a_batch_of_all_kinds_gives_each_row_what_it_gives_alone(vlm, image):
    requests = [
        Request(name, (image, "What is it?"), SamplingParams(8 + n % 3, seed=SEED, **sampling))
        for n, (name, sampling) in enumerate(KINDS.items())
    ]
    together = vlm.generate(requests)
    alone = [vlm.generate([request])[0] for request in requests]
    assert [one.error for one in together] == [None] * len(KINDS)
    for mixed, single in zip(together, alone, strict=True):
        assert (mixed.token_ids, mixed.text, mixed.finish_reason) == (
            single.token_ids,
            single.text,
            single.finish_reason,
        )
    by_kind = {one.request_id: one for one in together}
    assert by_kind["json"].text.startswith("[")
    assert re.fullmatch("[a-h]{3,}", by_kind["regex"].text)
    assert by_kind["choices"].text in {"red", "ready", "blue"}
    assert by_kind["loop"].finish_reason == "loop"
    assert by_kind["repetition"].token_ids != by_kind["greedy"].token_ids[: len(by_kind["repetition"].token_ids)]
    expected = alone[list(KINDS).index("told")].choice_probabilities
    assert by_kind["told"].choice_probabilities == pytest.approx(expected, rel=1e-4)


def test_a_repetition_penalty_is_that_of_transformers(vlm, folder):
    request = Request("a", ("Say it, say it again.",), SamplingParams(16, repetition_penalty=1.3, min_new_tokens=16))
    (found,) = vlm.generate([request])
    prompt = vlm.family.render(request.content, []).token_ids
    stock = stock_class(vlm.family.model_type).from_pretrained(folder).eval()
    drawn = stock.generate(
        torch.tensor([prompt]), do_sample=False, repetition_penalty=1.3, max_new_tokens=16, eos_token_id=None
    )
    assert list(found.token_ids) == drawn[0, len(prompt) :].tolist()
    (plain,) = vlm.generate([replace(request, sampling=SamplingParams(16, min_new_tokens=16))])
    assert plain.token_ids != found.token_ids


def test_options_have_the_probability_of_their_first_tokens(vlm, folder, image):
    options = (("A", " A", "(A"), ("B", " B", "(B"))
    asked = SamplingParams(3, logprobs=True, choices=options)
    text = Request("a", ("A or B?",), asked)
    found, of_image, without, silent, shared = vlm.generate(
        [
            text,
            Request("b", (image, "A or B?"), asked),
            Request("c", ("A or B?",), replace(asked, choices=())),
            Request("d", ("A or B?",), SamplingParams(3)),
            Request("e", ("A or B?",), replace(asked, choices=(("yes",), ("yellow",)))),  # the same first letter
        ]
    )
    prompt = vlm.family.render(text.content, []).token_ids
    stock = stock_class(vlm.family.model_type).from_pretrained(folder).eval()
    with torch.inference_mode():
        share = stock(input_ids=torch.tensor([prompt])).logits[0, -1].float().softmax(-1)
    expected = [float(share[ids_of(vlm, letter)[0]]) for letter in "AB"]
    assert found.choice_probabilities == pytest.approx(expected, rel=1e-3)
    assert len(of_image.choice_probabilities) == 2
    assert [without.choice_probabilities, silent.choice_probabilities, shared.choice_probabilities] == [None] * 3
    assert without.token_logprobs == pytest.approx(found.token_logprobs, rel=1e-3)


def test_greedy_answers_take_the_operations_that_they_took_before(vlm, image, monkeypatch):
    """The whole way of a batch, counted; loops are looked for on the host. `decode` is what 27c8a0a did."""

    def decode(self, group):
        if self._batch is None or self._batch.states != group:
            self._batch = self._compose(group)
        logits_BV = self._batch.step()[0].float()
        drawn_2B = torch.stack([logits_BV.argmax(-1), logits_BV.isfinite().all(-1).long()])
        self._batch.token_B.copy_(drawn_2B[0])
        return to_outcomes(drawn_2B.cpu(), group)

    now = DecodePhase.advance

    def counted(**sampling):
        params = SamplingParams(4, min_new_tokens=4, **sampling)
        with Operations() as found:
            vlm.generate([Request("a", (image, "What?"), params), Request("b", ("No.",), params)])
        return found.names

    monkeypatch.setattr(batching, "draw_tokens", draw_tokens)  # not the one that looks for near-ties
    counted()  # constants are made once
    plain, watched = counted(), counted(loop_tokens=256, stop=("none of this",))
    monkeypatch.setattr(DecodePhase, "advance", decode)
    assert len(plain) == len(watched) == len(counted())
    assert plain == watched
    monkeypatch.setattr(DecodePhase, "advance", now)
    assert len(counted(presence_penalty=0.1)) > len(plain)
