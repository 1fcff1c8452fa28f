"""What the first release promises, where no narrower test shows it: frozen merges, memory, loops, counts, refusals."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_decoder import config, make_prompt, plan_of, run_prefill, video_runs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MistralConfig, MistralForCausalLM, Qwen2ForCausalLM

from illava import VLM, ReductionPlan, Request, SamplingParams, attention, load_preprocessor, tokens
from illava.decoder import Decoder
from illava.errors import ModelLoadError, RequestError
from illava.families.base import Run
from illava.plan import EMPTY_PLAN
from illava.reducers import ILLaVA
from illava.tokens import Assignment
from illava.vision import VisionReduction

SCORES = ["paper", "released", "causal_normalised"]
VISION = {"stage": "vision_block", "layers": [2, 3, 4, 5], "reducer": {"kind": "illava", "num_merged": 6}}
FRAMES = {"stage": "decoder_input", "reducer": {"kind": "illava", "keep_per_frame": 10}}
LAYER = {"stage": "decoder_layer", "layers": [2], "reducer": {"kind": "illava", "keep_ratio": 0.5, "per": "prompt"}}


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


@pytest.mark.parametrize("score", SCORES)
def test_a_cached_decode_equals_a_recompute_with_the_merge_of_the_prefill_frozen(decoder, score):
    prompt = make_prompt(video_runs(), seed=1)
    noted = Noted(keep_ratio=0.5, score=score, decided=[])
    done, cache = run_prefill(decoder, [prompt], plan_of(("decoder_layer", (2,), noted)))
    frozen = plan_of(("decoder_layer", (2,), Frozen(keep_ratio=0.5, score=score, decided=noted.decided)))
    pages = cache.batch([0], [[layer[0] for layer in done.lengths_LB]])
    longer, position = prompt, prompt.next_position_P[:, None]
    for step in range(3):
        new = torch.randn(1, 32, generator=torch.Generator().manual_seed(step))
        logits = decoder.decode(new, position + step, cache, pages)
        longer = replace(
            longer,
            hidden_TD=torch.cat([longer.hidden_TD, new]),
            position_PT=torch.cat([longer.position_PT, position + step], 1),
            place_T4=torch.cat([longer.place_T4, torch.full((1, 4), -1)]),
            score_T=torch.cat([longer.score_T, torch.zeros(1)]),
            runs=(*longer.runs, Run(1)),
        )
        again, _ = run_prefill(decoder, [longer], frozen)
        assert again.lengths_LB[-1][0] == done.lengths_LB[-1][0] + step + 1
        torch.testing.assert_close(logits[0], again.logits_BV[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("score", SCORES)
def test_a_prefill_that_merges_makes_no_tensor_of_n_by_n(decoder, score):
    num_visual = 1200
    prompts = [make_prompt((Run(3), Run(num_visual, 0, 1, 0), Run(4))), make_prompt((Run(90, 0, 0, 0), Run(2)), seed=1)]
    plan = plan_of(("decoder_layer", (2,), ILLaVA(keep_ratio=0.5, score=score)))
    with Operations() as seen:
        run_prefill(decoder, prompts, plan, page_size=64)
    assert num_visual < seen.largest[1].numel() < num_visual**2, seen.largest


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
    torch.testing.assert_close(repeated, shared, atol=1e-6, rtol=1e-5)
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
def test_the_decoder_reduces_all_images_and_tokens_in_the_same_number_of_operations(decoder, score):
    def operations(num_images: int, num_tokens: int) -> int:
        runs = [Run(num_tokens, n, n, -1) for n in range(num_images)]
        reducer = ILLaVA(keep_ratio=0.5, score=score, per="medium")
        prompt = make_prompt((Run(2), *runs, Run(3)))
        with Operations() as seen:
            run_prefill(decoder, [prompt], plan_of(("decoder_layer", (2,), reducer)), page_size=256)
        return seen.count

    operations(2, 10), operations(7, 16)
    assert 0 < operations(2, 10) == operations(7, 16)


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


class Measured:
    """Hooks on a real model: what entered the tower, the first and the last decoder layer, request by request.

    Text is what was embedded from token ids; requests must draw one token only and run one at a time.
    """

    def __init__(self, family):
        self.rows: list[tuple[int, int, int]] = []
        self._patches = self._text = self._first = 0
        layers, embeddings = family.decoder.layers, family._embedding
        self._handles = [
            family.tower._embeddings.register_forward_hook(self._tower),
            embeddings.register_forward_hook(self._embed),
            layers[0].self_attn.k_proj.register_forward_pre_hook(self._enter),
            layers[-1].self_attn.k_proj.register_forward_pre_hook(self._leave),
        ]

    def _tower(self, module, args, out):
        self._patches += out.shape[0] * out.shape[1]

    def _embed(self, module, args, out):
        self._text += args[0].numel()

    def _enter(self, module, args):
        self._first = args[0].shape[0]

    def _leave(self, module, args):
        text, self._text, patches, self._patches = self._text, 0, self._patches, 0
        self.rows.append((patches, self._first - text, args[0].shape[0] - text))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()


def test_counts_in_parquet_are_what_hooks_measured_and_stages_sum_to_the_latency(tmp_path, onevision_folder):
    import clips
    import fakes

    from pipeline.runner import run_job
    from pipeline.worker import VLMWorker

    for value in (5, 6, 7):
        clips.write_barcode_video(tmp_path / f"{value}.mp4", value, num_frames=8)
    lines = [{"id": str(value), "uri": str(tmp_path / f"{value}.mp4")} for value in (5, 6, 7)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def run(name, plan, num_frames):
        job = fakes.job_config(
            tmp_path / name,
            {"manifest": str(tmp_path / "items.jsonl")},
            model={"model_id": str(onevision_folder), "max_batch_requests": 1},
            sampling={"max_new_tokens": 1},
            media={"num_frames": num_frames},
            reduction=plan,
        )
        vlm = VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20, max_batch_requests=1)
        with Measured(vlm.family) as measured:
            run_job(job, worker_factory=lambda config, run_info: VLMWorker(config, run_info, vlm=vlm))
        rows = fakes.read_rows(tmp_path / name)
        assert [row["status"] for row in rows] == ["ok"] * 3, rows[0]["error_message"]
        return rows, measured.rows

    for num_frames in (2, 5):
        whole, unreduced = run(f"whole-{num_frames}", {"steps": []}, num_frames)
        rows, reduced = run(f"kept-{num_frames}", {"steps": [VISION, FRAMES, LAYER]}, num_frames)
        kept = ("num_patches", "num_vision_tokens_kept", "num_decoder_tokens_kept")
        assert [tuple(row[name] for name in kept) for row in rows] == reduced
        assert [tuple(row[name] for name in kept) for row in whole] == unreduced
        assert [row["num_vision_tokens"] for row in rows] == [entering for _, entering, _ in unreduced]
        assert all(few < many for (_, few, _), (_, many, _) in zip(reduced, unreduced, strict=True))
        stages = ("fetch_s", "load_s", "preprocess_s", "queue_s", "vision_s", "prefill_s", "decode_s")
        for row in [*rows, *whole]:
            assert sum(row[name] for name in stages) == pytest.approx(row["latency_s"], rel=0.02, abs=0.002)


def test_a_sleep_in_every_stage_of_a_real_run_appears_in_that_stage_alone(tmp_path, onevision_folder, monkeypatch):
    """The real loader with its child process, and the real model: each stage sleeps once, for a length of its own."""
    import clips
    import fakes
    from slow_preprocessor import SlowPreprocessor

    from pipeline.loading.loader import Loader
    from pipeline.loading.staging import Staging
    from pipeline.runner import run_job
    from pipeline.worker import VLMWorker

    sleeps = {"fetch_s": 0.4, "preprocess_s": 0.7, "vision_s": 1.0, "prefill_s": 1.3, "decode_s": 1.6}
    clips.write_barcode_video(tmp_path / "5.mp4", 5, num_frames=8)
    config = fakes.job_config(
        tmp_path / "out",
        {"uri": str(tmp_path), "pattern": "*.mp4"},
        model={"model_id": str(onevision_folder)},
        sampling={"max_new_tokens": 2},
        reduction={"steps": [VISION, FRAMES, LAYER]},
    )
    vlm = VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)
    # "<|im_end|>" first would end the answer before any decode step
    monkeypatch.setattr(vlm.family, "stop_token_ids", frozenset())
    places = {
        "fetch_s": (Staging, "get"),
        "vision_s": (vlm.family, "encode"),
        "prefill_s": (vlm.family.decoder, "prefill"),
        "decode_s": (vlm.family.decoder, "decode"),
    }
    for stage, (owner, name) in places.items():
        stock = getattr(owner, name)

        def slow(*args, _stock=stock, _sleep_s=sleeps[stage], **options):
            time.sleep(_sleep_s)
            return _stock(*args, **options)

        monkeypatch.setattr(owner, name, slow)
    run_job(
        config,
        worker_factory=lambda config, run_info: VLMWorker(config, run_info, vlm=vlm),
        loader_factory=lambda config, preprocessor: Loader(
            config.media, SlowPreprocessor(preprocessor, sleeps["preprocess_s"])
        ),
    )
    [row] = fakes.read_rows(tmp_path / "out")
    assert row["status"] == "ok", row["error_message"]
    for stage, sleep_s in sleeps.items():
        assert sleep_s <= row[stage] < sleep_s + 0.4, (stage, row[stage])
    assert row["queue_s"] < 0.4
    total_s = sum(row[stage] for stage in sleeps) + row["load_s"] + row["queue_s"]
    assert total_s == pytest.approx(row["latency_s"], rel=0.02)


def test_media_that_cannot_fit_are_refused_before_the_tower_runs(vlm, preprocessor, monkeypatch):
    video = preprocessor.video(noise(3, 30, 40))
    monkeypatch.setattr(vlm.family.decoder, "max_positions", 52)  # 3 x 16 + 1 places, 3 new tokens
    monkeypatch.setattr(vlm.family, "encode", lambda *_, **__: pytest.fail("the tower ran"))
    with pytest.raises(RequestError, match=r"'long': 49 prompt places of its media and 4 new tokens .* 52 positions"):
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
    bad, fine = vlm.generate([Request("bad", content), good], plan=EMPTY_PLAN)
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
