"""Log-size bias in the language model, against stock transformers with the same numbers added by its mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from illava.decoder.decoder import Decoder
from illava.decoder.kv_cache import PagedCache
from illava.decoder.prefill import PrefillRun
from illava.engine.prompt import pack
from illava.plan import ReductionPlan
from illava.reducers import ILLaVA, ToMe
from illava.reduction.scopes import PackedPrompts
from illava.tokens import cluster
from tests.support.closeness import assert_close
from tests.support.decoder_cases import TEXT, make_model, make_prompt, plan_of, run_prefill, video_spans

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def decoder(model):
    return Decoder(model.model, model.lm_head)


def sized(prompt, seed=0):
    """The prompt with sizes of 1 to 9 on its visual tokens."""
    size_T = torch.randint(1, 10, (prompt.num_tokens,), generator=torch.Generator().manual_seed(seed)).float()
    return replace(prompt, size_T=torch.where(prompt.coord_T4[:, 0] >= 0, size_T, 1.0))


def biased(plan):
    return plan.model_copy(update={"size_bias": True})


def added(size_T):
    """What stock attention adds to its scores: the causal mask, and the log size of each key."""
    hidden_TT = torch.ones(len(size_T), len(size_T), dtype=torch.bool).triu(1)
    return size_T.log().expand(len(size_T), -1).masked_fill(hidden_TT, torch.finfo(torch.float32).min)[None, None]


@torch.inference_mode()
def stock_logits(model, prompt, size_T):
    position, mask = prompt.position_PT, added(size_T)
    return model(inputs_embeds=prompt.hidden_TD[None], position_ids=position, attention_mask=mask).logits[0, -1]


def longer(prompt, new_1D):
    grown = prompt.hidden_TD.shape[0]
    return replace(
        prompt,
        hidden_TD=torch.cat([prompt.hidden_TD, new_1D]),
        position_PT=torch.cat([prompt.position_PT, torch.tensor([[grown]])], 1),
        size_T=None if prompt.size_T is None else torch.cat([prompt.size_T, torch.ones(1)]),
    )


def sizes_of(prompt):
    return torch.ones(prompt.num_tokens) if prompt.size_T is None else prompt.size_T


def test_prefill_and_decode_equal_stock_attention_with_the_bias_in_its_mask(model, decoder):
    """Three requests of one batch; the second has no sizes, and its keys no bias."""
    prompts = [
        sized(make_prompt(video_spans(), seed=1)),
        make_prompt((*video_spans(1), TEXT), seed=2),
        sized(make_prompt(video_spans(5), seed=3), seed=4),
    ]
    assert (
        stock_logits(model, prompts[0], torch.ones(21)) - stock_logits(model, prompts[0], prompts[0].size_T)
    ).abs().max() > 0.05
    done, cache = run_prefill(decoder, prompts, biased(plan_of()))
    for row, prompt in enumerate(prompts):
        assert_close(done.logits_BV[row], stock_logits(model, prompt, sizes_of(prompt)))
    lengths = [[prompt.num_tokens] * 4 for prompt in prompts]
    num_biased = [[0 if prompt.size_T is None else prompt.num_tokens] * 4 for prompt in prompts]
    blocks = cache.batch(range(3), lengths, num_biased)
    for step in range(3):
        new = torch.randn(3, 32, generator=torch.Generator().manual_seed(step))
        position = torch.tensor([[prompt.num_tokens for prompt in prompts]])
        logits = decoder.decode(new, position, cache, blocks)
        prompts = [longer(prompt, new[row : row + 1]) for row, prompt in enumerate(prompts)]
        for row, prompt in enumerate(prompts):
            assert_close(logits[row], stock_logits(model, prompt, sizes_of(prompt)))


@pytest.mark.parametrize("max_tokens", [1, 4, 7])
def test_chunks_equal_the_whole(decoder, max_tokens):
    prompts = [sized(make_prompt(video_spans(), seed=1)), sized(make_prompt(video_spans(2), seed=5), seed=6)]
    merging = plan_of(("decoder_layer", (2,), ILLaVA(keep_ratio=0.5, score="causal_normalised")))
    for plan in (biased(plan_of()), biased(merging)):
        whole, _ = run_prefill(decoder, prompts, plan)
        cache = empty_cache(decoder)
        for row, prompt in enumerate(prompts):
            cache.admit(row, [prompt.num_tokens + 8] * 4)
        blocks = cache.batch(range(2), [[0] * 4] * 2)
        run, done, calls = PrefillRun(decoder, pack(prompts), plan, cache, blocks, seeds=[7, 7]), None, 0
        while done is None:
            done, calls = run.advance(max_tokens), calls + 1
        assert calls > 2
        assert_close(done.logits_BV, whole.logits_BV)


def empty_cache(decoder):
    return PagedCache(
        num_layers=4, num_kv_heads=2, head_dim=decoder.head_dim, num_blocks=400, block_size=4, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip


def test_a_shared_prefix_shares_its_biases(decoder):
    """Whole blocks are shared, and a partly filled one is copied with its biases: 4 tokens a block, 18 in common."""
    prompt = sized(make_prompt(video_spans(), seed=1))
    alone, cache = run_prefill(decoder, [prompt], biased(plan_of()))
    cache.admit("second", [prompt.num_tokens + 8] * 4, prefix_from=0, prefix_lengths=[18] * 4)
    rest = prompt.after(18)
    blocks = cache.batch(["second"], [[0] * 4])
    done = PrefillRun(
        decoder, pack([rest]), biased(plan_of()), cache, blocks, seeds=[7], num_computed=[[18] * 4]
    ).advance()
    assert_close(done.logits_BV, alone.logits_BV)


def slow_merge(prompt, hidden, pairs, layer_size):
    """Each pair becomes its size-weighted mean, at the first one's place: hidden, kept indices, sizes."""
    gone = {b for _, b in pairs}
    kept = [n for n in range(prompt.num_tokens) if n not in gone]
    hidden, size = hidden.clone(), layer_size.clone()
    for a, b in pairs:
        hidden[a] = (size[a] * hidden[a] + size[b] * hidden[b]) / (size[a] + size[b])
        size[a] = size[a] + size[b]
    return hidden[kept], kept, size[kept]


class Pairs(ToMe):
    """Merges given pairs of a scope's tokens by size."""

    kind: str = "pairs"
    pairs: tuple[tuple[int, int], ...]
    stages = frozenset({"decoder_input", "decoder_layer"})

    def evidence(self, stage):
        return frozenset({"sizes"})

    def num_kept(self, num_tokens):
        return num_tokens - len(self.pairs)

    def assign(self, tokens, evidence, stage):
        into = torch.arange(sum(tokens.lengths))
        for a, b in self.pairs:
            into[b] = a
        return cluster(into, evidence.sizes(tokens), tokens.lengths, (sum(tokens.lengths) - len(self.pairs),))


@torch.inference_mode()
def test_a_merge_before_a_layer_adds_up_sizes_for_the_layers_behind_it(model, decoder):
    prompt = sized(make_prompt(video_spans(), seed=1))
    pairs = ((0, 1), (2, 7), (5, 6))
    plan = plan_of(("decoder_layer", (2,), Pairs(num_merged=3, pairs=pairs, per="prompt")))
    done, _ = run_prefill(decoder, [prompt], biased(plan))
    hidden, size, position = prompt.hidden_TD, prompt.size_T, prompt.position_PT
    for n, block in enumerate(model.model.layers):
        if n == 2:
            hidden, kept, size = slow_merge(prompt, hidden, [(a + 3, b + 3) for a, b in pairs], size)
            position = position[:, kept]
        rotary = model.model.rotary_emb(hidden[None], position)
        hidden = block(hidden[None], attention_mask=added(size), position_embeddings=rotary)[0]
    assert size.sum() == prompt.size_T.sum()
    assert_close(done.logits_BV[0], model.lm_head(model.model.norm(hidden))[-1])


@pytest.mark.parametrize("score", ["paper", "causal_normalised", "released"])
def test_the_scores_before_a_layer_are_of_the_biased_attention(decoder, score):
    """The same decision as over every token repeated as often as its size says."""
    prompt = sized(make_prompt(video_spans(), seed=1))
    seen = []

    class Noted(ILLaVA):
        kind: str = "noted"

        def assign(self, tokens, evidence, stage):
            (measured,) = (value for value in vars_of(evidence) if value is not None)
            seen.append(measured)
            return super().assign(tokens, evidence, stage)

    plan = plan_of(("decoder_layer", (1,), Noted(keep_ratio=0.5, score=score, per="prompt")))
    run_prefill(decoder, [prompt], biased(plan))
    run_prefill(decoder, [prompt], plan)
    layer = decoder.layers[0]
    q, k, *_ = decoder.project(layer, prompt.hidden_TD, decoder.rotary_at(prompt.hidden_TD, prompt.position_PT))
    logits = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1)) * decoder.scale + added(prompt.size_T)[0]
    attention = logits.softmax(-1).mean(0)
    if score == "released":
        assert_close(seen[0], attention[-1, 3:16])
    elif score == "paper":
        assert_close(seen[0], attention[3:16, 3:16].mean(0))
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def vars_of(evidence):
    return (getattr(evidence, name) for name in type(evidence).__slots__)


def test_a_plan_without_the_bias_reads_no_sizes(decoder):
    """Bit for bit, and without a pool of biases, also where a reducer counts sizes."""
    prompt = make_prompt(video_spans(), seed=1)
    for plan in (plan_of(), plan_of(("decoder_layer", (2,), ToMe(keep_ratio=0.5)))):
        plain, cache = run_prefill(decoder, [prompt], plan)
        with_sizes, _ = run_prefill(decoder, [sized(prompt)], plan)
        assert cache.bias_pool_PS is None
        if not plan.steps:
            assert torch.equal(plain.logits_BV, with_sizes.logits_BV)


def test_sizes_of_one_are_no_bias(decoder):
    prompt = make_prompt(video_spans(), seed=1)
    plain, _ = run_prefill(decoder, [prompt])
    ones, _ = run_prefill(decoder, [replace(prompt, size_T=torch.ones(21))], biased(plan_of()))
    assert_close(ones.logits_BV, plain.logits_BV)


def test_only_merged_tokens_are_sized():
    assert PackedPrompts.__dataclass_fields__["size_T"].default is None
    with pytest.raises(ValueError, match="merges nothing: leave it out"):
        ReductionPlan(size_bias=True)
