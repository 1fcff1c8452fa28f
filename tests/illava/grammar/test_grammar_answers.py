"""Answers drawn by grammars: whole ones, cut ones, beside free rows, by whatever else a request asks. Takes 5 s.

On a family of tiles and one of native resolution, whose random weights would say anything.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from illava import VLM, Grammar, Request, SamplingParams, load_preprocessor
from illava.engine.sampling import SamplingBatch, draw_tokens
from illava.errors import RequestError
from illava.grammar.answer import AnswerGrammar, GrammarCompiler
from illava.grammar.mask import GrammarMask
from tests.support.models.families import make_folder
from tests.support.operations import Operations

CPU = torch.device("cpu")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["dog", "cat", None]},
    },
    "required": ["name", "n", "kind"],
    "additionalProperties": False,
}
JSON, DATE = Grammar(json_schema=SCHEMA), Grammar(regex="[0-9]{4}-[01][0-9]")
COLOUR = Grammar(choices=("red", "dark red"))


@pytest.fixture(autouse=True)
def _no_near_ties():
    """What is asserted here holds whichever token a near-tie is decided for."""


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


def answer(vlm, *content, **sampling):
    (found,) = vlm.generate([Request("a", content, SamplingParams(**{"max_new_tokens": 80} | sampling))])
    return found


def test_an_answer_is_of_its_grammar_whatever_the_weights(vlm, image):
    asked = {"json": JSON, "date": DATE, "colour": COLOUR}
    requests = [
        Request(f"{name} at {heat}", (image, "What?"), SamplingParams(80, temperature=heat, grammar=own))
        for name, own in asked.items()
        for heat in (0.0, 50.0)
    ]
    for found in vlm.generate(requests):
        assert (found.error, found.finish_reason, found.follows_grammar) == (None, "stop", True)
        assert found.token_ids[-1] in vlm.family.stop_token_ids
        if found.request_id.startswith("json"):
            Draft202012Validator(SCHEMA).validate(json.loads(found.text))
        elif found.request_id.startswith("date"):
            assert re.fullmatch(DATE.regex, found.text)
        else:
            assert found.text in COLOUR.choices


def test_what_cuts_an_answer_is_told(vlm):
    cut = answer(vlm, "What?", max_new_tokens=5, grammar=JSON)
    assert (cut.finish_reason, cut.follows_grammar) == ("length", False)
    whole = answer(vlm, "What?", max_new_tokens=5, grammar=Grammar(regex="[ab]+"))
    assert (whole.finish_reason, whole.follows_grammar, len(whole.text)) == ("length", True, 5)
    stopped = answer(vlm, "What?", grammar=Grammar(choices=("an answer",)), stop=("ans",))
    assert (stopped.text, stopped.finish_reason, stopped.follows_grammar) == ("an ", "stop", False)
    looped = answer(vlm, "What?", grammar=Grammar(regex="(no ){40}yes"), loop_tokens=24, on_loop="cut")
    assert (looped.text, looped.finish_reason, looped.follows_grammar) == ("no ", "loop", False)
    assert answer(vlm, "What?", max_new_tokens=3).follows_grammar is None


def test_penalties_act_within_a_grammar_and_probabilities_are_the_models_own(vlm):
    plain = answer(vlm, "Say.", grammar=DATE, logprobs=True)
    free = answer(vlm, "Say.", max_new_tokens=1, logprobs=True, choices=(("0",), ("1",)))
    held = answer(vlm, "Say.", grammar=DATE, logprobs=True, choices=(("0",), ("1",)))
    assert held.token_logprobs == pytest.approx(plain.token_logprobs, rel=1e-4)
    assert held.choice_probabilities == pytest.approx(free.choice_probabilities, rel=1e-4)
    varied = answer(vlm, "Say.", grammar=Grammar(regex="[a-h]{8}"), presence_penalty=2.0, frequency_penalty=2.0)
    assert re.fullmatch("[a-h]{8}", varied.text)
    assert len(set(varied.text)) > len(set(answer(vlm, "Say.", grammar=Grammar(regex="[a-h]{8}")).text))


def test_a_grammar_without_answers_ends_its_request_alone(vlm):
    bad, good = vlm.generate(
        [
            Request("bad", ("What?",), SamplingParams(grammar=Grammar(regex="("))),
            Request("good", ("What?",), SamplingParams(grammar=COLOUR)),
        ],
        errors="return",
    )
    assert isinstance(bad.error, RequestError)
    assert str(bad.error) == "grammar.regex: unclosed group"
    assert good.text in COLOUR.choices
    with pytest.raises(RequestError, match="leave out min_new_tokens"):
        vlm.submit(Request("a", ("What?",), SamplingParams(9, min_new_tokens=1, grammar=COLOUR)))


def test_an_answer_that_cannot_be_followed_any_further_ends_alone(vlm, monkeypatch):
    fill = AnswerGrammar.fill

    def gives_up(self, allowed_W):
        fill(self, allowed_W)
        if len(self._token_ids) == 2:
            self._matcher.consume_tokens([0, 0, 0])  # no token of a date, so what comes is an error of the matcher
            fill(self, allowed_W)

    monkeypatch.setattr(AnswerGrammar, "fill", gives_up)
    asked = {"date": SamplingParams(9, grammar=DATE), "free": SamplingParams(5, min_new_tokens=5)}
    date, free = vlm.generate([Request(name, ("What?",), params) for name, params in asked.items()], errors="return")
    assert "request 'date': its answer cannot be followed through its grammar any further" in str(date.error)
    assert (free.error, free.finish_reason) == (None, "length")


def test_without_a_grammar_llguidance_is_not_loaded(vlm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)  # whoever imports it now fails
    assert answer(vlm, "What?", max_new_tokens=2).error is None
    with pytest.raises(ImportError):
        answer(vlm, "What?", grammar=Grammar(regex="[xy]{3}"))


def compiler_of(vlm, *, more=0):
    family = vlm.family
    return GrammarCompiler(family.tokenizer, family.decoder.num_tokens + more, family.stop_token_ids)


def allowed(grammar, num_tokens):
    words = np.zeros(-(-num_tokens // 32), dtype=np.int32)
    grammar.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:num_tokens]).tolist())


@pytest.mark.parametrize("more", [0, 77], ids=["vocabulary", "padded vocabulary"])
def test_stop_tokens_may_come_exactly_where_the_grammar_accepts_and_special_ones_never(vlm, more):
    compiler, num_tokens = compiler_of(vlm, more=more), vlm.family.decoder.num_tokens + more
    spelled = vlm.family.tokenizer("red", add_special_tokens=False)["input_ids"]
    taken: list[int] = []
    begun, anything = compiler.begin(COLOUR, taken), compiler.begin(Grammar(regex="(?s).*"), [])
    special = set(vlm.family.tokenizer.all_special_ids) - vlm.family.stop_token_ids
    assert special
    assert not allowed(anything, num_tokens) & special
    assert max(allowed(anything, num_tokens)) < vlm.family.decoder.num_tokens
    for token_id in spelled:
        assert not allowed(begun, num_tokens) & vlm.family.stop_token_ids
        taken.append(token_id)
    assert allowed(begun, num_tokens) == vlm.family.stop_token_ids


def test_what_is_forbidden_is_not_drawn_at_the_edge_of_probability(vlm):
    """A sum of shares is 1 but for rounding: the last draw there is must fall into the last share."""
    compiler, num_tokens = compiler_of(vlm), vlm.family.decoder.num_tokens
    params = [SamplingParams(temperature=temperature, grammar=DATE) for temperature in (1e-30, 0.1, 1.0, 1e6)]
    digits = allowed(compiler.begin(DATE, []), num_tokens)
    for seed in range(20):
        logits = torch.randn(len(params), num_tokens, generator=torch.Generator().manual_seed(seed)) * 30
        batch = SamplingBatch.of(params, CPU, grammars=[compiler.begin(DATE, []) for _ in params])
        for draw in (0.0, 0.5, 1 - 2**-24, 1.0):
            assert set(draw_tokens(logits, batch, [draw] * len(params))[0].tolist()) <= digits


def test_free_rows_keep_their_very_numbers_and_nothing_waits_for_the_device(vlm):
    compiler, num_tokens = compiler_of(vlm), vlm.family.decoder.num_tokens
    logits = torch.randn(3, num_tokens)
    mask = GrammarMask({1: compiler.begin(DATE, [])}, CPU)
    with Operations() as done:
        found = mask.apply(logits)
    assert torch.equal(found[[0, 2]], logits[[0, 2]])
    assert found.isfinite().all()
    assert (found[1] > -1e30).sum() == 10
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "item")
    assert not [name for name in done.names if name.split(".")[1] in waits]


def test_rows_of_all_kinds_draw_what_they_draw_alone(vlm):
    """To the last bit, at every temperature, at the first token and at later ones."""
    compiler, num_tokens = compiler_of(vlm), vlm.family.decoder.num_tokens
    hot = SamplingParams(temperature=0.8, top_p=0.9)
    params = [SamplingParams(), hot, replace(hot, top_k=3), SamplingParams(repetition_penalty=1.4)]
    params += [replace(one, grammar=own) for one in params for own in (JSON, DATE)]
    prefixes = {JSON: compiler._spell('{"name":"a'), DATE: compiler._spell("19")}
    begun = [compiler.begin(one.grammar, prefixes[one.grammar]) if one.grammar else None for one in params]
    for seed in range(10):
        logits = torch.randn(len(params), num_tokens, generator=torch.Generator().manual_seed(seed))
        batch = SamplingBatch.of(params, CPU, grammars=begun)
        draws = {row: (row + 1) / 17 for row in batch.random}
        together = draw_tokens(logits, batch, list(draws.values()))
        for row, own in enumerate(params):
            alone = SamplingBatch.of([own], CPU, grammars=[begun[row]])
            drawn = draw_tokens(logits[row : row + 1], alone, [draws[row]] if alone.random else [])
            assert drawn[0, 0] == together[0, row]


def test_tokens_of_sentencepiece_are_read_as_the_bytes_that_they_stand_for():
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "r", "e", "d", "re", "red", "▁red"]
    model = models.BPE({word: n for n, word in enumerate(words)}, [("r", "e"), ("re", "d")], byte_fallback=True)
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(["<unk>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    compiler = GrammarCompiler(tokenizer, 320, frozenset({1}))
    begun = compiler.begin(Grammar(choices=("red", "é")), [])
    assert set(tokenizer.convert_ids_to_tokens(sorted(allowed(begun, 320)))) == {"<0x72>", "<0xC3>", "r", "re", "red"}
    assert [begun.accepts(text) for text in ("red", "é", " red", "re")] == [True, True, False, False]


def test_a_tokenizer_that_cannot_be_read_is_named():
    with pytest.raises(RequestError, match="llguidance cannot read this model's tokenizer"):
        GrammarCompiler(object(), 300, frozenset({1})).begin(COLOUR, [])
