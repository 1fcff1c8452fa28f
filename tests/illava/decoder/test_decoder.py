"""The decoder's loop against the Hugging Face model whose layers it borrows, with and without reduction."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2ForCausalLM

from illava.decoder.decoder import Decoder
from illava.decoder.prefill import PrefillRun
from illava.engine.prompt import pack
from illava.errors import ModelLoadError, PlanError
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.reducers.base import Reducer
from illava.tokens import prune
from illava.visual_tokens import TokenSpan
from tests.support.closeness import assert_close
from tests.support.decoder_cases import TEXT, config, make_model, make_prompt, plan_of, run_prefill, video_spans

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model.model, model.lm_head)


@torch.inference_mode()
def stock_logits(model, hidden_TD, position_T):
    return model(inputs_embeds=hidden_TD[None], position_ids=position_T[None]).logits[0]


class KeepIndices(Reducer):
    """A test double that keeps given places of every scope."""

    kind: str = "keep_indices"
    indices: tuple[int, ...]
    stages = frozenset({"decoder_input", "decoder_layer"})

    def evidence(self, stage):
        return frozenset()

    def num_kept(self, num_tokens):
        return sum(n < num_tokens for n in self.indices)

    def assign(self, tokens, evidence, stage):
        kept, start, lengths = [], 0, []
        for n in tokens.lengths:
            own = [start + i for i in self.indices if i < n]
            kept, start = kept + own, start + n
            lengths.append(len(own))
        return prune(torch.tensor(kept), tuple(lengths), start)


def illava_plan(layer=2, **fields):
    fields = {"kind": "illava", "keep_ratio": 0.5, **fields}
    return ReductionPlan.model_validate({"steps": [{"stage": "decoder_layer", "layers": [layer], "reducer": fields}]})


@pytest.mark.parametrize("rows", [64, 5], ids=["MLP borrowed", "MLP in place"])
def test_empty_plan_equals_stock_transformers(model, decoder, rows, monkeypatch):
    monkeypatch.setattr("illava.decoder.decoder._CPU_ROWS", rows)
    prompts = [
        make_prompt(video_spans(), seed=1),
        make_prompt((TokenSpan(7),), seed=2),
        make_prompt(video_spans(5), seed=3),
    ]
    done, _ = run_prefill(decoder, prompts)
    for row, prompt in enumerate(prompts):
        stock = stock_logits(model, prompt.hidden_TD, prompt.position_PT[0])[-1]
        assert_close(done.logits_BV[row], stock)
    assert done.lengths_LB == [tuple(p.num_tokens for p in prompts)] * 4


def test_positions_are_the_prompts_own(model, decoder):
    prompt = make_prompt(video_spans())
    prompt = replace(prompt, position_PT=prompt.position_PT * 3 + 2)
    done, _ = run_prefill(decoder, [prompt])
    stock = stock_logits(model, prompt.hidden_TD, prompt.position_PT[0])[-1]
    assert_close(done.logits_BV[0], stock)


def test_dropping_at_the_input_is_a_shorter_prompt_with_the_same_positions(model, decoder):
    prompt = make_prompt(video_spans())
    plan = plan_of(("decoder_input", (), KeepIndices(indices=(0, 2, 5, 6, 11), per="prompt")))
    done, _ = run_prefill(decoder, [prompt], plan)
    kept = torch.tensor([0, 1, 2, 3 + 0, 3 + 2, 3 + 5, 3 + 6, 3 + 11, 16, 17, 18, 19, 20])
    stock = stock_logits(model, prompt.hidden_TD[kept], prompt.position_PT[0, kept])[-1]
    assert_close(done.logits_BV[0], stock)
    assert done.lengths_LB == [(13,)] * 4
    assert done.num_visual_LB == [(5,)] * 4


@torch.inference_mode()
def split_forward(model, prompt, kept, layer):
    """Stock layers below ``layer`` on all tokens, stock layers from it on over ``kept`` with their old positions."""
    hidden, position = prompt.hidden_TD[None], prompt.position_PT
    for n, block in enumerate(model.model.layers):
        if n == layer:
            hidden, position = hidden[:, kept], position[:, kept]
        rotary = model.model.rotary_emb(hidden, position)
        hidden = block(hidden, attention_mask=None, position_embeddings=rotary)
    return model.lm_head(model.model.norm(hidden))[0, -1]


def test_dropping_before_a_layer_equals_stock_layers_over_what_is_left(model, decoder):
    prompt = make_prompt(video_spans())
    plan = plan_of(("decoder_layer", (2,), KeepIndices(indices=(1, 3), per="frame")))
    done, _ = run_prefill(decoder, [prompt], plan)
    kept = torch.tensor([0, 1, 2, 4, 6, 8, 10, 12, 14, 15, 16, 17, 18, 19, 20])
    assert_close(done.logits_BV[0], split_forward(model, prompt, kept, 2))
    assert done.lengths_LB == [(21,), (21,), (15,), (15,)]
    assert done.num_visual_LB == [(13,), (13,), (7,), (7,)]


def formula_scores(attention_HTT, scope, score):
    """The printed formulas, token by token, from a whole attention map."""
    mean_TT, values = attention_HTT.mean(0), []
    for j in scope:
        if score == "released":
            values.append(mean_TT[-1, j])
            continue
        total = sum(mean_TT[i, j] for i in scope)
        bias = sum(1 / (i + 1) for i in scope if i >= j)
        values.append(total / len(scope) if score == "paper" else total / bias)
    return torch.stack(values)


@torch.inference_mode()
def merged_by_formula(model, prompt, *, layer, scope, num_merged, score):
    """Stock layers; before ``layer`` the least attended tokens of ``scope`` become one weighted mean."""
    hidden, position, attention = prompt.hidden_TD[None], prompt.position_PT, None
    for n, block in enumerate(model.model.layers):
        rotary = model.model.rotary_emb(hidden, position)
        if n == layer:
            order = [scope[i] for i in formula_scores(attention[0], scope, score).argsort().tolist()]
            least = order[: num_merged + 1]
            weights = torch.arange(num_merged + 1, 0, -1.0)
            hidden[0, least[-1]] = (weights[:, None] * hidden[0, least]).sum(0) / weights.sum()
            kept = [t for t in range(hidden.shape[1]) if t not in least[:-1]]
            hidden, position = hidden[:, kept], position[:, kept]
            rotary = model.model.rotary_emb(hidden, position)
        size = hidden.shape[1]
        mask = torch.full((size, size), float("-inf")).triu(1)[None, None]
        _, attention = block.self_attn(block.input_layernorm(hidden), rotary, mask)
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(model.model.norm(hidden))[0, -1]


@pytest.mark.parametrize("score", ["paper", "released", "causal_normalised"])
def test_merging_before_a_layer_equals_the_formula_over_stock_attention(model, decoder, score, monkeypatch):
    prompt = make_prompt(video_spans(), seed=8)
    done, _ = run_prefill(decoder, [prompt], illava_plan(num_merged=5, keep_ratio=None, score=score, per="medium"))
    monkeypatch.setattr(model.config, "_attn_implementation", "eager")
    expected = merged_by_formula(model, prompt, layer=2, scope=list(range(3, 16)), num_merged=5, score=score)
    assert_close(done.logits_BV[0], expected)


@pytest.mark.parametrize("per", ["frame", "span", "medium", "prompt"])
@pytest.mark.parametrize("score", ["paper", "released", "causal_normalised"])
def test_every_row_of_a_batch_equals_the_row_alone(decoder, per, score):
    two_media = (TEXT, TokenSpan(6, 0, 1, 0), TokenSpan(2), TokenSpan(5, 1, 3, 0), TokenSpan(3, 1, 3, 1), TokenSpan(4))
    prompts = [
        make_prompt(video_spans(4, 6), seed=1),
        make_prompt((TokenSpan(6),), seed=2),
        make_prompt(two_media, seed=3),
    ]
    plan = illava_plan(per=per, score=score)
    together, _ = run_prefill(decoder, prompts, plan)
    assert not together.errors
    for row, prompt in enumerate(prompts):
        alone, _ = run_prefill(decoder, [prompt], plan)
        assert_close(together.logits_BV[row], alone.logits_BV[0])
        assert [n[row] for n in together.lengths_LB] == [n[0] for n in alone.lengths_LB]


def test_a_medium_is_ranked_as_one_whatever_text_stands_inside(decoder):
    split = (TEXT, TokenSpan(6, 0, 1, 0), TokenSpan(2), TokenSpan(6, 0, 2, 1), TokenSpan(4))
    done, _ = run_prefill(decoder, [make_prompt(split)], illava_plan(num_merged=8, keep_ratio=None))
    assert done.num_visual_LB[-1] == (4,)
    by_span, _ = run_prefill(decoder, [make_prompt(split)], illava_plan(num_merged=8, keep_ratio=None, per="span"))
    assert by_span.num_visual_LB[-1] == (2,)


def test_a_finer_scope_after_a_coarser_one_counts_what_is_left(decoder):
    drop = KeepIndices(indices=(0, 1, 2, 3, 4, 8), per="prompt")
    plan = plan_of(("decoder_layer", (1,), drop), ("decoder_layer", (2,), KeepIndices(indices=(0, 2), per="frame")))
    done, _ = run_prefill(decoder, [make_prompt(video_spans())], plan, traced=(0,))
    # frames keep 4, 1, 1 of their tokens, the newline goes; then places 0 and 2 of each frame
    assert [n[0] for n in done.num_visual_LB] == [13, 6, 4, 4]
    assert done.traces[0][-1].coords[:, [1, 3]].tolist() == [[0, 0], [0, 2], [1, 0], [2, 0]]


def test_the_input_stage_ranks_by_the_towers_score(decoder):
    prompt = make_prompt(video_spans(), seed=6)
    step = {"stage": "decoder_input", "reducer": {"kind": "illava", "keep_per_frame": 2}}
    done, _ = run_prefill(decoder, [prompt], ReductionPlan.model_validate({"steps": [step]}), traced=(0,))
    score = prompt.score_T[3:16]
    ranked = [[4 * f + i for i in score[4 * f : 4 * f + 4].argsort().tolist()] for f in range(3)]
    # of four: the three least become one at the place of the third, the best stays
    expected = [*sorted(i for order in ranked for i in order[2:]), 12]
    assert done.traces[0][0].coords.tolist() == prompt.coord_T4[3:16][expected].tolist()
    assert done.num_visual_LB == [(7,)] * 4


class Witness(KeepIndices):
    """Keeps what it was shown."""

    kind: str = "witness"

    def evidence(self, stage):
        return frozenset({"seed", "keys"} if stage == "decoder_layer" else {"seed"})

    def assign(self, tokens, evidence, stage):
        self.indices_seen.append((tokens, evidence))
        return super().assign(tokens, evidence, stage)

    indices_seen: list = []


def test_a_reducer_sees_its_scopes_tokens_with_place_keys_and_seed(decoder):
    prompts = [make_prompt(video_spans(2), seed=1), make_prompt(video_spans(1), seed=2)]
    witness = Witness(indices=(0,), per="frame", indices_seen=[])
    run_prefill(decoder, prompts, plan_of(("decoder_layer", (1, 3), witness)))
    (tokens, evidence), (later, later_evidence) = witness.indices_seen
    assert tokens.lengths == (4, 4, 4)
    assert later.lengths == (1, 1, 1)
    place = torch.cat([prompts[0].coord_T4[3:11], prompts[1].coord_T4[3:7]])
    assert tokens.coord_T3.tolist() == place[:, 1:].tolist()
    assert tuple(evidence.keys_THd.shape) == (12, 2, 8)
    assert evidence.attention_received_T is None
    assert len({*evidence.seeds, *later_evidence.seeds}) == 4
    assert evidence.seeds[2] == evidence.seeds[0]  # both requests were given the same root


def test_a_cached_decode_equals_a_recompute_with_the_assignment_frozen(model, decoder):
    prompts = [make_prompt(video_spans(), seed=1), make_prompt(video_spans(6), seed=2)]
    first = plan_of(("decoder_layer", (2,), KeepIndices(indices=(0, 3, 4, 9), per="medium")))
    done, cache = run_prefill(decoder, prompts, first)
    lengths = [[layer[row] for layer in done.lengths_LB] for row in range(2)]
    blocks = cache.batch([0, 1], lengths)
    position = torch.stack([p.next_position_P for p in prompts], 1)
    generator = torch.Generator().manual_seed(5)
    grown = list(prompts)
    for step in range(3):
        new = torch.randn(2, 32, generator=generator)
        logits = decoder.decode(new, position + step, cache, blocks)
        for row, prompt in enumerate(grown):
            grown[row] = longer = replace(
                prompt,
                hidden_TD=torch.cat([prompt.hidden_TD, new[row : row + 1]]),
                position_PT=torch.cat([prompt.position_PT, position[:, row : row + 1] + step], 1),
                coord_T4=torch.cat([prompt.coord_T4, torch.full((1, 4), -1)]),
                score_T=torch.cat([prompt.score_T, torch.zeros(1)]),
                token_spans=(*prompt.token_spans, TokenSpan(1)),
            )
            again, _ = run_prefill(decoder, [longer], first)
            assert_close(logits[row], again.logits_BV[0])


def test_a_step_that_removes_nothing_is_that_requests_error(decoder):
    short, long = (TEXT, TokenSpan(2, 0, 1, 0), TokenSpan(2)), (TEXT, TokenSpan(9, 0, 1, 0), TokenSpan(2))
    prompts = [make_prompt(short), make_prompt(long), make_prompt((TokenSpan(4),))]
    done, _ = run_prefill(decoder, prompts, illava_plan(keep_ratio=None, keep_per_frame=4))
    assert list(done.errors) == [0]
    assert "removed none of 2 visual tokens" in str(done.errors[0])
    assert done.num_visual_LB[-1] == (2, 4, 0)


def test_a_trace_is_the_matrix_that_was_applied(decoder):
    prompts = [make_prompt((TokenSpan(4),)), make_prompt(video_spans(), seed=4)]
    done, _ = run_prefill(decoder, prompts, illava_plan(layer=1, num_merged=6, keep_ratio=None), traced=(1,))
    (step,) = done.traces[1]
    assert (step.stage, step.layer) == ("decoder_layer", 1)
    assert tuple(step.matrix.shape) == (7, 13)
    dense = step.matrix.to_dense()
    assert_close(dense.sum(1), torch.ones(7))
    assert ((dense > 0).sum(1) == 7).sum() == 1  # r + 1 sources in one mixture, copies elsewhere
    assert list(done.traces) == [1]


def test_plans_and_models_that_cannot_run_are_refused(decoder):
    with pytest.raises(PlanError, match="the last is 3"):
        decoder.check(illava_plan(layer=4))
    sliding = Qwen2ForCausalLM(config(use_sliding_window=True, sliding_window=8, max_window_layers=1))
    with pytest.raises(ModelLoadError, match="sliding"):
        Decoder(sliding.model, sliding.lm_head)


def run_in_chunks(decoder, prompts, plan, max_tokens, *, num_computed=(), cache=None):
    if cache is None:
        _, cache = run_prefill(decoder, prompts)  # for its blocks; what they hold is overwritten
    blocks = cache.batch(range(len(prompts)), [[0] * decoder.num_layers] * len(prompts))
    if not num_computed:
        cache.k_pool_PSGd.fill_(float("nan"))
        cache.v_pool_PSGd.fill_(float("nan"))
    run = PrefillRun(decoder, pack(prompts), plan, cache, blocks, seeds=[7] * len(prompts), num_computed=num_computed)
    calls = 1
    while (done := run.advance(max_tokens)) is None:
        calls += 1
    return done, cache, calls


@pytest.mark.parametrize("max_tokens", [1, 4, 9, 30])
@pytest.mark.parametrize("which", ["empty", "paper", "released", "two cuts"])
def test_a_prefill_in_chunks_equals_one_in_one_piece(decoder, which, max_tokens):
    two_cuts = plan_of(
        ("decoder_input", (), KeepIndices(indices=(0, 1, 3), per="frame")),
        ("decoder_layer", (1, 3), KeepIndices(indices=(0, 2, 4), per="medium")),
    )
    plans = {"empty": EMPTY_PLAN, "two cuts": two_cuts}
    plan = plans.get(which) or illava_plan(score=which)
    prompts = [
        make_prompt(video_spans(), seed=1),
        make_prompt((TokenSpan(7),), seed=2),
        make_prompt(video_spans(5), seed=3),
    ]
    whole, whole_cache = run_prefill(decoder, prompts, plan)
    done, cache, calls = run_in_chunks(decoder, prompts, plan, max_tokens)
    assert calls > 1
    assert_close(done.logits_BV, whole.logits_BV)
    assert done.lengths_LB == whole.lengths_LB
    assert done.num_visual_LB == whole.num_visual_LB
    num_computed = [[layer[row] for layer in done.lengths_LB] for row in range(3)]
    position = torch.stack([p.next_position_P for p in prompts], 1)
    after = [
        decoder.decode(torch.ones(3, 32), position, which_cache, which_cache.batch(range(3), num_computed))
        for which_cache in (whole_cache, cache)
    ]
    assert_close(after[1], after[0])


def test_a_chunk_costs_no_more_than_its_budget(decoder, monkeypatch):
    seen, stock = [], decoder.project
    monkeypatch.setattr(
        decoder, "project", lambda layer, x, *rest, **into: seen.append(len(x)) or stock(layer, x, *rest, **into)
    )
    prompts = [make_prompt(video_spans(4, 6), seed=1), make_prompt(video_spans(), seed=2)]
    _, cache = run_prefill(decoder, prompts)
    blocks = cache.batch(range(2), [[0] * 4] * 2)
    run, done = PrefillRun(decoder, pack(prompts), illava_plan(layer=1), cache, blocks, seeds=[7, 7]), None
    while done is None:
        seen.clear()
        done = run.advance(5)
        assert sum(seen) <= 5 * decoder.num_layers


@pytest.mark.parametrize("max_tokens", [None, 3])
@pytest.mark.parametrize("which", ["empty", "paper"])
def test_keys_that_are_held_already_are_not_computed_again(decoder, which, max_tokens, monkeypatch):
    """With a step in the decoder, too, that has ranked all visual tokens before: each layer holds its own number."""
    plan = EMPTY_PLAN if which == "empty" else illava_plan(score=which)
    prompts = [make_prompt(video_spans(), seed=1), make_prompt(video_spans(5), seed=3)]
    whole, cache = run_prefill(decoder, prompts, plan)
    num_own = [1, 2] if plan.steps else [20, 2]  # of the last tokens; the first prompt's would be visual
    num_computed = [[layer[row] - n for layer in whole.lengths_LB] for row, n in enumerate(num_own)]
    behind = [p.after(p.num_tokens - n) for p, n in zip(prompts, num_own, strict=True)]
    seen, stock = [], decoder.project
    monkeypatch.setattr(
        decoder, "project", lambda layer, x, *rest, **into: seen.append(len(x)) or stock(layer, x, *rest, **into)
    )
    done, _, _ = run_in_chunks(decoder, behind, plan, max_tokens, num_computed=num_computed, cache=cache)
    assert_close(done.logits_BV, whole.logits_BV)
    assert sum(seen) == sum(num_own) * decoder.num_layers
    assert done.lengths_LB == [tuple(num_own)] * decoder.num_layers
    assert not done.errors
