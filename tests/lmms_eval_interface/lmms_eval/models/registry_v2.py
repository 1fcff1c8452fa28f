"""Excerpt of lmms-eval 0.7.3 (EvolvingLMMs-Lab/lmms-eval; MIT, Apache-2.0): ``lmms_eval/models/registry_v2.py``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()
