"""The harness's model, built and asked as the installed lmms-eval does it (the Makefile installs it).

`test_lmms_eval_tasks.py` runs the harness's own command.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from lmms_eval.models.registry_v2 import ModelRegistryV2
from PIL import Image

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.errors import RequestError
from pipeline import lmms_eval_model as plugin

ROOT = Path(__file__).resolve().parents[2]
CONFIG, MODEL, CLIPS = (ROOT / "configs" / name for name in ("demo_questions.yaml", "demo/model", "demo/clips"))
OPTIONS = {"max_new_tokens": 6, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def model():
    keys = f"config={CONFIG},model.model_id={MODEL},reduction.steps=[],media.num_frames=4,model.kv_cache_bytes=50000000"
    built = plugin.HarnessModel.create_from_arg_string(keys, {"batch_size": 1, "max_batch_size": None, "device": "cpu"})
    yield built
    built.clean()


def asked(model, docs, *, options=OPTIONS, kind="generate_until"):
    """Instances as `ConfigurableTask.construct_requests` makes them."""
    model.task_dict = {"local": {"test": docs}}
    return [
        plugin.Instance(
            kind,
            (doc["question"], options, lambda doc: doc["visuals"], number, "local", "test"),
            0,
            {"task": "local", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
    ]


def test_the_harness_finds_the_model_by_its_entry_point():
    harness = ModelRegistryV2()
    harness.load_entrypoint_manifests("lmms_eval.models")
    assert harness.get_model_class("illava") is plugin.HarnessModel
    assert plugin.HarnessModel.is_simple


def test_answers_are_those_of_the_model_alone_and_a_video_is_loaded_once(model, monkeypatch):
    clip = str(sorted(CLIPS.glob("*.mp4"))[0])
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 120, 4), dtype=np.uint8), "RGBA")
    texts = ("Is the red object moving right?", "Describe the video.", "What is here?")
    docs = [{"question": text, "visuals": [clip]} for text in texts[:2]]
    docs += [{"question": texts[2], "visuals": [[picture]]}, {"question": texts[2], "visuals": None}]
    loads = Counter()
    load = model._loader.load
    monkeypatch.setattr(model._loader, "load", lambda item: loads.update([item.uris[0]]) or load(item))
    found = model.generate_until(asked(model, docs))
    assert loads == {clip: 1}
    video = load(plugin.MediaItem("x", (clip,), "video", (-1,), ("",))).media
    image = load_preprocessor(str(MODEL)).images([np.asarray(picture.convert("RGB"))])
    contents = [(*video, texts[0]), (*video, texts[1]), (*image, texts[2]), (texts[2],)]
    vlm = VLM.from_pretrained(str(MODEL), kv_cache_bytes=50_000_000, device="cpu", dtype="float32")
    alone = vlm.generate([Request(str(n), one, SamplingParams(max_new_tokens=6)) for n, one in enumerate(contents)])
    assert [one.text for one in found] == [one.text for one in alone]
    counts = [(one.token_counts.input_tokens, one.token_counts.output_tokens) for one in found]
    assert counts == [(one.usage.num_prompt_tokens, one.usage.num_generated_tokens) for one in alone]


def test_what_fails_is_an_empty_answer_that_is_said(model, tmp_path, caplog):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    docs = [{"question": "?", "visuals": [str(broken)]}, {"question": "What?", "visuals": None}]
    first, second = model.generate_until(asked(model, docs))
    assert (first.text, first.token_counts) == ("", None)
    assert second.token_counts.output_tokens > 0
    assert 'local/0/0 failed and is answered by ""' in caplog.text


def test_marks_in_the_text_are_where_the_pictures_go():
    assert plugin.content_of("What?", ["a", "b"]) == ("a", "b", "What?")
    assert plugin.content_of("<image>One, <image> two", ["a", "b"]) == ("a", "One, ", "b", " two")
    with pytest.raises(RequestError, match="1 times <image> for 2 media"):
        plugin.content_of("<image>", ["a", "b"])


def test_options_of_generation(model, caplog):
    assert model._sampling({}) == SamplingParams(max_new_tokens=1024)
    assert model._sampling({"temperature": 0.7, "do_sample": False}) == SamplingParams(max_new_tokens=1024)
    drawn = model._sampling({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "image_aspect_ratio": "pad"})
    assert (drawn.temperature, drawn.top_p, drawn.max_new_tokens) == (0.7, 0.9, 5)
    assert "['image_aspect_ratio'] have no meaning here" in caplog.text
    for until, stop in {("\n\n", ""): ("\n\n",), ".": (".",), "": (), None: ()}.items():
        assert model._sampling({"until": until}).stop == stop
    with pytest.raises(RequestError, match="num_beams"):
        model._sampling({"num_beams": 5})


def test_an_answer_ends_at_the_first_mark_and_no_token_is_drawn_behind_it(model):
    docs = [{"question": "Describe the video.", "visuals": None}]
    [whole] = model.generate_until(asked(model, docs, options=OPTIONS | {"max_new_tokens": 12, "until": None}))
    mark = whole.text[4]
    assert mark not in whole.text[:4], "another question must be asked"
    [ended] = model.generate_until(asked(model, docs, options=OPTIONS | {"max_new_tokens": 12, "until": [mark, ""]}))
    assert ended.text == whole.text[:4]
    assert ended.token_counts.output_tokens < whole.token_counts.output_tokens


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until_multi_round"])
def test_what_it_cannot_do_is_refused_in_words(model, kind):
    requests = asked(model, [{"question": "?", "visuals": None}], kind=kind)
    with pytest.raises(RequestError, match=f"task local asks for {kind}"):
        getattr(model, kind)(requests)
