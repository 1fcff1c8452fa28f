"""The registry: the union of reducers is what a plan's `reducer:` key may name.

A new method is one file here and one word in the union.
"""

from __future__ import annotations

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Scope, Stage
from illava.reducers.illava import ILLaVA

AnyReducer = ILLaVA

__all__ = ["AnyReducer", "Evidence", "EvidenceKind", "ILLaVA", "Reducer", "Scope", "Stage"]
