"""Lists every key of a job's configuration, found in the classes themselves, with another valid value for each.

`tests/pipeline/config/test_config_changes.py` says what a change means.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pipeline.config.schema import JobConfig, Section
from tests.support.runs.run_folders import make_config

# The kinds of a section of which a job has one; the first is the default. A whole section is what `kind` changes.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "task": {
        "CaptionConfig": {"kind": "caption", "prompt": "Describe."},
        "QuestionConfig": {"kind": "question"},
        "DocumentConfig": {"kind": "document", "output": "json", "json_schema": {}},
    },
    "media.frame_sampling": {
        "UniformSampling": {"kind": "uniform"},
        "FpsSampling": {"kind": "fps", "fps": 2.0},
        "KeyframeSampling": {"kind": "keyframe"},
    },
}
# Another value for each key; a key stands in the table of what it is meant to affect.
ROWS_VALUES: dict[str, Any] = {
    "seed": 1,
    "media.num_frames": 8,
    "media.frame_sampling.fps": 3.0,
    "media.decoder": "pyav",
    "media.ranged_reads": "off",
    "media.max_bytes": 10,
    "media.max_pixels_per_frame": 10,
    "media.max_duration_s": 10.0,
    "media.max_images": 3,
    "media.max_pages": 3,
    "media.over_max_pages": "fail",
    "media.page_dpi": 72,
    "media.max_pixels": 200_704,
    "media.min_pixels": 50_176,
    "media.total_pixels": 2_000_000,
    "media.max_tiles": 4,
    "model.model_id": "org/model",
    "model.revision": "0" * 40,
    "model.dtype": "bfloat16",
    "model.quantization": "int8",
    "model.adapter.id": "org/adapter",
    "model.adapter.revision": "1" * 40,
    "model.adapter.merge": False,
    "reduction": {"preset": "illava-video"},
    "task.prompt": "Other.",
    "task.system_prompt": "You are brief.",
    "task.turns": [{"user": "And that?", "assistant": "A dog."}],
    "task.template_args": {"enable_thinking": False},
    "task.prompt_template": "{{question}} Be brief.",
    "task.refine.prompt": "Is that so?",
    "task.candidates": 3,
    "task.metric": "anls",
    "task.choice_template": None,
    "task.open_template": None,
    "task.output": "markdown",
    "task.json_schema": {"type": "object"},
    "task.enforce_schema": False,
    "task.pages_per_request": 2,
    "sampling.max_new_tokens": 5,
    "sampling.temperature": 0.5,
    "sampling.top_p": 0.5,
    "sampling.top_k": 5,
    "sampling.min_p": 0.1,
    "sampling.repetition_penalty": 1.1,
    "sampling.presence_penalty": 0.5,
    "sampling.frequency_penalty": 0.5,
    "sampling.stop": ["END"],
    "sampling.loop_tokens": 64,
    "sampling.on_loop": "cut",
    "sampling.grammar.json_schema": {"type": "object"},
    "sampling.grammar.regex": "[a-z]+",
    "sampling.grammar.choices": ["yes", "no"],
    "sampling.logprobs": True,
}
EXECUTION_VALUES: dict[str, Any] = {
    "name": "other",
    "input.uri": "{folder}/elsewhere",
    "input.pattern": "**/*.mp4",
    "input.manifest": "{folder}/copy.jsonl",
    "input.limit": 99,
    "input.exclude_runs": "{folder}",  # the first of the incremental runs
    "input.follow_links": "{folder}",
    "media.verify_md5": "off",
    "media.load_timeout_s": 1.0,
    "model.device": "cuda",
    "model.kv_cache_bytes": 10,
    "model.max_batch_requests": 2,
    "runtime.executor": "ray",
    "runtime.num_vlm_actors.min": 2,
    "runtime.num_vlm_actors.max": 3,
    "runtime.gpus_per_actor": "auto",
    "runtime.cpus_per_actor": 2.0,
    "runtime.num_reader_actors": 9,
    "runtime.max_inflight_bytes": 9,
    "runtime.max_attempts": 9,
    "runtime.max_failed": 9,
    "runtime.item_timeout_s": 9.0,
    "runtime.max_open_shards": 9,
    "runtime.cache_dir": "/tmp/x",
    "runtime.cache_bytes": 9,
    "prices.gpu_hour_usd": 3.0,
    "prices.cpu_hour_usd": 3.0,
    "prices.storage_request_usd": 3.0,
    "output.uri": "{folder}/other",
    "output.items_per_shard": 5,
    "output.compression": "none",
}
# What must change along, for the value to be valid.
_ALONG = {
    "model.model_id": {"model.revision": "1" * 40, "model.dtype": "float32"},
    "task.output": {"task.json_schema": None},
    "task.candidates": {"sampling.temperature": 0.5},
    "task.prompt_template": {"task.prompt": None},  # the default
    "model.device": {"runtime.gpus_per_actor": "auto"},
    "sampling.on_loop": {"sampling.max_new_tokens": 512},
    "runtime.num_vlm_actors.min": {"runtime.num_vlm_actors.max": 3},
}


class Leaf(NamedTuple):
    """Names a key that holds a value and no further section.

    Attributes:
        key: dotted name.
        owner: name of the class that declares the key; two kinds of a section may have a key of the same name.
        affects: ``rows`` or ``execution``, as declared.
    """

    key: str
    owner: str
    affects: str

    def __str__(self) -> str:
        return f"{self.owner}-{self.key}"


def leaves(model: type[Section] = JobConfig, prefix: str = "") -> Iterator[Leaf]:
    """List every key, in every kind of every section."""
    for name, info in model.model_fields.items():
        annotations = (info.annotation, *typing.get_args(info.annotation))
        below = [one for one in annotations if isinstance(one, type) and issubclass(one, Section)]
        for section in below:
            yield from leaves(section, f"{prefix}{name}.")
        if not below:
            yield Leaf(f"{prefix}{name}", model.__name__, info.json_schema_extra["affects"])


def config_with(model_folder, leaf: Leaf, **sections) -> JobConfig:
    """Make a job that has this key; otherwise as `make_config`."""
    data = make_config(model_folder, **sections).model_dump(mode="json")
    if leaf.key == "media.max_tiles":
        (model_folder / "config.json").write_text('{"model_type": "llava_onevision"}')
    if leaf.owner == "AdapterConfig":
        _put(data, "model.adapter", {"id": "org/an-adapter", "revision": "0" * 40})
    for section, kinds in KINDS.items():
        if leaf.owner in kinds:
            _put(data, section, kinds[leaf.owner])
    return JobConfig.model_validate(data)


def with_another_value(config: JobConfig, leaf: Leaf, folder) -> JobConfig:
    """Return the same job with another value for this key."""
    data = config.model_dump(mode="json")
    section, _, name = leaf.key.rpartition(".")
    if name == "kind":
        kinds = list(KINDS[section])
        _put(data, section, KINDS[section][kinds[kinds.index(leaf.owner) - 1]])
    else:
        value = (ROWS_VALUES | EXECUTION_VALUES)[leaf.key]
        _put(data, leaf.key, value.format(folder=folder) if isinstance(value, str) else value)
    for key, value in _ALONG.get(leaf.key, {}).items():
        _put(data, key, value)
    data["task"] = {key: value for key, value in data["task"].items() if (key, value) != ("prompt", None)}
    return JobConfig.model_validate(data)


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        if data.get(name) is None:  # a section that may be left out
            data[name] = {}
        data = data[name]
    data[last] = value
