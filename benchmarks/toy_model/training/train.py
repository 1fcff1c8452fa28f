"""Trains the tiny demo model: dense patch classification, then packed questions. The same command resumes it.

The budget is training seconds (CPU seconds of a process on a CPU, so that a paused or crowded machine only takes
longer); the learning rate is flat for seven tenths of it, then falls linearly to zero. One thread a process; several
processes (torchrun) share each step, which a crowded machine slows less than threads.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoTokenizer

from benchmarks.toy_model.data.vocabulary import KIND_LABELS
from benchmarks.toy_model.training.architecture import (
    build_config,
    build_model,
    build_tokenizer,
    let_spaced_words_start_alike,
    write_folder,
)
from benchmarks.toy_model.training.batch_schedule import BatchSchedule
from benchmarks.toy_model.training.batches import QuestionEncoder
from benchmarks.toy_model.training.evaluation import evaluate
from benchmarks.toy_model.training.forward import TrainingForward
from benchmarks.toy_model.training.losses import Losses, word_ids
from benchmarks.toy_model.training.muon import Muon

_DENSE_WEIGHT, _LINKED_WORD_WEIGHT, _KEYWORD_WEIGHT, _FOREGROUND_WEIGHT, _ATTENTION_WEIGHT = 0.2, 0.5, 0.5, 0.3, 0.2
_FLAT_SHARE = 0.7
_KEYWORDS_FROM, _ATTENTION_FROM = 1 / 3, 5 / 9  # of the budget; other times were not tried
_WARMUP_STEPS = 60
_MUON_RATE, _ADAM_RATE = 0.006, 1e-3
_CLIP_TOWER_EVERY = 3


class Trainer:
    """Holds model, optimisers, batch schedule and clock; its whole state fits one checkpoint file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.work_dir
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1:
            dist.init_process_group("gloo")
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        saved_tokenizer = self.folder / "tokenizer"
        if not saved_tokenizer.exists() and self.rank == 0:
            build_tokenizer().save_pretrained(saved_tokenizer)
        self._wait()
        self.tokenizer = AutoTokenizer.from_pretrained(saved_tokenizer)
        self.model = build_model(build_config(self.tokenizer), seed=args.seed).to(args.device).train()
        let_spaced_words_start_alike(self.model, self.tokenizer)
        self.encoder = QuestionEncoder(self.tokenizer)
        self.prefix = torch.tensor(self.encoder.prefix, device=args.device)
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.forward = TrainingForward(self.model, dtype=dtype)
        self.losses = Losses(self.forward, word_ids(self.tokenizer))
        self.schedule = BatchSchedule(
            self.encoder, seed=args.seed, easy_vqa=args.easy_vqa, size=args.batch_size, rank=self.rank
        )
        self.optimisers = self._optimisers()
        self.step, self.elapsed_s, self.stage = 0, 0.0, "dense"
        self.stage_step, self.keywords_on = 0, False
        self.clock = time.process_time if args.device == "cpu" else time.perf_counter
        self.last_clock = self.clock()

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        matrices, others = [], []
        for name, param in self.model.named_parameters():
            is_matrix = param.ndim == 2 and ("layers." in name or "projector" in name)
            (matrices if is_matrix else others).append(param)
        return [Muon(matrices, _MUON_RATE), torch.optim.AdamW(others, _ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    def _wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _share(self, seconds: float) -> None:
        """Average gradients and this step's seconds over the processes, in one exchange."""
        if self.stage == "questions":
            for param in self.model.parameters():
                if param.grad is None:
                    param.grad = torch.zeros_like(param)
        if self.world > 1:
            grads = [param.grad for param in self.model.parameters() if param.grad is not None]
            flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor([seconds], device=self.args.device)])
            dist.all_reduce(flat)
            parts = (flat / self.world).split([*(grad.numel() for grad in grads), 1])
            for grad, part in zip(grads, parts, strict=False):
                grad.copy_(part.view_as(grad))
            seconds = parts[-1].item()
        self.elapsed_s += seconds

    @property
    def progress(self) -> float:
        return self.elapsed_s / (self.args.budget_minutes * 60)

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.elapsed_s, self.stage = state["step"], state["elapsed_s"], state["stage"]
        self.stage_step, self.keywords_on = state["stage_step"], state["keywords_on"]
        self.log({"resumed_at": self.step})

    def save(self) -> None:
        """Write the checkpoint so that a crash leaves the old one whole."""
        if self.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "stage": self.stage,
            "stage_step": self.stage_step,
            "keywords_on": self.keywords_on,
        }
        torch.save(state, self.folder / "checkpoint.tmp")
        (self.folder / "checkpoint.tmp").replace(self.folder / "checkpoint.pt")

    def log(self, record: dict) -> None:
        """One JSON line to the log and the terminal."""
        if self.rank:
            return
        record = {"step": self.step, "minutes": round(self.elapsed_s / 60, 2), "stage": self.stage, **record}
        line = json.dumps(record)
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def train_step(self) -> dict[str, float]:
        """One batch forward, backward, update."""
        if self.stage == "dense" and self.progress >= self.args.dense_share:
            self.stage, self.stage_step = "questions", 0
        if not self.keywords_on and self.progress >= _KEYWORDS_FROM:
            # Patch classification has drawn the bare words away from the spaced ones, which it never sees.
            let_spaced_words_start_alike(self.model, self.tokenizer, among=KIND_LABELS)
            self.keywords_on = True
        losses = self._dense_step() if self.stage == "dense" else self._question_step()
        now = self.clock()
        self._share(now - self.last_clock)
        self.last_clock = now
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = min(1.0, (self.stage_step + 1) / _WARMUP_STEPS) * min(
            1.0, max(1 - self.progress, 0.0) / (1 - _FLAT_SHARE)
        )
        for optimiser, base in zip(self.optimisers, (_MUON_RATE, _ADAM_RATE), strict=True):
            optimiser.param_groups[0]["lr"] = base * rate
            optimiser.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        self.stage_step += 1
        return losses

    def _dense_step(self) -> dict[str, float]:
        batch = self.schedule.dense(self.step).to(self.args.device)
        loss, colour, kind = self.losses.dense(batch, self.forward.encode(batch))
        losses = {"dense": loss.item(), "patch_colour": colour.item(), "patch_kind": kind.item()}
        if self.args.foreground_attention:
            foreground_attention = self.losses.foreground_attention(batch)
            loss, losses["foreground_attention"] = (
                loss + _FOREGROUND_WEIGHT * foreground_attention,
                foreground_attention.item(),
            )
        loss.backward()
        return losses

    def _question_step(self) -> dict[str, float]:
        batch = self.schedule.questions(self.step).to(self.args.device)
        train_tower = not batch.pooled or self.step % _CLIP_TOWER_EVERY == 0
        feature = self.forward.encode(batch, train_tower=train_tower)
        logits, target, states = self.forward.answer_logits(batch, feature, self.prefix)
        answer, (dense, colour, kind) = F.cross_entropy(logits, target), self.losses.dense(batch, feature)
        name = "clip" if batch.pooled else "still"
        losses = {name: answer.item(), "patch_colour": colour.item(), "patch_kind": kind.item()}
        loss = answer + _DENSE_WEIGHT * dense
        if train_tower and self.args.foreground_attention:
            foreground_attention = self.losses.foreground_attention(batch)
            loss = loss + _FOREGROUND_WEIGHT * foreground_attention
            losses["foreground_attention"] = foreground_attention.item()
        if bool((batch.linked_word >= 0).any()):
            # A keyword finds what its patches say before it attends: linked words are read earlier once keywords train.
            linked_word = self.losses.linked_word(batch, states.early if self.keywords_on else states.middle)
            loss, losses[f"{name}_linked_word"] = loss + _LINKED_WORD_WEIGHT * linked_word, linked_word.item()
        if self.keywords_on and bool((batch.keyword_answer >= 0).any()):
            keyword = self.losses.keyword(batch, states.middle)
            loss, losses[f"{name}_keyword"] = loss + _KEYWORD_WEIGHT * keyword, keyword.item()
            if self.progress >= _ATTENTION_FROM:
                copying = self.losses.copying(batch, states.middle)
                loss, losses[f"{name}_copying"] = loss + _ATTENTION_WEIGHT * copying, copying.item()
                if bool((batch.keyword_label >= 0).any()):
                    matching = self.losses.matching(batch, states)
                    loss, losses[f"{name}_matching"] = loss + _ATTENTION_WEIGHT * matching, matching.item()
        loss.backward()
        return losses

    def run(self) -> None:
        """Train until the budget is spent; write the folder."""
        sums: dict[str, list[float]] = {}
        last_log = last_eval = self.elapsed_s
        while self.progress < 1:
            for name, value in self.train_step().items():
                sums.setdefault(name, []).append(value)
            if self.elapsed_s - last_log > self.args.log_s:
                self.log({name: round(_mean(values), 4) for name, values in sums.items()})
                sums, last_log = {}, self.elapsed_s
                self.save()
            if self.elapsed_s - last_eval > self.args.eval_s:
                self.report()
                last_eval = self.elapsed_s
        self.save()
        self.report()
        if not self.rank:
            write_folder(self.args.out, self.model, self.tokenizer)

    def report(self) -> None:
        """Exact match on validation seeds into the log."""
        if self.rank:
            return
        self.log({"validation": evaluate(self.forward, self.encoder, self.prefix, self.args.num_validation)})


def _mean(values: list[float]) -> float:
    real = [value for value in values if value == value]  # noqa: PLR0124 - a batch may have no foreground: NaN
    return sum(real) / max(len(real), 1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True, help="checkpoint, log and tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face folder to write at the end")
    parser.add_argument("--budget-minutes", type=float, default=135.0)
    parser.add_argument("--dense-share", type=float, default=0.13, help="of the budget, for patch classification")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures a step and process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--easy-vqa", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--foreground-attention",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="teach the tower to attend to the foreground; the second toy is trained without it",
    )
    parser.add_argument("--log-s", type=float, default=60.0)
    parser.add_argument("--eval-s", type=float, default=300.0)
    parser.add_argument("--num-validation", type=int, default=32, help="samples a kind")
    parser.add_argument("--smoke", action="store_true", help="under two minutes, to see that all of it runs")
    parser.add_argument("--smoke-minutes", type=float, default=0.75)
    args = parser.parse_args()
    if args.smoke:
        args.budget_minutes, args.log_s, args.eval_s, args.num_validation = args.smoke_minutes, 0.5, 60.0, 4
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args)
    trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
