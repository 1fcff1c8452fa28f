"""Puts what an item is asked into the conversation that the job's ``task`` section describes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from illava.requests import Message, Request, SamplingParams
from pipeline.config.schema import TaskConfig

if TYPE_CHECKING:
    from illava.preprocess import VisualInput


def history_of(task: TaskConfig) -> tuple[Message, ...]:
    """Return what stands before every item's own turn: the system prompt, then the example turns."""
    messages = [] if task.system_prompt is None else [Message("system", (task.system_prompt,))]
    for turn in task.turns or ():
        messages += [Message("user", (turn.user,)), Message("assistant", (turn.assistant,))]
    return tuple(messages)


def conversation_of(task: TaskConfig) -> tuple[Message, ...]:
    """Return what may stand before a user turn of this job, for checks of the chat template."""
    turns = () if task.refine is None else (Message("user", ("x",)), Message("assistant", ("x",)))
    return (*history_of(task), *turns)


def request_of(
    task: TaskConfig,
    request_id: str,
    content: tuple[str | VisualInput, ...],
    sampling: SamplingParams,
    **options: Any,
) -> Request:
    """Return the request of one turn about an item; ``options`` are further fields of `Request`."""
    return Request(
        request_id,
        content,
        sampling,
        history=history_of(task),
        template_args=task.template_args or {},
        **options,
    )
