"""Media in storage -> text in Parquet. Importing this package loads neither torch, ray nor a decoder.

Public names load on first use, as those of `illava` do.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "JobConfig": "pipeline.config.schema",
    "load_config": "pipeline.config.load",
    "run_job": "pipeline.execution.runner",
    "RunSummary": "pipeline.execution.reporting.summary",
    "PipelineError": "pipeline.errors",
    "read_media": "pipeline.own_files.media_reader",
    "MediaReader": "pipeline.own_files.media_reader",
    "verify_run": "pipeline.inspection.verify",
    "write_report": "pipeline.report.write",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
