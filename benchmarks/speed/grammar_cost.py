"""Times what a grammar costs a decode step: the host's masks of a batch, and the masked draw on the device.

The vocabulary is a byte-level BPE of 151,643 tokens, trained on the Python sources of the installed packages and kept
in ``--tokenizer``, extended to 151,936 logits. Rows are at different places of different answers, whose tokens are
told; the logits are random numbers. Kinds of grammar, and the draw without any, take turns within every step, which a
busy machine then disturbs alike; seconds are CPU seconds of the one thread that works. A step fills every row's mask
while the device runs the model, so on a GPU only what outlasts the model's own step is felt; the copy to a GPU and the
operations there are not measured here.

    python benchmarks/speed/grammar_cost.py --batch 32 --steps 200 --json benchmarks/results/grammar_cost_cpu.json
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common.machine import write_json
from illava.engine.sampling import SamplingBatch, draw_tokens
from illava.grammar.answer import AnswerGrammar, GrammarCompiler
from illava.grammar.mask import GrammarMask
from illava.requests import Grammar, SamplingParams

NUM_TOKENS, NUM_LOGITS, STOP = 151_643, 151_936, "<|endoftext|>"
COLOURS = ["red", "green", "blue", None]
WORDS = Path(__file__).read_text().split()


def _schema(caption: dict[str, Any]) -> dict[str, Any]:
    thing = {"type": "object", "required": ["name", "count"], "additionalProperties": False}
    thing["properties"] = {"name": {"type": "string"}, "count": {"type": "integer"}, "colour": {"enum": COLOURS}}
    named = {"caption": caption, "things": {"type": "array", "items": thing}, "score": {"type": "number"}}
    return {"type": "object", "properties": named, "required": list(named), "additionalProperties": False}


GRAMMARS = {
    "json_schema": Grammar(json_schema=_schema({"type": "string"})),
    "json_schema, a text of at most 400 characters": Grammar(json_schema=_schema({"type": "string", "maxLength": 400})),
    "regex": Grammar(regex=r"([a-z']+( |, |\. )){5,80}[a-z']+\."),
    "choices": Grammar(choices=("A", "B", "C", "D")),
}


def answer(kind: str, rng: random.Random) -> str:
    """A whole answer of this kind."""
    if kind == "choices":
        return rng.choice("ABCD")
    if kind == "regex":
        words = [word for word in WORDS if word.isalpha() and word.isascii() and word.islower()]
        return ", ".join(rng.choices(words, k=30)) + "."
    things = [{"name": rng.choice(WORDS), "count": rng.randrange(99), "colour": rng.choice(COLOURS)} for _ in range(4)]
    whole = {"caption": " ".join(rng.choices(WORDS, k=40))[:380], "things": things, "score": round(rng.random(), 4)}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":"))


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The trained tokenizer; trained now where there is none."""
    if not path.is_file():
        packages = Path(np.__file__).resolve().parents[1]
        sources = [str(file) for file in sorted(packages.rglob("*.py"))[:9000]]
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        core.train(
            sources,
            trainers.BpeTrainer(vocab_size=NUM_TOKENS, special_tokens=[STOP], initial_alphabet=alphabet),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        core.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=STOP)


class Rows:
    """A batch under one grammar: each row goes through one answer after another, and begins at a place of its own."""

    def __init__(self, compiler: GrammarCompiler, kind: str, num_rows: int) -> None:
        self._compiler, self._kind, self._rng = compiler, kind, random.Random(0)
        self._told: list[list[int]] = [[] for _ in range(num_rows)]
        self._drawn: list[list[int]] = [[] for _ in range(num_rows)]
        self.grammars: list[AnswerGrammar] = [self._begin(row) for row in range(num_rows)]
        for row in range(num_rows):
            ahead = self._rng.randrange(len(self._told[row]))
            self._drawn[row] += self._told[row][:ahead]

    def _begin(self, row: int) -> AnswerGrammar:
        self._told[row] = self._compiler._spell(answer(self._kind, self._rng))
        self._drawn[row] = []
        return self._compiler.begin(GRAMMARS[self._kind], self._drawn[row])

    def advance(self) -> None:
        """Draw the told token of each row; a row whose answer is whole begins another."""
        for row, told in enumerate(self._told):
            if len(self._drawn[row]) == len(told):
                if self.grammars[row].problem is not None:
                    raise SystemExit(f"{self._kind}: {self.grammars[row].problem}")
                self.grammars[row] = self._begin(row)
            else:
                self._drawn[row].append(told[len(self._drawn[row])])


def timed(work: Any) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds in this thread."""
    began_s = time.thread_time()
    return work(), time.thread_time() - began_s


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median, mean, 99th percentile and largest of the steps."""
    ordered = sorted(1e3 * one for one in seconds)
    percentile = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
    found = (statistics.median(ordered), statistics.fmean(ordered), percentile, ordered[-1])
    return dict(zip(("median_ms", "mean_ms", "p99_ms", "max_ms"), (round(one, 3) for one in found), strict=True))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="rows")
    parser.add_argument("--steps", type=int, default=200, help="decode steps that count; 20 before them warm up")
    parser.add_argument("--tokenizer", type=Path, default=Path("build/grammar_cost_tokenizer.json"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, tokenizer = torch.device("cpu"), load_tokenizer(options.tokenizer)
    compiler = GrammarCompiler(tokenizer, NUM_LOGITS, frozenset([tokenizer.eos_token_id]))
    _, vocabulary_s = timed(compiler._vocabulary)
    compile_s = {kind: timed(lambda kind=kind: compiler.begin(GRAMMARS[kind], []))[1] for kind in GRAMMARS}
    begin_s = {kind: timed(lambda kind=kind: compiler.begin(GRAMMARS[kind], []))[1] for kind in GRAMMARS}
    rows = {kind: Rows(compiler, kind, options.batch) for kind in GRAMMARS}
    logits_BV = torch.randn(options.batch, NUM_LOGITS, generator=torch.Generator().manual_seed(0))
    greedy = SamplingBatch.of([SamplingParams()] * options.batch, device)
    fill_s: dict[str, list[float]] = {kind: [] for kind in GRAMMARS}
    mask_s: list[float] = []
    draw_s: list[float] = []
    words = np.zeros((options.batch, -(-NUM_LOGITS // 32)), dtype=np.int32)
    for step in range(options.steps + 20):
        counts = step >= 20
        for kind, batch in rows.items():
            batch.advance()
            _, taken_s = timed(lambda batch=batch: [g.fill(w) for g, w in zip(batch.grammars, words, strict=True)])
            fill_s[kind] += [taken_s] * counts
        _, taken_s = timed(lambda: draw_tokens(logits_BV, greedy, []))
        draw_s += [taken_s] * counts
        if step % 10 == 0:  # the operations on the device are the same for every grammar
            mask = GrammarMask(dict(enumerate(rows["choices"].grammars)), device)
            again_s = timed(lambda: [g.fill(w) for g, w in zip(rows["choices"].grammars, words, strict=True)])[1]
            mask_s += [timed(lambda mask=mask: mask.apply(logits_BV))[1] - again_s] * counts
    result = {
        "benchmark": "grammar_cost",
        "batch": options.batch,
        "steps": options.steps,
        "num_logits": NUM_LOGITS,
        "note": "CPU seconds of one thread, on a machine that others load; kinds take turns within each step",
        "read_vocabulary_s": round(vocabulary_s, 3),
        "compile_ms": {kind: round(1e3 * one, 3) for kind, one in compile_s.items()},
        "begin_ms": {kind: round(1e3 * one, 3) for kind, one in begin_s.items()},
        "fill_step": {kind: milliseconds(one) for kind, one in fill_s.items()},
        "mask_step_on_cpu": milliseconds(mask_s),
        "greedy_draw_on_cpu": milliseconds(draw_s),
    }
    print(json.dumps(result, indent=2))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
