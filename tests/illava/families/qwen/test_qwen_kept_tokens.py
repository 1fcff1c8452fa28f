"""What kept tokens of the Qwen towers keep in the decoder: positions, the order of text, answers in batches."""

import pytest
import torch

from illava import Request, SamplingParams
from illava.engine.prompt import assemble
from tests.support.closeness import assert_close
from tests.support.models.qwen_towers import encode, picture, plan, video
from tests.support.models.stock_parity import longer, prefill, prompt_of

pytestmark = pytest.mark.numeric

# Positions and text in the prompt


def true_positions(prompt_ids, grids, visual_ids):
    """Three axes for every slot, counted by hand; ``grids``: (times, rows, cols, interval) of groups, in order."""
    positions, position, slot, grids = [], 0, 0, list(grids)
    while slot < len(prompt_ids):
        if prompt_ids[slot] not in visual_ids:
            positions.append((position,) * 3)
            position, slot = position + 1, slot + 1
            continue
        times, rows, cols, interval = grids.pop(0)
        for time in range(times):
            for row in range(rows):
                positions += [(position + int(time * interval), position + row, position + col) for col in range(cols)]
        position += max(rows, cols)
        slot += times * rows * cols
    return positions


def prompt_grids(vlm, media):
    """Grids of every medium as they stand in the prompt: Qwen3 writes a video frame by frame."""
    interval = 2 * 1.4 if vlm.family.model_type == "qwen2_5_vl" else 1
    apart, grids = vlm.family.model_type.startswith("qwen3"), []
    for grid in map(vlm.family.encoder.grid, media):
        times, rows, cols = grid.times, grid.rows // 2, grid.cols // 2
        grids.append([(1, rows, cols, 1)] * times if apart else [(times, rows, cols, interval)])
    return grids


def test_kept_tokens_keep_their_true_positions_and_text_its_order(vlm, pre):
    first, second = pre.images([picture(40, 66), picture(64, 30)])
    content = ("A ", first, " in between ", second, video(pre, 8, 24, 40), " end?")
    request, which = Request("r", content), plan(vlm)
    media = request.media
    encoded = encode(vlm, media, which)
    prompt = assemble(vlm.family, request, encoded)
    ids = vlm.family.render(content, [mm_item.num_placeholders for mm_item in encoded]).token_ids
    to_id = vlm.family._tokenizer.convert_tokens_to_ids
    visual_ids = {to_id("<|image_pad|>"), to_id("<|video_pad|>")}
    grids = prompt_grids(vlm, media)
    truth = true_positions(ids, [grid for own in grids for grid in own], visual_ids)
    # which slots survive, from places alone
    starts = [n for n, token in enumerate(ids) if token in visual_ids and ids[n - 1] not in visual_ids]
    alive = {n for n, token in enumerate(ids) if token not in visual_ids}
    for mm_item, own in zip(encoded, grids, strict=True):
        begins, (times, rows, cols, _) = [starts.pop(0) for _ in own], own[0]
        for time, row, col in mm_item.coord_K3.tolist():
            begin, inner = (begins[time], 0) if times == 1 else (begins[0], time)
            alive.add(begin + (inner * rows + row) * cols + col)
    assert not starts
    assert prompt.position_PT.T.tolist() == [list(truth[slot]) for slot in sorted(alive)]
    assert prompt.next_position_P.tolist() == [truth[-1][0] + 1] * 3
    text = [token for token in ids if token not in visual_ids]
    is_text = prompt.coord_T4[:, 0] < 0
    assert torch.equal(prompt.hidden_TD[is_text], vlm.family.embed(torch.tensor(text)))
    assert prompt.coord_T4[:, 0][~is_text].unique_consecutive().tolist() == [0, 1, 2]


# Batches and the cache


def mixed_requests(pre):
    sampling = SamplingParams(max_new_tokens=6)
    first, second = pre.images([picture(40, 66), picture(64, 30, 3)])
    contents = [(first, "What?"), ("A", second, "B", first, "C?"), (video(pre, 7, 24, 40), "See"), (first, second, "?")]
    return [Request(f"r{n}", parts, sampling) for n, parts in enumerate(contents)]


def test_a_merged_batch_equals_its_items_alone(vlm, pre):
    requests, which = mixed_requests(pre), plan(vlm, decoder=True)
    together = vlm.generate(requests, plan=which)
    for generation, request in zip(together, requests, strict=True):
        (alone,) = vlm.generate([request], plan=which)
        assert generation.error is None
        assert generation.token_ids == alone.token_ids
        assert generation.usage == alone.usage
        usage = generation.usage
        assert usage.num_decoder_tokens_kept < usage.num_vision_tokens_kept < usage.num_vision_tokens
    media = [mm_item for request in requests for mm_item in request.media]
    for joint, mm_item in zip(encode(vlm, media, which), media, strict=True):
        (alone,) = encode(vlm, [mm_item], which)
        assert_close(joint.feature_KD, alone.feature_KD)
        assert torch.equal(joint.placeholder_K, alone.placeholder_K)


@torch.inference_mode()
def test_cached_decoding_equals_a_prefill_of_the_longer_prompt(vlm, pre):
    which = plan(vlm, decoder=True)
    for request in mixed_requests(pre):
        (generation,) = vlm.generate([request], plan=which)
        prompt = prompt_of(vlm, request, which)
        for step, token in enumerate(generation.token_ids):
            logits = prefill(vlm, [prompt], which).logits_BV[0]
            assert int(logits.argmax()) == token, (request.request_id, step)
            prompt = longer(vlm, prompt, token)
