"""Plays the next version of the program, in a process of its own, and does with old runs what users do with runs.

The next version has one more configuration key and a renamed one, a reducer with one more key, and one more row column,
page field and manifest column. The working folder is a copy of ``data/runs_27c8a0a``. The result is printed as JSON;
`test_old_runs.py` checks it.
"""

# ruff: noqa: E402 - each patch must stand before the modules that take over what it replaces
from __future__ import annotations

import dataclasses
import json
import os
import sys

import pyarrow as pa
from pydantic import create_model
from pydantic.fields import FieldInfo

import illava.plan
from illava.reducers.tome import ToMe
from pipeline import records
from pipeline.config import schema as config
from pipeline.config.base import Section, result_field
from pipeline.runs import config_fingerprint

ToMe.model_fields["next_knob"] = FieldInfo(annotation=float, default=0.5)
for model in (ToMe, illava.plan.ReductionStep, illava.plan.ReductionPlan):
    model.model_rebuild(force=True)
step = illava.plan.ReductionStep(stage="vision_block", layers=(1,), reducer=ToMe(num_merged=2))
assert step.model_dump()["reducer"]["next_knob"] == 0.5

records.SCHEMA_VERSION += 1
records.LATER_COLUMNS |= {"words_s": records.SCHEMA_VERSION, "pages.angle": records.SCHEMA_VERSION}
records.ResultRow = dataclasses.make_dataclass(
    "ResultRow", [("words_s", "float | None", 7.0)], bases=(records.ResultRow,), frozen=True, slots=True
)

fields = {name: (info.annotation, info) for name, info in config.SamplingConfig.model_fields.items()}
fields["nucleus"] = fields.pop("top_p")
renamed = create_model("SamplingConfig", __base__=Section, **fields)


class SamplingConfig(renamed):
    next_penalty: float = result_field(1.0, ge=1)

    @property
    def top_p(self) -> float:
        return self.nucleus


class JobConfig(config.JobConfig):
    sampling: SamplingConfig = result_field(SamplingConfig())
    reduction: illava.plan.ReductionPlan = result_field(illava.plan.ReductionPlan())


config.JobConfig = JobConfig

from pipeline.runs import row_schema

row_schema._PAGE = pa.struct([*row_schema._PAGE, pa.field("angle", pa.int32())])
place = row_schema.SCHEMA.get_field_index("pages")
row_schema.SCHEMA = row_schema.SCHEMA.set(place, pa.field("pages", pa.list_(row_schema._PAGE)))

from pipeline.evaluation import compare
from pipeline.inputs import manifest
from pipeline.report import figures
from pipeline.runs import run_record, totals

run_record.RENAMED_KEYS["sampling.top_p"] = "sampling.nucleus"
manifest.COLUMNS["language"] = pa.string()
totals._SUMMED = (*totals._SUMMED, "words_s")
compare.MEASURED = (*compare.MEASURED, "words_s")
compare._COLUMNS = (*compare._COLUMNS, "words_s")
figures.STAGES = {**figures.STAGES, "words": ("words_s",)}
figures._SECONDS = (*figures._SECONDS, "words_s")

from pipeline.errors import RefusedError
from pipeline.evaluation.run_scores import score_run
from pipeline.execution.runner import continue_run, run_job
from pipeline.inspection.status import run_status
from pipeline.inspection.verify import verify_run
from pipeline.report.write import write_report
from pipeline.runs.parquet_sink import list_parts, read_parts
from pipeline.runs.retry import begin_retry
from pipeline.runs.run import open_run, plan_run
from pipeline.runs.run_record import read_run_file, recorded_config


def job(name: str, **output: str) -> JobConfig:
    """The job as a user would have written it down for this version."""
    found = recorded_config(read_run_file(name), source=name)
    return found.model_copy(update={"output": found.output.model_copy(update=output)})


def stored(name: str) -> list[list]:
    """What stands in a run, as this version reads it."""
    kept = ("status", "words_s", "run_fingerprint", "plan_digest")
    return [[row[key] for key in kept] for table in read_parts(name, list_parts(name)) for row in table.to_pylist()]


def _violations(name: str) -> list[str]:
    """What `verify` finds, but for seconds of which a busy machine held the process."""
    return [str(one) for one in verify_run(name) if one.kind != "stage_seconds"]


def _stage_seconds(name: str) -> list[float]:
    """What the report says of the later column."""
    stages = figures.run_figures(name, num_samples=1).stages
    return [value for stage in stages if stage.name == "words" for value in stage.percentiles]


def main(names: list[str], versions: dict[str, str]) -> dict:
    """Everything one does with runs."""
    config_fingerprint._version = versions.get
    said: dict = {"verified": {}, "rows": {}}
    said["verified"]["before"] = {name: _violations(name) for name in names}
    said["resumed"] = run_job(job("interrupted")).num_done_before
    summaries = [continue_run(begin_retry(name)) for name in ("finished", "retrying", "documents")]
    said["retried"] = [summary.stats.num_rows for summary in summaries]
    os.remove("questions_merged/data/part-00000.parquet")  # its rows are made again, under the plan's digest of then
    said["merged_again"] = run_job(job("questions_merged")).stats.num_rows
    for name in names:
        said["rows"][name] = stored(name)
        said["verified"][name] = _violations(name)
        write_report(name)
        run_status(name)
    said["stages"] = {name: _stage_seconds(name) for name in ("interrupted", "questions")}
    [block, *_] = next(read_parts("documents", [0], ["pages"]))["pages"].to_pylist()[0]
    said["page"] = block["angle"]
    said["compared"] = list(compare.compare_runs("questions", "questions_merged").differing_config)
    said["scored"] = score_run("questions").num_rows
    incremental = job("finished", uri="incremental")
    later = incremental.input.model_copy(update={"exclude_runs": "retried"})
    incremental = incremental.model_copy(update={"input": later})
    said["num_excluded"] = plan_run(incremental).manifest.num_done
    penal = incremental.model_copy(
        update={"sampling": SamplingConfig(max_new_tokens=4, loop_tokens=None, next_penalty=1.5)}
    )
    said["num_excluded_under_a_penalty"] = plan_run(penal).manifest.num_done
    try:
        open_run(penal.model_copy(update={"output": job("finished").output, "input": job("finished").input}))
    except RefusedError as error:
        said["refused"] = str(error)
    return said


if __name__ == "__main__":
    result = main(sys.argv[1].split(","), json.loads(sys.argv[2]))
    with os.fdopen(int(sys.argv[3]), "w") as answer:
        json.dump(result, answer)
