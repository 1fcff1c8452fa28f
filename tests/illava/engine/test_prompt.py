"""Assembling a prompt: slots that exist, positions they keep, runs, packing and joined traces."""

from types import SimpleNamespace

import pytest
import torch

from illava import Request, SamplingParams
from illava.engine.prompt import assemble, join_trace, pack
from illava.errors import RequestTooLargeError
from illava.families.chat_prompt import RenderedPrompt
from illava.requests import TraceStep
from illava.visual_tokens import EncodedVisual, TokenSpan

WIDTH = 4


class SpyFamily:
    """Renders fixed ids; embeds a token as its id."""

    def __init__(self, token_ids, spans, max_positions=100):
        self.rendered = RenderedPrompt(tuple(token_ids), tuple(spans))
        self.decoder = SimpleNamespace(max_positions=max_positions, device=torch.device("cpu"), dtype=torch.float32)

    def render(self, content, num_placeholders, *, history=(), template_args=None):
        return self.rendered

    def position_ids(self, prompt, media):
        return torch.arange(len(prompt.token_ids))[None] * 10

    def embed(self, token_ids):
        return token_ids[:, None].expand(-1, WIDTH).float()


def encoded_of(tag, slots, num_placeholders, frame_counts, *, score=False, trace=()):
    count = len(slots)
    place = torch.tensor([[0, 0, n] for n in range(count)])
    patches = torch.cat([torch.zeros(count + 1, 1), torch.arange(count + 1)[:, None].expand(-1, 3)], 1).long()
    return EncodedVisual(
        torch.full((count, WIDTH), float(tag)), torch.tensor(slots), num_placeholders, frame_counts, place,
        torch.arange(count) / 10 if score else None, count + 1, count, tuple(trace), patches,
    )  # fmt: skip


def assembled(family, encoded, max_new_tokens=5):
    request = Request("r", ("text", *encoded), SamplingParams(max_new_tokens=max_new_tokens))
    return assemble(family, request, encoded)


def test_only_filled_slots_exist_and_leave_gaps_in_the_positions():
    family = SpyFamily([1, 9, 9, 9, 9, 2, 3], [(1, 4)])
    prompt = assembled(family, [encoded_of(70, [0, 3], 4, ((0, 1), (-1, 1)))])
    assert prompt.hidden_TD[:, 0].tolist() == [1, 70, 70, 2, 3]
    assert prompt.position_PT.tolist() == [[0, 10, 40, 50, 60]]
    assert prompt.next_position_P.tolist() == [61]
    assert prompt.token_spans == (TokenSpan(1), TokenSpan(1, 0, 1, 0), TokenSpan(1, 0, 1, -1), TokenSpan(2))
    assert prompt.coord_T4[:, 0].tolist() == [-1, 0, 0, -1, -1]
    assert prompt.score_T is None


def test_media_stand_where_the_template_puts_them():
    family = SpyFamily([8, 8, 9, 9, 5, 9, 6], [(5, 1), (0, 2), (2, 2)])
    encoded = [
        encoded_of(70, [0], 1, ((0, 1),)),
        encoded_of(71, [0, 1], 2, ((0, 2),)),
        encoded_of(72, [1], 2, ((0, 0), (1, 1))),
    ]
    prompt = assembled(family, encoded)
    assert prompt.hidden_TD[:, 0].tolist() == [71, 71, 72, 5, 70, 6]
    # two media without text between are one span; empty frames make no span
    assert prompt.token_spans == (
        TokenSpan(2, 1, 0, 0),
        TokenSpan(1, 2, 0, 1),
        TokenSpan(1),
        TokenSpan(1, 0, 1, 0),
        TokenSpan(1),
    )
    assert prompt.coord_T4[:, 0].tolist() == [1, 1, 2, -1, 0, -1]
    assert prompt.media_order == (1, 2, 0)


def test_scores_follow_their_tokens():
    family = SpyFamily([1, 9, 9, 2], [(1, 2)])
    prompt = assembled(family, [encoded_of(70, [0, 1], 2, ((0, 2),), score=True)])
    assert prompt.score_T.tolist() == pytest.approx([0, 0, 0.1, 0])


def test_a_prompt_longer_than_the_model_is_refused():
    family = SpyFamily(range(8), [], max_positions=12)
    assert assembled(family, [], max_new_tokens=4).num_tokens == 8
    with pytest.raises(RequestTooLargeError, match="8 prompt tokens and 5 new tokens exceed the model's 12 positions"):
        assembled(family, [], max_new_tokens=5)


def test_packing_labels_every_token_with_its_run():
    family = SpyFamily([1, 9, 9, 2], [(1, 2)])
    prompt = assembled(family, [encoded_of(70, [0, 1], 2, ((0, 1), (1, 1)))])
    packed = pack([prompt, prompt])
    assert packed.span_T.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert packed.lengths == (4, 4)
    assert packed.counts.num_visual == (2, 2)


def step(stage, rows, columns):
    matrix = torch.zeros(rows, columns)
    matrix[torch.arange(rows), torch.arange(rows)] = 1.0
    return TraceStep(stage, None, matrix.to_sparse_coo().coalesce(), torch.arange(rows)[:, None].repeat(1, 4) * 0)


def test_traces_of_media_are_joined_in_prompt_order_and_absent_steps_change_nothing():
    family = SpyFamily([9, 9, 9, 5], [(2, 1), (0, 2)])
    first = encoded_of(70, [0], 1, ((0, 1),), trace=[step("layout", 1, 2)])
    second = encoded_of(71, [0, 1], 2, ((0, 2),), trace=[step("vision_output", 2, 3), step("layout", 2, 2)])
    encoded = [first, second]
    trace = join_trace(encoded, assembled(family, encoded), [step("decoder_layer", 1, 3)])
    assert trace.patch_coords[:, 0].tolist() == [1, 1, 1, 0, 0]
    shapes = [(s.stage, tuple(s.matrix.shape)) for s in trace.steps]
    # the medium without the tower step passes through it
    assert shapes == [("vision_output", (4, 5)), ("layout", (3, 4)), ("decoder_layer", (1, 3))]
    assert trace.matrix(2).to_dense().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
