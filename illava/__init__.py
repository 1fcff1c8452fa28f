"""Reduces the tokens of pretrained vision-language models, and generates with them fast.

Public names load on first use, so that configuration and preprocessing never import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "VLM": "illava.vlm",
    "EngineConfig": "illava.engine.config",
    "Request": "illava.requests",
    "Message": "illava.requests",
    "SamplingParams": "illava.requests",
    "Grammar": "illava.requests",
    "Generation": "illava.requests",
    "TokenUsage": "illava.requests",
    "Timing": "illava.requests",
    "TokenTrace": "illava.requests",
    "Agreement": "illava.analysis.agreement",
    "measure_agreement": "illava.analysis.agreement",
    "ReductionPlan": "illava.plan",
    "ReductionStep": "illava.plan",
    "preset": "illava.plan",
    "VisualInput": "illava.preprocess",
    "Preprocessor": "illava.preprocess",
    "PixelLimits": "illava.pixel_limits",
    "load_preprocessor": "illava.families",
}

__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'illava' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
