# ruff: noqa: E402
"""The training forward is the shipped model's own forward, and training goes on where it stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.support.closeness import assert_close

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from benchmarks.accuracy.findings import compare
from benchmarks.toy_model.data.mixture import make
from benchmarks.toy_model.data.samples import Question, Sample
from benchmarks.toy_model.data.vocabulary import COLOUR_LABELS, KIND_LABELS, LINKED_WORDS
from benchmarks.toy_model.training.batches import NUM_PATCHES, QuestionEncoder, assemble, num_needed
from benchmarks.toy_model.training.curve import SHOWN, read_log, svg_plot, table
from benchmarks.toy_model.training.forward import States, TrainingForward
from benchmarks.toy_model.training.losses import Losses, word_ids
from benchmarks.toy_model.training.muon import orthogonalise

MODEL = ROOT / "configs" / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return LlavaOnevisionForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


def _stock_inputs(sample: Sample, text: str, tokenizer) -> dict:
    kind = "video" if sample.input_kind == "video" else "image"
    content = [{"type": kind}] * (1 if kind == "video" else len(sample.frames)) + [{"type": "text", "text": text}]
    turn = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    if kind == "video":
        pixels = torch.from_numpy(sample.frames).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
        prompt = prompt.replace("<video>", "<video>" * (len(sample.frames) * 49 + 1))
        media = {"pixel_values_videos": pixels}
    else:
        processor = LlavaOnevisionImageProcessorPil.from_pretrained(MODEL)
        media = dict(processor([list(sample.frames)], return_tensors="pt"))
        prompt = prompt.replace("<image>", "<image>" * (406 if len(sample.frames) == 1 else 197))
    return {"input_ids": tokenizer(prompt, return_tensors="pt").input_ids, **media}


@pytest.mark.parametrize("kind", ["scene", "pair", "motion"])
def test_packed_questions_give_the_stock_logits(kind: str, model, tokenizer):
    """Each packed question's logits equal transformers' forward of that question alone, in its real layout."""
    encoder, rng = QuestionEncoder(tokenizer), np.random.default_rng(0)
    forward = TrainingForward(model, dtype=torch.float32)
    batch = assemble(rng, [make(kind, seed, num_frames=4) for seed in (0, 1)], encoder, budget=60)
    with torch.no_grad():
        logits, *_ = forward.answer_logits(batch, forward.encode(batch), torch.tensor(encoder.prefix))
    start = 0
    for seed, questions in enumerate(batch.tasks):
        for question in questions:
            answer = encoder.block(question)[1]
            inputs = _stock_inputs(make(kind, seed, num_frames=4), question.text, tokenizer)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]], dtype=torch.long)], 1)
            with torch.no_grad():
                stock = model(**inputs).logits[0, -len(answer) :]
            assert_close(logits[start : start + len(answer)], stock)
            start += len(answer)
    assert start == len(logits)


def test_the_word_a_question_turns_on_carries_the_answers_first_token(tokenizer):
    """Worked out by hand for one question of each form; options and captions turn on no single word."""
    turns_on = {
        ("What is the value of K?", "37"): (" K", "3"),
        ("Which key has the value 37?", "K"): ("7", "K"),
        ("What color is the object at the top left?", "red"): (" left", "red"),
        ("Is the orange object moving up?", "no"): (" up", "no"),
        ("What color is the object at the right? A. red B. blue C. pink D. cyan", "A"): None,
        ("Where is the red object?", "top"): (" red", "top"),
        ("Which bar is the tallest?", "red"): None,
        ("Describe the image.", "A red circle at the top."): None,
    }
    encoder = QuestionEncoder(tokenizer)
    for (text, answer), expected in turns_on.items():
        _, [column] = encoder.pack(np.random.default_rng(0), (Question("task", text, answer),), 100)
        ids, *_, keyword, label = column
        found = [(tokenizer.decode(ids[n]), tokenizer.decode(keyword[n])) for n in np.flatnonzero(keyword >= 0)]
        assert found == ([] if expected is None else [expected])
        labels = [(*COLOUR_LABELS, *KIND_LABELS)[n] for n in label[label >= 0]]
        assert labels == [word.strip() for word, _ in found if word.strip() in (*COLOUR_LABELS, *KIND_LABELS)]


class _Attending:
    """A forward whose tokens attend evenly to the chosen ones among those they are shown: bool [B, V + T]."""

    def __init__(self, chosen: torch.Tensor, looking: torch.Tensor | None = None) -> None:
        self.chosen, self.looking, self.calls = chosen, looking, []

    def queries_keys(self, batch, state, number):
        self.calls.append((state, number))
        keys = 40.0 * self.chosen.float()[:, :, None, None]
        looking = torch.ones_like(keys) if self.looking is None else self.looking.float()[:, :, None, None]
        return looking, keys


def _about(kind: str, text: str, tokenizer, *, seed: int = 0, **how):
    """A sample with one of its questions, and the batch of it alone."""
    sample = make(kind, seed, **how)
    [question] = [question for question in sample.questions if question.text == text]
    sample = replace(sample, questions=(question,))
    return sample, assemble(np.random.default_rng(0), [sample], QuestionEncoder(tokenizer), split=0.5)


def _by_token(batch, patches: np.ndarray) -> torch.Tensor:
    """Bool [F * 196] of patches to bool [1, V + T]: of a clip's token, any of its four; no newline, no text."""
    shown = np.append(np.take_along_axis(patches.reshape(batch.patch.shape[1], -1), batch.patch[0].numpy(), 1), False)
    if batch.pooled:
        shown = np.append(shown[:-1].reshape(-1, 4).any(1), False)
    return torch.from_numpy(np.append(shown[batch.source[0]], np.zeros(batch.ids.shape[1], bool)))[None]


@pytest.mark.parametrize(
    ("kind", "text", "word", "leads_to"),
    [
        ("table", "Which key has the value 50?", "0", "C"),  # the 0 of 80 is in another row
        ("scene", "What color is the ring?", "ring", None),
        ("scene", "Where is the purple object?", "purple", None),
        ("motion", "Which way does the purple object move?", "purple", "right"),
    ],
)
def test_matching_asks_for_the_patches_that_answer(tokenizer, kind, text, word, leads_to):
    """The loss is -log of their share in both layers; where some lead to the answer, the others do not count."""
    sample, batch = _about(kind, text, tokenizer, **({"num_frames": 4} if kind == "motion" else {}))
    plane, names = (0, COLOUR_LABELS) if word in COLOUR_LABELS else (1, KIND_LABELS)
    same = right = _by_token(batch, sample.labels[:, plane] == names.index(word))
    if leads_to:
        assert sample.questions[0].answer == leads_to
        right = same & _by_token(batch, sample.hints[:, 0] == LINKED_WORDS.index(leads_to))
        assert 0 < right.sum() < same.sum()
    states = States("start", "early", "middle")
    is_visual = torch.arange(same.shape[1])[None] < batch.source.shape[1]
    for chosen in (right, same, is_visual, is_visual & ~right):
        forward = _Attending(chosen)
        share = ((chosen & right).sum() / chosen.sum()).item()
        loss = Losses(forward, word_ids(tokenizer)).matching(batch, states).item()
        assert loss == pytest.approx(-2 * np.log(max(share, 1e-6)), abs=1e-2)
        assert forward.calls == [("start", 0), ("early", 2)]


def test_matching_asks_nothing_where_no_patch_is_labelled(tokenizer):
    _, batch = _about("lines", "What does the first line say?", tokenizer)
    forward = _Attending(torch.ones(1, batch.source.shape[1] + batch.ids.shape[1]))
    assert Losses(forward, word_ids(tokenizer)).matching(batch, States("start", "early", "middle")).item() == 0


def test_copying_asks_the_token_before_the_answer_to_look_at_the_word(tokenizer):
    """In packed questions of two samples, each its own; looking elsewhere, or from elsewhere, costs."""
    samples = [make("table", seed) for seed in (0, 1)]
    batch = assemble(np.random.default_rng(0), samples, QuestionEncoder(tokenizer), split=0.5)
    num_visual = batch.source.shape[1]
    keyword, before = torch.zeros(2, 2, num_visual + batch.ids.shape[1], dtype=torch.bool)
    for row, column in (batch.keyword_answer >= 0).nonzero().tolist():
        of_question = (batch.block[row] == batch.block[row, column]) & (batch.target[row] >= 0)
        keyword[row, num_visual + column] = True
        before[row, num_visual + of_question.nonzero()[0, 0]] = True
    assert keyword.sum() == before.sum() > 8
    ids = word_ids(tokenizer)
    forward = _Attending(keyword, before)
    assert Losses(forward, ids).copying(batch, "middle").item() < 1e-3
    assert forward.calls == [("middle", 4)]
    assert Losses(_Attending(keyword.roll(1, 1), before), ids).copying(batch, "middle").item() > 3
    assert Losses(_Attending(keyword, before.roll(1, 1)), ids).copying(batch, "middle").item() > 3


def test_cutting_patches_keeps_all_foreground(tokenizer):
    encoder = QuestionEncoder(tokenizer)
    for kind in ("scene", "motion"):
        samples = [make(kind, seed, num_frames=4) for seed in range(3)]
        batch = assemble(np.random.default_rng(0), samples, encoder, keep=40, split=0.5)
        assert batch.patch.shape[-1] < NUM_PATCHES
        for row, sample in enumerate(samples):
            shown = int((batch.label[row] != 0).any(1).sum(-1).max())
            assert shown == int((sample.labels != 0).any(1).sum((1, 2)).max())
            assert num_needed(sample, grouped=kind == "motion") <= batch.patch.shape[-1]


def test_every_patch_is_shown_in_at_least_one_copy(tokenizer):
    encoder, samples = QuestionEncoder(tokenizer), [make("scene", 0)]
    for share in (0.0, 0.25, 0.5, 1.0):
        batch = assemble(np.random.default_rng(1), samples, encoder, split=share)
        assert set(batch.source[0].tolist()) == set(range(NUM_PATCHES + 1))
        assert (batch.slot[0].diff() > 0).all()


def test_orthogonalise_flattens_the_spectrum():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 64, 32)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_paired_comparison_counts_flips_and_covers_the_difference():
    rng = np.random.default_rng(0)
    ids = [str(i // 2) for i in range(800)]
    before = rng.random(800) < 0.9
    after = before & (rng.random(800) < 0.8)
    found = compare(ids, before.tolist(), after.tolist())
    assert found.lost == int((before & ~after).sum())
    assert found.won == 0
    assert found.difference_low < found.difference < found.difference_high < 0
    same = compare(ids, before.tolist(), before.tolist())
    assert same.difference_low == same.difference_high == 0


def _train(folder: Path, budget_minutes: float, *options: str) -> list[dict]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.toy_model.training.train",
        "--smoke",
        "--no-easy-vqa",
        "--batch-size",
        "4",
    ]
    command += ["--work-dir", str(folder / "work"), "--out", str(folder / "model")]
    command += ["--smoke-minutes", str(budget_minutes), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "work" / "log.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_smoke_training_writes_a_model_and_goes_on_where_it_stopped(tmp_path: Path):
    first = _train(tmp_path, 0.15)
    assert {"dense", "questions"} <= {record["stage"] for record in first}
    assert any("foreground_attention" in record for record in first)
    again = _train(tmp_path, 0.25, "--no-foreground-attention")
    assert not any("foreground_attention" in record for record in again[len(first) :])
    resumed = next(record for record in again if "resumed_at" in record)
    assert resumed["resumed_at"] == first[-1]["step"]
    assert again[-1]["step"] > first[-1]["step"]
    assert any({"still_keyword", "still_matching", "still_copying"} <= set(record) for record in again)
    losses = [record["still"] for record in again if "still" in record]  # on questions about pictures, both runs
    assert len(losses) >= 3
    assert losses[-1] < 0.9 * losses[0]
    curve = read_log(tmp_path / "work" / "log.jsonl")
    assert curve["steps"] == again[-1]["step"]
    assert curve["resumed_at"] == [resumed["resumed_at"]]
    assert len(curve["validations"]) == 2  # one at the end of each run
    assert table(curve).count("\n") == 1 + len(SHOWN)
    assert all(task in svg_plot(curve) for task in SHOWN)
    trained = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert sum(p.numel() for p in trained.parameters()) < 4e6
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 16e6
