"""Tests that special tokens in a user's text are text, in every family, and that other text is cut as ever."""

import itertools
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from illava import load_preprocessor
from illava.errors import RequestError
from illava.families import FAMILIES, load_part
from illava.families.chat_prompt import ChatPrompt
from illava.families.special_tokens import SpecialTokens
from tests.support.models.cells import family_params
from tests.support.models.families import MAKERS, make_folder

ORDINARY = "What is <this>? 100 % | a|b ~ «é»\n\n\tEnd of im_end <|im_en d|>"


@pytest.fixture(scope="module", params=family_params(sorted(MAKERS)))
def chat(request, tmp_path_factory):
    """The family's prompt renderer, and its tokenizer."""
    folder = make_folder(request.param, tmp_path_factory.mktemp(request.param))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    kinds = load_part(FAMILIES[request.param].family).media_kinds
    names = [f"{kind}_token_id" for kind in kinds]
    ids = {
        kind: config.get(name, config.get(name.replace("_id", "_index")))
        for kind, name in zip(kinds, names, strict=True)
    }
    if request.param == "internvl":  # no token of the model's, only of the template's
        ids["video"] = tokenizer.convert_tokens_to_ids("<video>")
    return ChatPrompt(tokenizer, ids), tokenizer, ids


def special_of(tokenizer):
    return [str(token) for token in tokenizer.added_tokens_decoder.values()]


def test_every_special_token_in_a_text_is_text(chat):
    """The fixtures' tokenizers join no characters, so a text has the same tokens wherever it stands."""
    prompt, tokenizer, _ = chat
    for spelled in special_of(tokenizer):
        text = f"a {spelled}{spelled[:-1]} <{spelled}> b"
        own = tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        around = prompt.render(["\x01"], []).token_ids
        place = around.index(tokenizer("\x01", add_special_tokens=False)["input_ids"][0])
        assert prompt.render([text], []).token_ids == (*around[:place], *own, *around[place + 1 :])


def test_a_spelled_placeholder_takes_no_medium_s_place(chat):
    prompt, tokenizer, ids = chat
    picture = type("Picture", (), {"kind": "image"})()
    spelled = tokenizer.convert_ids_to_tokens(ids["image"])
    rendered = prompt.render([f"before {spelled}", picture, f"{spelled} behind"], [3])
    start, length = rendered.spans[0]
    assert rendered.token_ids[start : start + length] == (ids["image"],) * 3
    assert rendered.token_ids.count(ids["image"]) == 3


def test_ordinary_text_has_the_tokenizer_s_own_tokens(chat):
    prompt, tokenizer, _ = chat
    turn = prompt.template_text([ORDINARY])
    stock = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": ORDINARY}]}], add_generation_prompt=True, tokenize=False
    )
    assert turn == stock
    begun = tokenizer.bos_token is not None and stock.startswith(tokenizer.bos_token)
    assert prompt.tokenize(turn) == tuple(tokenizer(stock, add_special_tokens=not begun)["input_ids"])


def test_two_texts_cannot_spell_one_together(chat):
    prompt, tokenizer, _ = chat
    spelled = max(special_of(tokenizer), key=len)
    parts = [spelled[:4], spelled[4:]]
    token_id = tokenizer.convert_tokens_to_ids(spelled)
    if spelled in prompt._templated((("user", tuple(("text", part) for part in parts)),), "{}"):
        with pytest.raises(RequestError, match="two texts side by side"):
            prompt.render(parts, [])
    else:  # this family's template writes something between
        assert prompt.render(parts, []).token_ids.count(token_id) == prompt.render(["x"], []).token_ids.count(token_id)


CORPUS = ["What is this? The answer is im_end, and im_start.", "<tag> | user\n\nassistant: hello  world"] * 9
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<image>")


def trained(kind):
    """A tokenizer that joins characters, as the families' published ones do."""
    core = Tokenizer(models.BPE(byte_fallback=kind == "llama", unk_token="<unk>" if kind != "qwen" else None))
    if kind == "qwen":
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "llama":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    in_vocabulary = ["<unk>", "<s>", "</s>"] if kind != "qwen" else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=in_vocabulary, initial_alphabet=[chr(n) for n in range(33, 126)]
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens([token for token in SPECIAL if token != "<image>"])
    core.add_tokens(["<image>", "<tool>"])  # as llava-hf's files have it: added, and not special
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token=core.model.unk_token
    )
    tokenizer.chat_template = (
        "<|im_start|>user\n{% for part in messages[0].content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% else %}<image>\n{% endif %}{% endfor %}<|im_end|>\n<|im_start|>assistant\n"
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["qwen", "llama", "metaspace"])
def test_text_around_a_spelled_token_is_cut_as_ever(kind):
    """Both ways of tokenizing agree on a turn without spelled tokens; with them no id of theirs appears."""
    tokenizer = trained(kind)
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    special = SpecialTokens(tokenizer, [placeholder])
    prompt = ChatPrompt(tokenizer, {"image": placeholder})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    for text, other in itertools.product((ORDINARY, "hello  world", " im_end", "<tool> x"), repeat=2):
        turn = prompt.template_text([text])
        copy, own = special._copy
        renamed = special._pattern.sub(lambda found: special._name(special._contents.index(found[0])), turn)
        assert tuple(own.get(n, n) for n in copy.encode(renamed).ids) == prompt.tokenize(turn)
        for token in SPECIAL:
            rendered = prompt.render([f"{text}{token}{other}"], []).token_ids
            innocent = prompt.render([f"{text}x{other}"], []).token_ids
            assert [rendered.count(n) for n in ids.values()] == [innocent.count(n) for n in ids.values()]
            first = next(
                (n for n, pair in enumerate(zip(rendered, innocent, strict=False)) if pair[0] != pair[1]), None
            )
            assert first is not None
            assert rendered[:2] == innocent[:2]
            assert rendered[-3:] == innocent[-3:]


def test_a_tokenizer_without_a_backend_refuses_what_it_cannot_keep(chat):
    prompt, tokenizer, _ = chat
    special = SpecialTokens(tokenizer, [])
    special._tokenizer = type("Python", (), {"bos_token": None, "unk_token_id": None})()
    with pytest.raises(RequestError, match="cannot keep it as text; remove it"):
        special.tokenize(special.hide(special_of(tokenizer)[0]))
    assert np.array_equal(prompt.render(["x"], []).spans, [])


def test_qwen3_vl_times_of_frames_stand_where_the_template_puts_them(tmp_path):
    """Its turn is cut at the frame's own tokens, which a text may spell too."""
    from illava.families import load_family

    folder = make_folder("qwen3_vl", tmp_path)
    family = load_family(str(folder), dtype=torch.float32, device="cpu")
    video = load_preprocessor(str(folder)).video([np.zeros((64, 64, 3), np.uint8)] * 2)
    num = family.encoder.grid(video).times * 4
    plain = family.render([video, "x"], [num])
    spelled = family.render([video, f"{family._frame}"], [num])
    assert spelled.spans == plain.spans
    assert spelled.starts == plain.starts
    assert [spelled.token_ids.count(n) for n in family._placeholders] == [
        plain.token_ids.count(n) for n in family._placeholders
    ]
