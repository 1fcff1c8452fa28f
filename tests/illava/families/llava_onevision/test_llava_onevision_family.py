"""The LLaVA-OneVision family around its features: plans it refuses, prompts, loading."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionForConditionalGeneration

from illava.errors import ModelLoadError, PlanError, ReductionDidNotFireError, RequestError
from illava.families import load_family
from illava.families.loading import load_tokenizer
from illava.plan import EMPTY_PLAN, ReductionPlan, preset
from illava.preprocess import VisualInput
from tests.support.closeness import assert_close
from tests.support.models.onevision_tower import clip, picture, plan

# Plans that make no sense


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (plan("released", num_merged=5), "29 of 49 are left; 25 or 36 would be one"),
        (preset("illava-video"), "would leave 1 of 1"),
        (plan(budget={"keep_per_frame": 100}), "would remove nothing"),
    ],
)
def test_plans_that_do_not_fit_are_refused_in_words(family, bad, words):
    with pytest.raises(PlanError, match=words):
        family.check(bad)


@pytest.mark.parametrize(("stage", "layer", "last"), [("vision_block", 8, "7"), ("decoder_layer", 4, "3")])
def test_layers_out_of_range_are_refused(family, stage, layer, last):
    step = {"stage": stage, "layers": [layer], "reducer": {"kind": "illava", "num_merged": 3}}
    with pytest.raises(PlanError, match=last):
        family.check(ReductionPlan(steps=[step]))


def test_plans_that_fit_are_accepted(family):
    for which in (EMPTY_PLAN, plan("released"), plan("geometric", num_merged=5), plan(budget={"keep_per_frame": 9})):
        family.check(which)


def test_a_block_the_tower_never_runs_is_an_error_even_unchecked(family, preprocessor):
    step = {"stage": "vision_block", "layers": [30], "reducer": {"kind": "illava", "num_merged": 3}}
    with pytest.raises(ReductionDidNotFireError):
        family.encode([preprocessor.video(clip(1))], ReductionPlan(steps=[step]), trace=False)


def test_tiles_of_another_model_are_refused(family):
    with pytest.raises(RequestError, match="another model"):
        family.encode([VisualInput("video", np.zeros((1, 64, 64, 3), np.uint8), (64, 64))], EMPTY_PLAN, trace=False)


# Prompts


def test_the_prompt_holds_every_mediums_placeholders(family, preprocessor, stock):
    (first, second), video = preprocessor.images([picture(60, 60), picture(60, 80)]), preprocessor.video(clip(1))
    prompt = family.render([first, "What is ", second, "?", video], [5, 7, 3])
    ids = list(prompt.token_ids)
    for (start, length), count, token in zip(
        prompt.spans, (5, 7, 3), ("image_token_id", "image_token_id", "video_token_id"), strict=True
    ):
        assert length == count
        assert ids[start : start + length] == [getattr(stock.config, token)] * length
    text = [token for token in ids if token not in (stock.config.image_token_id, stock.config.video_token_id)]
    assert family.decode_text(text) == "user What is ?\nassistant\n"
    assert family.position_ids(prompt, [first, second, video]).tolist() == [list(range(len(ids)))]


def test_a_template_may_put_images_before_videos(onevision_folder, tmp_path, preprocessor):

    folder = shutil.copytree(onevision_folder, tmp_path / "model")
    template = (
        "{% for m in messages %}{% for k in ['image', 'video', 'text'] %}{% for c in m['content'] %}"
        "{% if c['type'] == k %}{{ c['text'] if k == 'text' else '<' + k + '>' }}{% endif %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    )
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    family = load_family(str(folder), dtype=torch.float32, device="cpu")
    image, video = preprocessor.images([picture(60, 60)])[0], preprocessor.video(clip(1))
    prompt = family.render(["hi", video, image], [4, 2])
    assert prompt.spans == ((2, 4), (0, 2))
    assert family.decode_text(prompt.token_ids[6:]) == "hi"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.json", b"{", "chat_template.json is not a JSON object with a key `chat_template`"),
        ("chat_template.json", b"\xff", "chat_template.json is not a JSON object with a key `chat_template`"),
        ("chat_template.json", b"[]", "chat_template.json is not a JSON object with a key `chat_template`"),
        ("chat_template.json", b"{}", "chat_template.json is not a JSON object with a key `chat_template`"),
        ("tokenizer.json", b"{", "has no tokenizer that can be loaded"),
        ("tokenizer.json", b'{"of another": "program"}', "has no tokenizer that can be loaded"),
        ("tokenizer.json", b'{"added_tokens": [], "model": {}}', "has no tokenizer that can be loaded"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_told_as_the_model_s(onevision_folder, tmp_path, name, content, message):
    folder = shutil.copytree(onevision_folder, tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(str(folder), revision=None)


def test_an_empty_request_is_refused(family):
    with pytest.raises(RequestError, match="empty"):
        family.render([], [])


# Loading


def test_stop_tokens_and_word_embeddings(family, stock):
    assert family.stop_token_ids == {stock.generation_config.eos_token_id}
    ids = torch.tensor([3, 1, 200])
    assert torch.equal(family.embed(ids), stock.get_input_embeddings()(ids))


@pytest.mark.parametrize(("key", "value"), [("vision_feature_layer", -2), ("vision_feature_layer", 5)])
def test_only_the_blocks_needed_are_run(onevision_folder, tmp_path, preprocessor, key, value):

    folder = shutil.copytree(onevision_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    family = load_family(str(folder), dtype=torch.float32, device="cpu")
    assert family.num_vision_blocks == {-2: 7, 5: 5}[value]
    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    mm_item = preprocessor.video(clip(1))
    pixels = torch.from_numpy(mm_item.tiles).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        theirs = stock.get_video_features(((pixels - 0.5) / 0.5)[None]).pooler_output[0]
    (encoded,) = family.encode([mm_item], EMPTY_PLAN, trace=False)
    assert_close(encoded.feature_KD[:16], theirs[:16])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llava"}, "is a .llava. model, which is not supported .*llava_onevision"),
        ({"vision_feature_select_strategy": "default"}, "SigLIP has none"),
        ({"vision_feature_layer": [-2, -1]}, "several hidden states"),
        ({"vision_feature_layer": -20}, "asks for hidden state"),
    ],
)
def test_models_this_package_cannot_run_are_refused(onevision_folder, tmp_path, change, words):

    folder = shutil.copytree(onevision_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelLoadError, match=words):
        load_family(str(folder), dtype=torch.float32, device="cpu")


def test_weights_that_are_missing_misshapen_corrupt_or_pickled_are_refused(onevision_folder, tmp_path):

    folder = shutil.copytree(onevision_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "layers.2.mlp" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"1 weights of .* are missing"):
        load_family(str(folder), dtype=torch.float32, device="cpu")
    save_file(weights | {lost: weights[lost][:1].clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="of another shape"):
        load_family(str(folder), dtype=torch.float32, device="cpu")
    (folder / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ModelLoadError, match="from safetensors"):
        load_family(str(folder), dtype=torch.float32, device="cpu")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="from safetensors"):
        load_family(str(folder), dtype=torch.float32, device="cpu")
