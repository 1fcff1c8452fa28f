"""InternVL with an empty plan against stock transformers, both towers, three decoders; and what is its own.

Its tiles and their order, the text around pictures, whole groups beside a CLS token, rotary tables of type ``dynamic``.
About 6 s of `make test`, and as much of `make test-long`, which runs the matrix of all families over it too.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.analysis.stock_parity import ParityCase, measure_parity
from illava.engine.prompt import assemble
from illava.errors import ModelLoadError, PlanError, PreprocessError
from illava.families.model_shape import load_model_shape
from illava.pixel_limits import PixelLimits
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.token_counts import VisualShape, expected_counts
from tests.support.closeness import assert_close
from tests.support.models.families import stock_class
from tests.support.models.internvl import DYNAMIC, LARGE_TOWER, NAMED, make_internvl
from tests.support.models.stock_parity import longer, prefill, prompt_of, stock_tokens

pytestmark = pytest.mark.numeric

NUM_NEW = 6
QWEN3 = {"model_type": "qwen3", "head_dim": 8}
LLAMA = {"model_type": "llama", "num_key_value_heads": 4}
MODELS = {
    "small tower, Qwen2, dynamic": ({}, DYNAMIC),
    "large tower, Qwen3": (LARGE_TOWER, QWEN3),
    "mean of none, Llama": ({"use_mean_pooling": False}, LLAMA),
}


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(
    scope="module",
    params=[name if n == 0 else pytest.param(name, marks=pytest.mark.long) for n, name in enumerate(MODELS)],
)
def loaded(request, tmp_path_factory):
    vision, text = MODELS[request.param]
    folder = make_internvl(tmp_path_factory.mktemp("internvl"), vision=vision, text=text)
    stock = stock_class("internvl").from_pretrained(folder, dtype=torch.float32).eval()
    return VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20), stock, load_preprocessor(str(folder))


@pytest.fixture(scope="module")
def requests(loaded):
    pre, sampling = loaded[2], SamplingParams(max_new_tokens=NUM_NEW)
    wide, tall, small = pre.images([picture(40, 90), picture(96, 33, 1), picture(30, 30, 2)])
    clip = pre.video([picture(24, 40, n) for n in range(5)])
    content = {
        "image": (wide, "What?"),
        "images with text between": ("A:", wide, "then B:", tall, small, "Compare."),
        "video": ("See", clip, "what happens?"),
        "video and images": (small, "is in", clip, "and", tall, "?"),
        "text": ("Only words.",),
    }
    return {name: Request(name, parts, sampling) for name, parts in content.items()}


def stock_inputs(vlm, request):
    """What stock transformers takes for this request: placeholders as our prompt has them, tiles in that order."""
    counts = [vlm.family.num_vision_tokens(mm_item) for mm_item in request.media]
    rendered = vlm.family.render(request.content, counts)
    ids = torch.tensor([rendered.token_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if request.media:
        order = sorted(range(len(counts)), key=rendered.spans.__getitem__)
        inputs["pixel_values"] = torch.cat([vlm.family.encoder.patches(request.media[n]) for n in order])
    return inputs


@torch.inference_mode()
def test_logits_and_greedy_text_equal_stock_alone_and_in_a_mixed_batch(loaded, requests):
    vlm, stock, _ = loaded
    prompts = [prompt_of(vlm, request, EMPTY_PLAN) for request in requests.values()]
    together = prefill(vlm, prompts, EMPTY_PLAN).logits_BV
    answers = vlm.generate(list(requests.values()))
    for row, (request, answer) in enumerate(zip(requests.values(), answers, strict=True)):
        inputs = stock_inputs(vlm, request)
        expected = stock(**inputs).logits[0, -1]
        assert_close(prefill(vlm, [prompts[row]], EMPTY_PLAN).logits_BV[0], expected)
        assert_close(together[row], expected)
        tokens = stock_tokens(stock, inputs, NUM_NEW)
        assert answer.token_ids == tokens, request.request_id
        assert vlm.generate([request])[0].token_ids == tokens
        usage, tiles = answer.usage, sum(len(mm_item.tiles) for mm_item in request.media)
        assert (usage.num_patches, usage.num_vision_tokens) == (64 * tiles, 16 * tiles)
        assert usage.num_prompt_tokens == inputs["input_ids"].shape[1]


@torch.inference_mode()
def test_under_a_plan_kept_tokens_keep_their_places_and_cached_is_recomputed(loaded, requests):
    vlm, _, _ = loaded
    illava = {"kind": "illava", "keep_ratio": 0.6}
    plan = ReductionPlan(steps=[{"stage": "vision_block", "layers": [1, 3], "reducer": illava}])
    for request in requests.values():
        if not request.media:
            continue
        encoded = vlm.family.encode(request.media, plan, trace=False)
        prompt = assemble(vlm.family, request, encoded)
        rendered = vlm.family.render(request.content, [mm_item.num_placeholders for mm_item in encoded])
        context = vlm.family._tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        slots = [n for n, token in enumerate(rendered.token_ids) if token == context]
        by_place, begun = {}, 0  # of every group, its slot: tile by tile in the order of the text, row by row
        for index in sorted(range(len(encoded)), key=rendered.spans.__getitem__):
            for tile in range(len(request.media[index].tiles)):
                for cell in range(16):
                    by_place[index, tile, cell // 4, cell % 4] = slots[begun]
                    begun += 1
        assert begun == len(slots)
        kept = [tuple(place) for place in prompt.coord_T4.tolist() if place[0] >= 0]
        text = [n for n in range(len(rendered.token_ids)) if n not in set(slots)]
        assert prompt.position_PT.tolist() == [sorted(text + [by_place[place] for place in kept])]
        assert int(prompt.next_position_P) == len(rendered.token_ids)
        assert len(kept) == 6 * sum(len(mm_item.tiles) for mm_item in request.media)  # 16 -> 10 -> 6
    request = requests["video and images"]
    tokens = vlm.generate([request], plan=plan)[0].token_ids
    assert vlm.generate(list(requests.values()), plan=plan)[3].token_ids == tokens
    prompt = prompt_of(vlm, request, plan)
    for n, token in enumerate(tokens):
        assert int(prefill(vlm, [prompt], plan).logits_BV[0].argmax()) == token, n
        prompt = longer(vlm, prompt, token)


def test_the_text_around_pictures_is_transformers_own(loaded, requests):
    vlm, _, _ = loaded
    request = requests["video and images"]
    processor = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=16
    )
    small, clip, tall = request.media
    pictures = [
        InternVLProcessor.replace_image_token(processor, {"num_patches": [len(one.tiles)]}, 0) for one in (small, tall)
    ]
    frames = InternVLProcessor.replace_video_token(processor, {"pixel_values_videos": [clip.tiles]}, 0)
    ids = vlm.family.render(request.content, [vlm.family.num_vision_tokens(one) for one in request.media]).token_ids
    text = vlm.family._tokenizer.decode(list(ids), skip_special_tokens=False)
    assert f"{pictures[0]}\nis in{frames}\nand{pictures[1]}\n?" in text
    assert frames.startswith("Frame1: <img>")


def test_tiles_are_those_of_the_processor_and_a_limit_is_its_max_patches(tmp_path):
    folder = make_internvl(tmp_path)
    rng = np.random.default_rng(3)
    sizes = [(32, 32), (64, 64), (500, 30), (30, 500), (96, 64), *rng.integers(20, 300, (12, 2)).tolist()]
    for most, limits in ((6, PixelLimits()), (3, PixelLimits(max_tiles=3)), (1, PixelLimits(max_tiles=1))):
        stock = GotOcr2ImageProcessorPil.from_pretrained(folder, crop_to_patches=True, max_patches=most)
        pre = load_preprocessor(str(folder), pixel_limits=limits)
        frames = [picture(*size, seed=n) for n, size in enumerate(sizes)]
        theirs = stock(frames, return_tensors="np", do_rescale=False, do_normalize=False)
        ours = pre.images(frames)
        assert [len(one.tiles) for one in ours] == list(theirs["num_patches"])
        assert len(pre.images(frames[:1])[0].tiles) == theirs["num_patches"][0]  # alone or among others
        tiles = np.concatenate([one.tiles for one in ours])
        assert np.array_equal(tiles.transpose(0, 3, 1, 2), np.asarray(theirs["pixel_values"]).astype(np.uint8))
        assert max(len(one.tiles) for one in ours) == pre.geometry.most_tiles
        assert all(one.nbytes <= pre.max_nbytes(1) for one in ours)
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"min_patches": 1', '"min_patches": 2'))
    with pytest.raises(ModelLoadError, match="max_tiles is 1, and this model cuts an image into 2 tiles at least"):
        load_preprocessor(str(folder), pixel_limits=PixelLimits(max_tiles=1))


def test_a_lower_resolution_is_fewer_tiles_and_the_same_thumbnail(tmp_path):
    pre = load_preprocessor(str(make_internvl(tmp_path)))
    wide = pre.images([picture(60, 95)])[0]
    assert len(wide.tiles) == 7
    for ratio, count in ((0.6, 4), (0.3, 1)):
        fewer = pre.shrink(wide, ratio)
        assert len(fewer.tiles) <= count
        assert np.array_equal(fewer.tiles[-1], wide.tiles[-1])
    for mm_item, share in ((pre.images([picture(32, 32)])[0], 0.5), (pre.video([picture(32, 32)]), 0.5), (wide, 0.1)):
        with pytest.raises(PreprocessError, match="its tower takes tiles of one size"):
            pre.shrink(mm_item, share)


def test_counts_of_a_dry_run_are_those_of_the_rows(loaded, requests):
    vlm, _, pre = loaded
    for name, per in (("image", "medium"), ("video", "frame")):  # the tiles of an image are no frames
        steps = [
            {"stage": "vision_block", "layers": [2], "reducer": {"kind": "illava", "keep_ratio": 0.6}},
            {"stage": "decoder_input", "reducer": {"kind": "illava", "per": per, "keep_ratio": 0.5}},
            {"stage": "decoder_layer", "layers": [2], "reducer": {"kind": "fastv", "keep_ratio": 0.5}},
        ]
        plan = ReductionPlan.model_validate({"steps": steps})
        vlm.family.check(plan)
        (answer,) = vlm.generate([requests[name]], plan=plan)
        (mm_item,) = requests[name].media
        num_frames = len(mm_item.tiles) if name == "video" else 1
        shape = VisualShape(mm_item.kind, *mm_item.original_size, num_frames)
        counts = expected_counts(
            pre.geometry, plan, [shape], num_vision_blocks=6, num_decoder_layers=vlm.family.decoder.num_layers
        )
        usage = answer.usage
        assert counts.exact
        for column in ("num_patches", "num_vision_tokens", "num_vision_tokens_kept", "num_decoder_tokens_kept"):
            assert getattr(counts, column) == getattr(usage, column), (name, column)


def test_what_makes_no_sense_is_refused(tmp_path):
    folder = make_internvl(tmp_path)
    vlm = VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20)
    with pytest.raises(PlanError, match="the groups of a tile are its tokens as they are"):
        vlm.family.check(ReductionPlan(layout="released"))
    frame = {"stage": "decoder_input", "reducer": {"kind": "illava", "per": "frame", "keep_ratio": 0.99}}
    with pytest.raises(PlanError, match="a video frame enters the LLM as 16 tokens"):
        vlm.family.check(ReductionPlan.model_validate({"steps": [frame]}))
    path = folder / "config.json"
    config = path.read_text()
    for before, after, said in (
        ('"vision_feature_layer": -1', '"vision_feature_layer": -2', "vision_feature_layer -2 with"),
        ('"downsample_ratio": 0.5', '"downsample_ratio": 0.3', "downsample_ratio 0.3 does not join a tile of 32 px"),
    ):
        assert before in config
        path.write_text(config.replace(before, after))
        with pytest.raises(ModelLoadError, match=said):
            VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20)
    path.write_text(config)
    settings = folder / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    left = {key: value for key, value in content.items() if key not in (*NAMED, "model_specific_special_tokens")}
    assert len(left) < len(content)
    settings.write_text(json.dumps(left))
    with pytest.raises(ModelLoadError, match=r"names no start_image_token, end_image_token.*ends in -hf"):
        VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20)


def test_the_parity_of_a_user_s_own_files_holds(tmp_path):
    folder = str(make_internvl(tmp_path))
    pre, wide = load_preprocessor(folder), picture(40, 90)
    clip = pre.video([picture(24, 40, n) for n in range(3)])
    cases = [ParityCase("page", pre.images([wide]), "What?", (wide,)), ParityCase("clip", (clip,), "What?")]
    found = measure_parity(folder, cases, dtype="float32", device="cpu", max_new_tokens=3)
    assert found.holds, found
    assert [(one.problem, one.has_same_answer) for one in found.cases] == [(None, True)] * 2
    assert [one.num_vision_tokens for one in found.cases] == [48, 48]


def test_tables_that_change_within_the_model_s_positions_are_refused(tmp_path):
    text = {"rope_parameters": {**DYNAMIC["rope_parameters"], "original_max_position_embeddings": 4096}}
    folder = make_internvl(tmp_path, text=text)
    assert load_model_shape(str(folder)).num_decoder_layers == 4
    with pytest.raises(ModelLoadError, match="rotary tables of type 'dynamic' change with the input"):
        VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20)
