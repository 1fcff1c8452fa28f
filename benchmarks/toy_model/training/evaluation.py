"""Measures exact match by teacher forcing: an answer counts if the argmax is right at every one of its tokens.

It watches a training on validation seeds; the benchmark decodes for real.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from benchmarks.toy_model.data.mixture import CLIPS, KINDS, make
from benchmarks.toy_model.training.batches import Batch, QuestionEncoder, assemble
from benchmarks.toy_model.training.forward import TrainingForward


@torch.no_grad()
def exact_matches(forward: TrainingForward, batch: Batch, prefix: Tensor) -> dict[str, list[bool]]:
    """Per task, whether each packed question would be answered exactly."""
    logits, target, _ = forward.answer_logits(batch, forward.encode(batch), prefix)
    hit = logits.argmax(-1) == target
    sample, column = (batch.target >= 0).nonzero(as_tuple=True)
    found: dict[str, list[bool]] = defaultdict(list)
    for row, questions in enumerate(batch.tasks):
        blocks = batch.block[row, column[sample == row]]
        for number, question in enumerate(questions):
            found[question.task].append(bool(hit[sample == row][blocks == number].all()))
    return found


def evaluate(forward: TrainingForward, encoder: QuestionEncoder, prefix: Tensor, num_samples: int) -> dict[str, float]:
    """Exact match per task on validation seeds, every token shown."""
    found: dict[str, list[bool]] = defaultdict(list)
    for kind in KINDS:
        size = 4 if kind in CLIPS else 8
        for start in range(0, num_samples, size):
            rng = np.random.default_rng([7, start])
            samples = [make(kind, number, split="validation") for number in range(start, start + size)]
            batch = assemble(rng, samples, encoder, budget=220).to(str(prefix.device))
            for task, hits in exact_matches(forward, batch, prefix).items():
                found[task] += hits
    return {task: round(sum(hits) / len(hits), 3) for task, hits in sorted(found.items())}
