"""Checks what a configuration asks of its model's files, before anything runs. Loads no torch."""

from __future__ import annotations

from illava.families import load_spec, unused_limits
from illava.families.chat_template import read_chat_template, unused_args
from pipeline.config.schema import JobConfig
from pipeline.errors import ConfigError


def check_model_options(config: JobConfig) -> None:
    """Refuse keys for which this model has no use.

    Raises:
        ConfigError: names the key, and what the model has.
        ModelLoadError: the model's files cannot be read.
    """
    args, limits = config.task.template_args, config.media.pixel_limits
    if args is None and not limits.named:
        return
    spec, files = load_spec(config.model.model_id, revision=config.model.hub_revision)
    if problem := unused_limits(spec, limits):
        raise ConfigError(f"media: {problem}")
    if args is not None:
        template = read_chat_template(files)
        problem = None if template is None else unused_args(template, args)
        if problem:
            raise ConfigError(f"task.template_args: {problem}")
