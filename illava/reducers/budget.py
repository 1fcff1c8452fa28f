"""Fixes how many tokens a method keeps, in one of three ways; every method with a fixed count shares it."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import BaseModel, Field, model_validator

from illava.reducers.base import Scope


class Budget(BaseModel):
    """Fixes how many tokens of a segment remain, by exactly one key.

    Class attributes:
        budgets: the keys.

    Attributes:
        per: the scope that is ranked at decoder stages; the tower always ranks within a tile or frame.
        num_merged: tokens fewer than before, r (``illava_vit_r`` in the released code). Give exactly one budget.
        keep_ratio: share of a scope's tokens kept, r = n - round(n * keep_ratio) (``illava_llm_r``).
        keep_per_frame: tokens kept of each frame; sets the scope to the frame.
    """

    budgets: ClassVar[tuple[str, ...]] = ("num_merged", "keep_ratio", "keep_per_frame")
    per: Scope = "medium"
    num_merged: int | None = Field(default=None, ge=1)
    keep_ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    keep_per_frame: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _frame_scope(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("keep_per_frame") is not None:
            if data.get("per", "frame") != "frame":
                raise ValueError("keep_per_frame ranks within each frame: leave `per` out or set it to frame")
            return {**data, "per": "frame"}
        return data

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [n for n in self.budgets if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(self.budgets)}; got {given or 'none'}")
        return self

    def num_kept(self, num_tokens: int) -> int:
        """n - r; a segment always keeps at least one token, and never grows."""
        if self.num_merged is not None:
            return max(num_tokens - self.num_merged, min(num_tokens, 1))
        if self.keep_per_frame is not None:
            return min(num_tokens, self.keep_per_frame)
        keep_ratio = self.keep_ratio or 0.0  # set, by _one_budget
        return max(round(num_tokens * keep_ratio), min(num_tokens, 1))
