"""Reads which variables of a model's chat template a user may set, from the template's text alone.

Loads neither torch nor transformers, so a job's configuration is checked by it before anything runs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from illava.errors import ModelLoadError
from illava.model_files import ModelFiles

# What the conversation, the tokenizer and transformers themselves give a template.
_GIVEN = frozenset(
    {
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "messages",
        "raise_exception",
        "strftime_now",
        "tokenizer",
        "tools",
    }
)


class _Generation(Extension):
    """Parses ``{% generation %}``, by which transformers finds the answers in a conversation."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def template_variables(template: str) -> frozenset[str]:
    """Return the variables of a chat template that are neither the conversation's nor the tokenizer's.

    Raises:
        ModelLoadError: the template cannot be parsed.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
    try:
        used = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError as error:
        raise ModelLoadError(
            f"the model's chat template cannot be read: {type(error).__name__}: {error}; compare it with the "
            "published one, or download the model again"
        ) from error
    return frozenset(
        name for name in used - _GIVEN - environment.globals.keys() if not name.endswith(("_token", "_tokens"))
    )


def unused_args(template: str, names: Iterable[str]) -> str | None:
    """Say which names a chat template does not use, and which it has; None where it uses them all."""
    variables = template_variables(template)
    unknown = sorted(set(names) - variables)
    if not unknown:
        return None
    have = ", ".join(sorted(variables)) or "none"
    near = difflib.get_close_matches(unknown[0], variables, 1)
    hint = f", did you mean {near[0]}?" if near else "."
    return f"the model's chat template does not use {', '.join(unknown)}{hint} Its variables are: {have}"


def read_chat_template(files: ModelFiles) -> str | None:
    """Return the chat template that the tokenizer would be loaded with; None where the files have none.

    Source of the precedence: `illava.families.loading.load_tokenizer`; transformers 5.23,
    tokenization_utils_base.py:_from_pretrained (chat_template.jinja over tokenizer_config.json).

    Raises:
        ModelLoadError: a file cannot be read.
    """
    path = files.folder / "chat_template.jinja"
    try:
        own = files.read("chat_template.json")
        if own is not None:
            return _default(own["chat_template"])
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path} is not text in UTF-8; download the model again") from error
    config = files.read("tokenizer_config.json")
    return None if config is None else _default(config.get("chat_template"))


def _default(template: Any) -> str | None:
    """Of several named templates the default one, as transformers chooses."""
    if isinstance(template, list):
        template = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
