"""Builds the task that a job's ``task`` section stands for."""

from __future__ import annotations

from pipeline.config.schema import CaptionConfig, DocumentConfig, TaskConfig
from pipeline.tasks.base import Task
from pipeline.tasks.caption import Caption
from pipeline.tasks.document import Document
from pipeline.tasks.question import Question


def build_task(config: TaskConfig) -> Task:
    """Build the task a job's ``task`` section stands for."""
    if isinstance(config, CaptionConfig):
        return Caption(config)
    if isinstance(config, DocumentConfig):
        return Document(config)
    return Question(config)
