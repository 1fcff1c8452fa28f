"""Stores answers by what they depend on: weights, plan and samples. Equal work is done once.

A unit's file is named by digests of all that, so that other weights, another plan of that name or another set never
find it, and two runs over one folder share what they have in common. Knows no model and no metric.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.accuracy.sweep_plans import plan_named
from benchmarks.toy_model.data.testset import GENERATED_GROUPS, SampleName, group_of, sample_names
from illava.plan import ReductionPlan

PARTS = 8  # of a group: what is lost when a process ends


@dataclass(frozen=True, slots=True)
class Setting:
    """What the answers depend on beside the plan; pickled into every process."""

    model: str
    scale: float
    first_seed: int
    third_party: tuple[str, ...]
    blocks: tuple[int, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Samples that are asked together."""
        return (*GENERATED_GROUPS, *self.third_party)

    def plan(self, name: str, group: str) -> ReductionPlan:
        """What a plan of that name is for a group of samples."""
        return plan_named(name, clip=group == "clips", blocks=self.blocks)

    def digest(self) -> str:
        """Sixteen hex digits of the weights."""
        return weights_digest(self.model)


@dataclass(frozen=True, slots=True)
class Unit:
    """One part of a group of samples under one plan."""

    plan: str
    group: str
    part: int

    def names(self, setting: Setting) -> list[SampleName]:
        """The samples: every `PARTS`-th of the group."""
        chosen = sample_names(scale=setting.scale, first_seed=setting.first_seed, third_party=setting.third_party)
        return [name for name in chosen if group_of(name[0]) == self.group][self.part :: PARTS]

    def file(self, setting: Setting, work_dir: Path) -> Path:
        """Where its answers lie. Plans that do the same to the group have one file."""
        plan = setting.plan(self.plan, self.group).digest()  # the same when methods gain fields that are not used
        samples = f"scale_{setting.scale:g}_seed_{setting.first_seed}"
        return (
            work_dir / f"weights_{setting.digest()}" / samples / f"{self.group}_{self.part}of{PARTS}_plan_{plan}.json"
        )


def units_of(setting: Setting, plans: Iterable[str]) -> list[Unit]:
    """All units: those over the same samples follow each other."""
    plans = list(plans)
    return [Unit(plan, group, part) for group in setting.groups for part in range(PARTS) for plan in plans]


def unfinished(setting: Setting, plans: Sequence[str], work_dir: Path) -> list[Unit]:
    """Units without a file, one for each file."""
    first = {unit.file(setting, work_dir): unit for unit in reversed(units_of(setting, plans))}
    return [unit for path, unit in reversed(first.items()) if not path.exists()]


def keep(setting: Setting, unit: Unit, result: dict[str, Any], work_dir: Path) -> None:
    """Write a unit's answers, whole or not at all."""
    path = unit.file(setting, work_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    unwritten = path.with_suffix(f".{os.getpid()}.tmp")
    unwritten.write_text(json.dumps(result))
    unwritten.replace(path)


def kept(setting: Setting, plans: Iterable[str], work_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The answers of every plan, unit by unit in the same order; units with one file are one object."""
    read: dict[Path, dict[str, Any]] = {}
    found: dict[str, list[dict[str, Any]]] = {plan: [] for plan in plans}
    for unit in units_of(setting, found):
        path = unit.file(setting, work_dir)
        if path not in read:
            read[path] = json.loads(path.read_text())
        found[unit.plan].append(read[path])
    return found


BUNDLED = Path(__file__).resolve().parents[2] / "configs" / "demo" / "model"
SECOND = Path(__file__).resolve().parents[1] / "toy_model" / "model_without_taught_attention"


def bundled_digest() -> str:
    """The weights of the bundled toy."""
    return weights_digest(str(BUNDLED))


@lru_cache(maxsize=8)
def weights_digest(model: str) -> str:
    """Sixteen hex digits of a model folder's weights."""
    return hashlib.sha256((Path(model) / "model.safetensors").read_bytes()).hexdigest()[:16]
