"""Defines `SweepConfig`, the schema of configs/sweep_*.yaml, and the points its tables stand for.

A table is a list of rows; a row is a plan in which ``$axis`` stands for a value of that axis, and gives one point for
every combination of its axes' values on every model it names. Loads neither torch nor ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from illava.plan import ReductionPlan
from pipeline.config.schema import (
    CaptionConfig,
    InputConfig,
    JobConfig,
    MediaConfig,
    ModelConfig,
    OutputConfig,
    RuntimeConfig,
    SamplingConfig,
    Section,
    TaskConfig,
)
from pipeline.storage.uris import without_extra_slashes


class RowConfig(Section):
    """Describes rows of a table that differ in their axes only.

    Attributes:
        name: of the rows; ``{axis}`` is replaced by its value.
        plan: as a job's `reduction`; a value ``$axis`` is replaced by that axis's value.
        over: values of each axis.
        models: names under `models`; all of them where left out.
    """

    name: str = Field(min_length=1)
    plan: dict[str, Any]
    over: dict[str, list[Any]] = {}
    models: list[str] | None = None

    @model_validator(mode="after")
    def _every_plan_is_one(self) -> RowConfig:
        expand_row(self)
        return self


class SpeedConfig(Section):
    """Says how seconds are taken by component: single requests, the plan and the unreduced model in turn.

    Attributes:
        num_items: the first so many items; 0 measures no seconds.
        rounds: after one that warms up and is not counted.
        num_new_tokens: of every answer, whatever the model would say.
    """

    num_items: int = Field(default=2, ge=0)
    rounds: int = Field(default=3, ge=1)
    num_new_tokens: int = Field(default=8, ge=1)


class SweepOutput(Section):
    """Says where `sweep.parquet` and the pictures stand."""

    uri: str = Field(min_length=1)

    @field_validator("uri")
    @classmethod
    def _in_normal_form(cls, uri: str) -> str:
        return without_extra_slashes(uri)


class SweepConfig(Section):
    """Describes a whole sweep.

    Attributes:
        name, seed: as a job's.
        input, media, task, sampling: as a job's; all items are loaded before the first point and held in memory.
        models: by the name that rows and results use.
        tables: rows by the table's name.
        only: the tables to measure now; null is all of them.
        quality: accuracy (where items have references) and agreement with the unreduced model; false for speed only,
            the one thing that models of random weights can show.
        speed: how seconds are taken.
        num_threads: torch threads.
        output: the results.
    """

    name: str = "sweep"
    seed: int = 0
    input: InputConfig
    media: MediaConfig = MediaConfig()
    models: dict[str, ModelConfig] = Field(min_length=1)
    tables: dict[str, list[RowConfig]] = Field(min_length=1)
    only: list[str] | None = None
    task: TaskConfig = CaptionConfig()
    sampling: SamplingConfig = SamplingConfig()
    quality: bool = True
    speed: SpeedConfig = SpeedConfig()
    num_threads: int = Field(default=1, ge=1)
    output: SweepOutput

    @field_validator("task", mode="before")
    @classmethod
    def _is_a_caption_unless_it_says_otherwise(cls, task: Any) -> Any:
        return {"kind": "caption", **task} if isinstance(task, dict) else task

    @model_validator(mode="after")
    def _can_be_measured(self) -> SweepConfig:
        if self.task.kind == "document":
            raise ValueError("task: a sweep asks one request an item, and a document is asked window by window")
        if self.sampling.on_loop == "retry" or self.sampling.logprobs:
            raise ValueError(
                "sampling: a sweep draws each answer once and keeps no rows; on_loop retry and logprobs are a job's"
            )
        if (grammar := self.sampling.grammar) and (problem := grammar.misfit(self.task)):
            raise ValueError(problem)
        for name in self.only or ():
            if name not in self.tables:
                raise ValueError(f"only: no table {name!r}; the tables are: {', '.join(self.tables)}")
        for table, rows in self.tables.items():
            for name in {name for row in rows for name in row.models or ()} - self.models.keys():
                raise ValueError(f"{table}: no model {name!r}; the models are: {', '.join(self.models)}")
            keys = [point.key for point in self._points(table)]
            for key in {key for key in keys if keys.count(key) > 1}:
                raise ValueError(f"{table}: two rows {key[1]!r}; name every axis in the row's name")
        return self

    def points(self) -> list[Point]:
        """Return every point of every table, model by model, so that each is loaded once."""
        found = [point for table in self.tables for point in self._points(table)]
        order = list(self.models)
        return sorted(found, key=lambda point: order.index(point.model))

    def wanted(self) -> list[Point]:
        """Return the points of the tables in `only`."""
        return [point for point in self.points() if self.only is None or point.table in self.only]

    def job(self, model: str, plan: ReductionPlan) -> JobConfig:
        """Return the job that one point of the sweep stands for, as far as its items and its model go."""
        return JobConfig(
            name=self.name,
            seed=self.seed,
            input=self.input,
            media=self.media,
            model=self.models[model],
            reduction=plan,
            task=self.task,
            sampling=self.sampling,
            runtime=RuntimeConfig(executor="local", cpus_per_actor=self.num_threads),
            output=OutputConfig(uri=self.output.uri),
        )

    def _points(self, table: str) -> list[Point]:
        return [
            Point(table, name, model, axes, plan)
            for row in self.tables[table]
            for name, axes, plan in expand_row(row)
            for model in row.models or self.models
        ]


@dataclass(frozen=True, slots=True)
class Point:
    """Names one row of the results: one plan on one model.

    Attributes:
        table, row, model: names.
        axes: the values of the row's axes, as text.
        plan: what is measured.
    """

    table: str
    row: str
    model: str
    axes: dict[str, str]
    plan: ReductionPlan

    @property
    def key(self) -> tuple[str, str, str]:
        return self.table, self.row, self.model


def expand_row(row: RowConfig) -> list[tuple[str, dict[str, str], ReductionPlan]]:
    """Return (name, axes, plan) of every combination of a row's axes.

    Raises:
        ValueError: a ``$axis`` that is none, an axis the plan does not use, or a plan that is none.
    """
    found = []
    for values in itertools.product(*row.over.values()):
        axes = dict(zip(row.over, values, strict=True))
        used: set[str] = set()
        filled = _filled(row.plan, axes, used)
        if used != axes.keys():
            raise ValueError(f"row {row.name!r}: the plan has no ${min(axes.keys() - used)}")
        texts = {axis: _text(value) for axis, value in axes.items()}
        try:
            name = row.name.format_map(texts)
            found.append((name, texts, ReductionPlan.model_validate(filled)))
        except KeyError as error:
            raise ValueError(f"row {row.name!r}: no axis {error}") from error
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            raise ValueError(f"row {name!r}: plan.{where}: {problem['msg'].removeprefix('Value error, ')}") from error
    return found


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _filled(node: Any, axes: Mapping[str, Any], used: set[str]) -> Any:
    if isinstance(node, dict):
        return {key: _filled(value, axes, used) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(value, axes, used) for value in node]
    if not isinstance(node, str) or not node.startswith("$"):
        return node
    if node[1:] not in axes:
        raise ValueError(f"{node} is no axis under `over`; the axes are: {', '.join(axes) or 'none'}")
    used.add(node[1:])
    return axes[node[1:]]
