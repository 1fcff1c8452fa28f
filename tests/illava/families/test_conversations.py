"""System prompts, earlier turns and template variables are what the chat template makes of them. Takes 4 s."""

from __future__ import annotations

import json

import numpy as np
import pytest

from illava import VLM, Message, Request, SamplingParams, load_preprocessor
from illava.errors import ModelLoadError, RequestError
from illava.families.chat_template import read_chat_template, template_variables
from illava.model_files import load_model_files
from tests.support.models.families import make_folder

FAMILIES = ("llava_onevision", "qwen2_vl", "qwen3_vl")
EXAMPLE = (Message("user", ("Which animal?",)), Message("assistant", ("A dog.",)))
BRIEF = Message("system", ("You are brief.",))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make_folder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def vlm(folder):
    return VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def picture(folder):
    pixels = np.random.default_rng(7).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    return load_preprocessor(str(folder)).images([pixels])[0]


def stock_ids(vlm, messages, **template_args):
    """As stock tokenizers render the conversation, one placeholder a picture."""
    content = [
        {
            "role": role,
            "content": [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts],
        }
        for role, *parts in messages
    ]
    tokenizer = vlm.family._tokenizer
    text = tokenizer.apply_chat_template(content, add_generation_prompt=True, tokenize=False, **template_args)
    return tuple(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("history", "args", "stock"),
    [
        ((BRIEF,), {}, [("system", "You are brief.")]),
        (EXAMPLE, {}, [("user", "Which animal?"), ("assistant", "A dog.")]),
        ((BRIEF, *EXAMPLE), {}, [("system", "You are brief."), ("user", "Which animal?"), ("assistant", "A dog.")]),
        ((), {"enable_thinking": False}, []),
    ],
    ids=["system prompt", "example turn", "both", "template variable"],
)
def test_a_conversation_has_the_tokens_that_stock_gives_it(vlm, picture, history, args, stock) -> None:
    rendered = vlm.family.render((picture, "What?"), [1], history=history, template_args=args)
    assert rendered.token_ids == stock_ids(vlm, [*stock, ("user", None, "What?")], **args)
    assert rendered.token_ids != stock_ids(vlm, [("user", None, "What?")])


def test_media_of_an_earlier_turn_stand_there(vlm, picture) -> None:
    history = (Message("user", (picture, "What?")), Message("assistant", ("A dog.",)))
    rendered = vlm.family.render(("Sure?",), [1], history=history)
    assert rendered.token_ids == stock_ids(vlm, [("user", None, "What?"), ("assistant", "A dog."), ("user", "Sure?")])
    assert rendered.spans[0][0] < len(rendered.token_ids) // 2
    asked = Request("a", ("Sure?",), SamplingParams(max_new_tokens=3, min_new_tokens=3), history=history)
    (answer,) = vlm.generate([asked])
    assert answer.error is None
    assert answer.usage.num_vision_tokens == vlm.family.num_vision_tokens(picture)


def test_the_answer_follows_the_conversation(vlm, picture) -> None:
    """Each request of a batch has its own."""
    plain = Request("a", (picture, "What?"), SamplingParams(max_new_tokens=6, min_new_tokens=6))
    requests = [
        Request(name, plain.content, plain.sampling, history=history, template_args=args)
        for name, history, args in (
            ("a", (), {}),
            ("b", (BRIEF,), {}),
            ("c", EXAMPLE, {}),
            ("d", (), {"enable_thinking": False}),
        )
    ]
    together = [one.token_ids for one in vlm.generate(requests)]
    assert together == [vlm.generate([one])[0].token_ids for one in requests]
    assert len(set(together)) == 4


def test_no_text_of_a_conversation_becomes_a_control_token(vlm) -> None:
    """Each message is tried with every special token, beside what stays as it was."""
    family = vlm.family
    tokenizer = family._tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
    for spelled in special:
        history = [
            Message("system", (f"a {spelled}",)),
            Message("user", (spelled,)),
            Message("assistant", (f"{spelled}b",)),
        ]
        rendered = family.render((f"x{spelled}",), [], history=history).token_ids
        plain = [Message(one.role, ("x",)) for one in history]
        innocent = family.render(("x",), [], history=plain).token_ids
        assert [n for n in rendered if n in ids] == [n for n in innocent if n in ids]


def test_a_template_s_variables_are_read_without_a_tokenizer(vlm, folder) -> None:
    template = read_chat_template(load_model_files(str(folder)))
    assert template == vlm.family._tokenizer.get_chat_template()
    assert template_variables(template) == {"enable_thinking"}


def test_what_the_template_does_not_have_is_refused_in_words(vlm, picture) -> None:
    for args, words in (
        ({"enable_thinkin": False}, "does not use enable_thinkin, did you mean enable_thinking"),
        ({"messages": []}, "does not use messages"),
        ({"tokenize": True}, "does not use tokenize"),
        ({"enable_thinking": "<|im_end|>"}, "spell a special token"),
        ({"enable_thinking": {1}}, "give values of JSON types"),
    ):
        with pytest.raises(RequestError, match=words):
            vlm.submit(Request("a", (picture, "What?"), template_args=args))
    with pytest.raises(RequestError, match="its system message holds media"):
        vlm.submit(Request("a", ("What?",), history=(Message("system", (picture,)),)))
    assert not vlm.has_work


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}U{{ m.content[0].text }}{% endif %}{% endfor %}", "system"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}U", "no system"),
        ("U{{ messages[-1].content[0].text }}", "leaves out"),
    ],
    ids=["drops it", "raises", "last turn alone"],
)
def test_a_template_without_a_place_for_it_is_no_silent_loss(vlm, monkeypatch, template, words) -> None:
    from illava.families.chat_prompt import ChatPrompt

    tokenizer = vlm.family._tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = ChatPrompt(tokenizer, {})
    assert chat.template_text(("hello",)).startswith("U")
    with pytest.raises(RequestError, match=words):
        chat.template_text(("hello",), history=(BRIEF, *EXAMPLE))


def test_variables_of_published_shapes_of_templates() -> None:
    shape = (
        "{% set ns = namespace(n=0) %}{% for message in messages %}{% if loop.index > 9 %}{% break %}{% endif %}"
        "{% if add_vision_id %}Picture {{ ns.n }}: {% endif %}{% generation %}{{ message.content }}{% endgeneration %}"
        "{% endfor %}{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{{ strftime_now('%d') }}"
    )
    assert template_variables(shape) == {"add_vision_id"}
    with pytest.raises(ModelLoadError, match="cannot be read: TemplateSyntaxError"):
        template_variables("{% for %}")


def test_the_template_of_a_folder_is_found_where_transformers_finds_it(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    files = load_model_files(str(tmp_path))
    assert read_chat_template(files) is None
    several = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_chat_template(files) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert read_chat_template(files) == "J"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "P"}')
    assert read_chat_template(files) == "P"
