"""What is Qwen3-VL's own: deepstack features through the decoder's reductions, and the times between frames."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from illava import Request
from illava.engine.prompt import assemble, pack
from illava.plan import ReductionPlan
from illava.reducers.ward import Ward
from tests.support.closeness import assert_close
from tests.support.models.stock_parity import prefill

pytestmark = [pytest.mark.numeric, pytest.mark.parametrize("loaded", ["qwen3_vl"], indirect=True)]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def content_of(pre):
    video = pre.video([picture(24, 40, n) for n in range(7)], timestamps_s=[0.5 * n for n in range(7)])
    return ("Is ", *pre.images([picture(40, 66)]), " in ", video, "?")


def slow_logits(stock, prompt, deepstack, steps):
    """Hugging Face's layers one by one over one prompt; visual tokens and their deepstack features mixed by hand."""
    model = stock.model.language_model
    hidden, places = list(prompt.hidden_TD), [tuple(place) for place in prompt.coord_T4.tolist()]
    positions = prompt.position_PT.T.tolist()
    deepstack = [dict(zip((p for p in places if p[0] >= 0), layer, strict=True)) for layer in deepstack]
    for n, layer in enumerate(model.layers):
        for step in (step for step in steps if step.layer == n):
            before = [place for place in places if place[0] >= 0]
            weights = dict(zip(map(tuple, step.coords.tolist()), step.matrix.to_dense(), strict=True))
            old = dict(zip(places, hidden, strict=True))
            mixed = {own: sum(w * old[p] for w, p in zip(row, before, strict=True)) for own, row in weights.items()}
            deepstack = [
                {own: sum(w * deep[p] for w, p in zip(row, before, strict=True)) for own, row in weights.items()}
                for deep in deepstack
            ]
            alive = [i for i, place in enumerate(places) if place[0] < 0 or place in weights]
            hidden = [mixed.get(places[i], hidden[i]) for i in alive]
            positions, places = [positions[i] for i in alive], [places[i] for i in alive]
        rotary = model.rotary_emb(torch.stack(hidden)[None], torch.tensor(positions).T[:, None])
        hidden = list(layer(torch.stack(hidden)[None], position_embeddings=rotary, attention_mask=None)[0])
        if n < len(deepstack):
            hidden = [h + deepstack[n].get(place, 0) for h, place in zip(hidden, places, strict=True)]
    return stock.lm_head(model.norm(hidden[-1]))


@torch.inference_mode()
@pytest.mark.parametrize("layers", [[1], [2], [1, 2, 3]])
def test_deepstack_follows_every_reduction_to_its_layer(loaded, layers):
    vlm, stock, pre = loaded
    steps = [
        {"stage": "vision_block", "layers": [1, 3], "reducer": {"kind": "illava", "keep_ratio": 0.8}},
        {"stage": "decoder_layer", "layers": layers, "reducer": {"kind": "illava", "keep_ratio": 0.7}},
    ]
    which, request = ReductionPlan(steps=steps), Request("r", content_of(pre))
    encoded = vlm.family.encode(request.media, which, trace=False)
    prompt = assemble(vlm.family, request, encoded)
    deepstack = [torch.cat(layer) for layer in zip(*(mm_item.deepstack for mm_item in encoded), strict=True)]
    done = prefill(vlm, [prompt], which, traced=[0])
    assert [step.layer for step in done.traces[0]] == layers
    assert_close(done.logits_BV[0], slow_logits(stock, prompt, deepstack, done.traces[0]))
    without = slow_logits(stock, prompt, [], done.traces[0])
    assert (done.logits_BV[0] - without).abs().max() > 0.1


def test_times_stand_before_the_frames_and_do_not_part_the_video(loaded):
    vlm, _, pre = loaded
    content = content_of(pre)
    request = Request("r", content)
    encoded = vlm.family.encode(request.media, ReductionPlan(), trace=False)
    ids = vlm.family.render(content, [mm_item.num_placeholders for mm_item in encoded]).token_ids
    text = vlm.family._tokenizer.decode(list(ids), skip_special_tokens=False)
    assert theirs(content[3], encoded[1].num_placeholders) in text
    assert text.count("<|vision_start|>") == 1 + 4
    assert "<0.2 seconds>" in text  # halfway between 0 and 0.5, as they round it
    prompt = assemble(vlm.family, request, encoded)
    video = [span for span in prompt.token_spans if span.mm_index == 1]
    assert [span.frame for span in video] == [0, 1, 2, 3]
    assert len({span.visual_span for span in video}) == 4
    counts = pack([prompt]).counts
    for per, num_scopes in (("span", 5), ("medium", 2), ("prompt", 1)):
        assert len(counts.select(Ward(keep_ratio=0.5, per=per)).lengths) == num_scopes


def theirs(video, num_placeholders):
    """Transformers' own expansion of the video's placeholder: frame n was taken at n / 2 seconds."""
    processor = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
    )
    processor._calculate_timestamps = lambda *args: Qwen3VLProcessor._calculate_timestamps(processor, *args)
    metadata = SimpleNamespace(fps=2.0, frames_indices=list(range(len(video.tiles))))
    grid = torch.tensor([[4, 2, num_placeholders // 4 * 2]])
    inputs = {"video_grid_thw": grid, "video_metadata": [metadata]}
    return Qwen3VLProcessor.replace_video_token(processor, inputs, 0)


def test_a_video_keeps_its_frames_apart_where_times_are_unknown(loaded):
    vlm, _, pre = loaded
    video = pre.video([picture(24, 40)] * 3)
    prompt = vlm.family.render([video], [vlm.family.num_vision_tokens(video)])
    text = vlm.family._tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False)
    assert "<0.0 seconds>" in text  # 24 frames a second, as transformers assumes
    assert "<0.1 seconds>" in text
    assert len(prompt.starts[0]) == 2
