"""Excerpt of lmms-eval 0.7.3 (EvolvingLMMs-Lab/lmms-eval; MIT, Apache-2.0): ``lmms_eval/api/instance.py``."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: Literal["loglikelihood", "generate_until", "generate_until_multi_round", "generate_until_agentic"]
    arguments: tuple
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)
    task_name: str | None = None
    doc_id: Any = None
    repeats: Any = None

    def __post_init__(self) -> None:
        self.task_name, self.doc_id, self.repeats = (self.metadata[name] for name in ("task", "doc_id", "repeats"))

    @property
    def args(self) -> tuple:
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)
