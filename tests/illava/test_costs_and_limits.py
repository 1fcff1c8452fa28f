"""What the first release promises, where no narrower test shows it: frozen merges, memory, loops, refusals."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig, MistralForCausalLM, Qwen2ForCausalLM

from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor, tokens
from illava.attention import packed as attention
from illava.decoder.decoder import Decoder
from illava.engine.prompt import pack
from illava.errors import ModelLoadError, RequestError, RequestTooLargeError
from illava.plan import EMPTY_PLAN
from illava.reducers import ILLaVA
from illava.reduction.decoder import DecoderReduction
from illava.reduction.vision import VisionReduction
from illava.tokens import Assignment
from illava.visual_tokens import TokenSpan
from tests.support.closeness import assert_close
from tests.support.decoder_cases import config, make_prompt, plan_of, run_prefill, video_spans

SCORES = ["paper", "released", "causal_normalised"]
VISION = {"stage": "vision_block", "layers": [2, 3, 4, 5], "reducer": {"kind": "illava", "num_merged": 6}}


class Operations(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that one returned."""

    def __init__(self):
        super().__init__()
        self.count, self.largest = 0, ("none", torch.Size())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.count += 1
        shapes = [value.shape for value in tree_leaves(made) if isinstance(value, torch.Tensor)]
        self.largest = max([self.largest, *((str(func), shape) for shape in shapes)], key=lambda own: own[1].numel())
        return made


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config()).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value.normal_(0.0, 1.6 / value.shape[1] ** 0.5)
    return Decoder(model.model, model.lm_head)


@pytest.fixture(scope="module")
def vlm(onevision_folder):
    return VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)


@pytest.fixture(scope="module")
def preprocessor(onevision_folder):
    return load_preprocessor(str(onevision_folder))


def noise(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)


class Noted(ILLaVA):
    """iLLaVA that writes down what it decided."""

    kind: str = "noted"
    decided: list = []

    def assign(self, tokens, evidence, stage):
        self.decided.append(super().assign(tokens, evidence, stage))
        return self.decided[-1]


class Frozen(ILLaVA):
    """Decides again what was decided, whatever the evidence says now."""

    kind: str = "frozen"
    decided: list = []

    def assign(self, tokens, evidence, stage):
        (assignment,) = self.decided
        assert assignment.num_tokens == tokens.hidden_TD.shape[0]
        return assignment


@pytest.mark.numeric
@pytest.mark.parametrize("score", SCORES)
def test_a_cached_decode_equals_a_recompute_with_the_merge_of_the_prefill_frozen(decoder, score):
    prompt = make_prompt(video_spans(), seed=1)
    noted = Noted(keep_ratio=0.5, score=score, decided=[])
    done, cache = run_prefill(decoder, [prompt], plan_of(("decoder_layer", (2,), noted)))
    frozen = plan_of(("decoder_layer", (2,), Frozen(keep_ratio=0.5, score=score, decided=noted.decided)))
    blocks = cache.batch([0], [[layer[0] for layer in done.lengths_LB]])
    longer, position = prompt, prompt.next_position_P[:, None]
    for step in range(3):
        new = torch.randn(1, 32, generator=torch.Generator().manual_seed(step))
        logits = decoder.decode(new, position + step, cache, blocks)
        longer = replace(
            longer,
            hidden_TD=torch.cat([longer.hidden_TD, new]),
            position_PT=torch.cat([longer.position_PT, position + step], 1),
            coord_T4=torch.cat([longer.coord_T4, torch.full((1, 4), -1)]),
            score_T=torch.cat([longer.score_T, torch.zeros(1)]),
            token_spans=(*longer.token_spans, TokenSpan(1)),
        )
        again, _ = run_prefill(decoder, [longer], frozen)
        assert again.lengths_LB[-1][0] == done.lengths_LB[-1][0] + step + 1
        assert_close(logits[0], again.logits_BV[0])


@pytest.mark.parametrize("score", SCORES)
def test_a_prefill_that_merges_makes_no_tensor_of_n_by_n(decoder, score):
    num_visual = 1200
    prompts = [
        make_prompt((TokenSpan(3), TokenSpan(num_visual, 0, 1, 0), TokenSpan(4))),
        make_prompt((TokenSpan(90, 0, 0, 0), TokenSpan(2)), seed=1),
    ]
    plan = plan_of(("decoder_layer", (2,), ILLaVA(keep_ratio=0.5, score=score)))
    with Operations() as seen:
        run_prefill(decoder, prompts, plan, block_size=64)
    assert num_visual < seen.largest[1].numel() < num_visual**2, seen.largest


@pytest.mark.numeric
@pytest.mark.parametrize("causal", [False, True])
def test_where_no_fused_kernel_shares_heads_they_are_repeated(causal, monkeypatch):
    """On CUDA in float32 SDPA would make an N x N map for grouped heads; its answer must not change."""
    assert not attention._shares_heads(torch.device("cuda"))
    q_THd, k_TGd, v_TGd = (torch.randn(9, heads, 8) for heads in (4, 2, 2))
    given = {"causal": causal, "scale": 0.3}
    shared = attention.packed_attention(q_THd, k_TGd, v_TGd, (4, 4, 1), **given)
    calls, stock = [], attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "_shares_heads", lambda device: False)
    monkeypatch.setattr(
        attention, "scaled_dot_product_attention", lambda *qkv, **o: calls.append((qkv, o)) or stock(*qkv, **o)
    )
    repeated = attention.packed_attention(q_THd, k_TGd, v_TGd, (4, 4, 1), **given)
    assert_close(repeated, shared)
    assert [(qkv[1].shape[1], options["enable_gqa"]) for qkv, options in calls] == [(4, False)] * 2


def _operations_of_a_block(lengths: tuple[int, ...]) -> int:
    total = sum(lengths)
    plan = ReductionPlan.model_validate({"steps": [{**VISION, "layers": [0]}]})
    reduction = VisionReduction(plan, lengths, torch.zeros(total, 3, dtype=torch.long), num_blocks=2)
    draw = torch.Generator().manual_seed(0)
    q_THd, k_THd = torch.randn(2, total, 2, 8, generator=draw)
    with Operations() as seen:
        reduction.at(0, torch.randn(total, 16, generator=draw), q_THd, k_THd, scale=0.3)
    return seen.count


def test_the_tower_reduces_all_images_and_tokens_in_the_same_number_of_operations():
    _operations_of_a_block((30, 30)), _operations_of_a_block((60,) * 9)  # fills the caches of host-made indices
    few, many = _operations_of_a_block((30, 30)), _operations_of_a_block((60,) * 9)
    assert 0 < few == many


@pytest.mark.parametrize("score", SCORES)
def test_the_decoder_reduces_all_images_and_tokens_in_the_same_number_of_operations(decoder, score, monkeypatch):
    monkeypatch.setattr("illava.decoder.decoder._CPU_ROWS", 1 << 20)  # by spans goes the MLP on CPU, not the reduction

    def operations(num_images: int, num_tokens: int) -> int:
        token_spans = [TokenSpan(num_tokens, n, n, -1) for n in range(num_images)]
        reducer = ILLaVA(keep_ratio=0.5, score=score, per="medium")
        prompt = make_prompt((TokenSpan(2), *token_spans, TokenSpan(3)))
        with Operations() as seen:
            run_prefill(decoder, [prompt], plan_of(("decoder_layer", (2,), reducer)), block_size=256)
        return seen.count

    operations(2, 10), operations(7, 16)
    assert 0 < operations(2, 10) == operations(7, 16)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("per", ["frame", "medium", "prompt"])
def test_reductions_of_fixed_counts_wait_for_no_device(score, per):
    """Scores, choice, mixing and bookkeeping on tensors without values: whatever would read one back fails."""
    token_spans = (TokenSpan(3), TokenSpan(8, 0, 1, 0), TokenSpan(6, 0, 1, 1), TokenSpan(1, 0, 1, -1), TokenSpan(4))
    plan = plan_of(
        ("vision_block", (0,), ILLaVA(keep_ratio=0.5)),
        ("decoder_input", (), ILLaVA(keep_per_frame=5)),
        ("decoder_layer", (2,), ILLaVA(keep_ratio=0.5, score=score, per=per)),
    )

    def reduce(hidden_TD, q_THd, k_THd, packed) -> tuple[torch.Size, torch.Size]:
        tower = VisionReduction(plan, (14, 8), torch.zeros(22, 3, dtype=torch.long), num_blocks=1)
        patches_KD = tower.at(0, hidden_TD, q_THd, k_THd, scale=0.3)
        decoder = DecoderReduction(plan, seeds=(1,), traced=(), scale=0.3)
        entering = decoder.apply(packed, "decoder_input")
        qk = (q_THd[: sum(entering.lengths)], k_THd[: sum(entering.lengths)])
        return patches_KD.shape, decoder.apply(entering, "decoder_layer", 2, qk=qk).hidden_TD.shape

    hidden_TD, (q_THd, k_THd) = torch.randn(22, 32), torch.randn(2, 22, 4, 8)
    packed = pack([make_prompt(token_spans)])
    expected = reduce(hidden_TD, q_THd, k_THd, packed)  # fills the caches of host-made indices
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        names = ("hidden_TD", "position_PT", "coord_T4", "span_T", "score_T")
        fake = replace(packed, **{name: mode.from_tensor(getattr(packed, name)) for name in names})
        assert reduce(*map(mode.from_tensor, (hidden_TD, q_THd, k_THd)), fake) == expected


def test_grouped_sums_ask_the_device_nothing(monkeypatch):
    """`segment_reduce` checks its lengths by reading them back, unless told not to."""
    told = []
    stock = torch.segment_reduce
    monkeypatch.setattr(tokens.torch, "segment_reduce", lambda *a, **k: told.append(k.get("unsafe")) or stock(*a, **k))
    assignment = tokens.cluster(torch.tensor([0, 0, 2, 2]), torch.ones(4), (4,), (2,))
    assert tokens.merged_sizes(assignment, torch.ones(4)).tolist() == [2, 2]
    assert told == [True, True]


def test_a_mixing_matrix_warns_of_nothing():
    assignment = Assignment(3, (2,), *map(torch.tensor, ([0, 2], [0, 1], [0.5, 0.5], [0], [2])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assignment.matrix().to_dense().tolist() == [[0.5, 0.5, 0], [0, 0, 1]]


def test_media_that_cannot_fit_are_refused_before_the_tower_runs(vlm, preprocessor, monkeypatch):
    video = preprocessor.video(noise(3, 30, 40))
    monkeypatch.setattr(vlm.family.decoder, "max_positions", 52)  # 3 x 16 + 1 places, 3 new tokens
    monkeypatch.setattr(vlm.family, "encode", lambda *_, **__: pytest.fail("the tower ran"))
    with pytest.raises(RequestTooLargeError, match=r"'long': 49 prompt tokens of its media and 4 new .* 52 positions"):
        vlm.submit(Request("long", (video, "?"), SamplingParams(max_new_tokens=4)))
    assert not vlm.has_work
    vlm.submit(Request("fits", (video, "?"), SamplingParams(max_new_tokens=3)))
    assert vlm.cancel_all() == ["fits"]
    released = ReductionPlan.model_validate({"layout": "released", "steps": [VISION]})
    vlm.submit(Request("closes gaps", (video, "?"), SamplingParams(max_new_tokens=4)), plan=released)
    assert vlm.cancel_all() == ["closes gaps"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("What?", "one string"), ((noise(4, 4), "What?"), "item 0 of its content is a ndarray"), (("a", None), "item 1")],
)
def test_content_that_is_no_text_and_no_prepared_medium_is_that_requests_error(vlm, content, message):
    good = Request("good", ("Hello",), SamplingParams(max_new_tokens=2))
    bad, fine = vlm.generate([Request("bad", content), good], plan=EMPTY_PLAN, errors="return")
    assert fine.error is None
    assert isinstance(bad.error, RequestError)
    assert message in str(bad.error)


@pytest.mark.parametrize(("window", "refused"), [(8, True), (None, False)])
def test_a_window_that_only_the_configuration_names_is_refused(window, refused):
    base = config().to_dict()
    shape = {name: base[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    small = MistralConfig(**shape, num_hidden_layers=1, num_key_value_heads=2, sliding_window=window)
    model = MistralForCausalLM(small)
    if not refused:
        Decoder(model.model, model.lm_head)
        return
    with pytest.raises(ModelLoadError, match="sliding"):
        Decoder(model.model, model.lm_head)


@pytest.mark.parametrize("pool_bytes", [0, 3 * 2 * 16 * 2 * 8 * 4])
def test_a_pool_that_holds_no_token_is_refused(onevision_folder, pool_bytes):
    with pytest.raises(ModelLoadError, match="raise kv_cache_bytes"):
        VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=pool_bytes)
