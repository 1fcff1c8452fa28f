"""docs/configuration.md: every key of a job, a sweep and a plan, from the pydantic models and their docstrings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.generators.markdown import GENERATED, attributes, plain, sentence, summary, table
from illava.reducers import REDUCERS
from pipeline.config.schema import JobConfig
from pipeline.sweep.config import SweepConfig

# Keys whose section's docstring has no line for them.
MEANINGS = {
    ("JobConfig", "name"): "For people: it begins the printed lines and tags the metrics.",
    ("JobConfig", "seed"): "Drives every random draw.",
    ("CaptionConfig", "kind"): "A caption.",
    ("CaptionConfig", "prompt"): "What the model is asked; a manifest's column `prompt` overrides it item by item.",
    ("QuestionConfig", "kind"): "A question.",
    ("DocumentConfig", "kind"): "A document.",
    ("UniformSampling", "kind"): "Evenly spaced frames.",
    ("FpsSampling", "kind"): "Frames at a rate.",
    ("FpsSampling", "fps"): "Frames a second.",
    ("KeyframeSampling", "kind"): "Key frames.",
    ("PricesConfig", "gpu_hour_usd"): "A GPU for an hour.",
    ("PricesConfig", "cpu_hour_usd"): "A CPU core for an hour.",
    ("PricesConfig", "storage_request_usd"): "One request to the store.",
}
# Under a section's table; with every key of the section, in as many documents as it takes.
EXAMPLES = {
    "media": """\
media:
  num_frames: 16
  frame_sampling: {kind: uniform}
  decoder: pyav
  ranged_reads: auto
  verify_md5: auto
  load_timeout_s: 60
  max_bytes: 2_000_000_000
  max_pixels_per_frame: 40_000_000
  max_duration_s: 3600
  max_images: 8
  max_pages: 20
  over_max_pages: fail
  page_dpi: 144
  # of a Qwen model: 64 to 640 tokens a picture, 6,400 a video
  max_pixels: 501_760
  min_pixels: 50_176
  total_pixels: 5_017_600
---
media:
  # of a LLaVA model: at most four tiles and the base tile
  max_tiles: 4
""",
    "model": """\
model:
  # a 7B on a card of 24 GB
  model_id: Qwen/Qwen2.5-VL-7B-Instruct
  revision: "0000000000000000000000000000000000000000" # the commit that you checked
  dtype: auto
  device: cuda
  quantization: float8
  kv_cache_bytes: 4_000_000_000
  max_batch_requests: 16
  # trained on that model
  adapter:
    id: adapters/cranes
    revision: null
    merge: true
""",
    "task: {kind: caption}": """\
task:
  kind: caption
  system_prompt: You write the captions of a library's catalogue.
  turns:
    - user: "Title: At the sea. Describe the picture in one sentence."
      assistant: A dog runs along a beach at low tide.
  template_args: {enable_thinking: false}
  prompt_template: "Title: {title}. Describe the picture in one sentence."
  refine: {prompt: "Correct what the picture does not show, and answer with the sentence alone."}
---
task:
  prompt: Describe the picture in one sentence.
  candidates: 3
sampling:
  temperature: 0.8
""",
    "sampling": """\
sampling:
  max_new_tokens: 512
  temperature: 0.7
  top_p: 0.9
  top_k: 40
  min_p: 0.05
  repetition_penalty: 1.05
  presence_penalty: 0.2
  frequency_penalty: 0.1
  stop: ["</answer>", "\\n\\n\\n"]
  loop_tokens: 256
  on_loop: retry
  grammar: {regex: "[A-Z][^<>]{20,600}[.]"}
  logprobs: true
""",
}
# Under the table of a section whose keys exclude each other: an example of each.
ALTERNATIVES = {
    "sampling.grammar": (
        """\
sampling:
  max_new_tokens: 256
  grammar:
    json_schema:
      type: object
      properties:
        title: {type: string, maxLength: 40}
        people: {type: integer, minimum: 0, maximum: 99}
        setting: {enum: [indoors, outdoors, unclear]}
      required: [title, people, setting]
      additionalProperties: false
""",
        """\
sampling:
  grammar:
    regex: "[0-9]{4}-(0[1-9]|1[0-2])|no date"
""",
        """\
task: {kind: question}
sampling:
  grammar:
    choices: options
""",
    )
}
# Keys that many reducers share.
COMMON = {
    "per": "The scope that one decision is about: a frame, a contiguous range of tokens, an image or video, the prompt."
}
_LIMITS = {
    Ge: "at least {}",
    Gt: "above {}",
    Le: "at most {}",
    Lt: "below {}",
    MinLen: "not empty",
    MaxLen: "at most {} long",
}
_BOUND = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt", MaxLen: "max_length"}


def page() -> str:
    """The whole page."""
    parts = [GENERATED, "# Configuration", _INTRODUCTION, "## The file", _overview()]
    for key, section in dict(sections(JobConfig)).items():
        parts += [f"## `{key}`", summary(section.__doc__), _section(section)]
        examples = EXAMPLES[key].split("---\n") if key in EXAMPLES else ALTERNATIVES.get(key, ())
        parts += [f"```yaml\n{example}```" for example in examples if example]
    parts += ["## `reduction.steps[].reducer`", _REDUCERS, *(_reducer(kind) for kind in REDUCERS)]
    parts += ["## A sweep", summary(SweepConfig.__doc__), _SWEEP, _section(SweepConfig, affects=False)]
    return "\n\n".join(parts) + "\n"


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below a model, with its dotted key; the members of a union by their ``kind``."""
    for name, info in model.model_fields.items():
        inside = _models(info.annotation)
        kinds = len(inside) > 1
        for section in [] if name == "reducer" else inside:  # reducers have headings of their own
            many = (
                "[]"
                if {tuple, list} & {get_origin(one) for one in (info.annotation, *get_args(info.annotation))}
                else ""
            )
            key = f"{prefix}{name}{many}"
            kind = section.model_fields["kind"].default if kinds else None
            yield f"{key}: {{kind: {kind}}}" if kinds else key, section
            yield from sections(section, f"{key}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for one in get_args(annotation) for model in _models(one)]


def _overview() -> str:
    rows = [
        (f"`{name}`", "required" if info.is_required() else "may be left out", _kind(info.annotation))
        for name, info in JobConfig.model_fields.items()
    ]
    return table(("key", "", "type"), rows)


def _section(section: type[BaseModel], *, affects: bool = True) -> str:
    said = {name: text for one in reversed(section.__mro__) for name, text in attributes(one.__doc__).items()}
    rows = []
    for name, info in section.model_fields.items():
        meaning = said.get(name) or MEANINGS.get((section.__name__, name), "")
        if not meaning:
            raise SystemExit(f"{section.__name__}.{name} has no line under Attributes: and none in MEANINGS")
        cells = [f"`{name}`", _type(info), _default(info), _affects(info), sentence(meaning)]
        rows.append(cells if affects else [*cells[:3], cells[4]])
    head = ["key", "type and limits", "default", "changes rows", "meaning"]
    return table(head if affects else [*head[:3], head[4]], rows)


def _reducer(kind: str) -> str:
    reducer = REDUCERS[kind]
    said = attributes(reducer.__doc__)
    told = {one.__name__: attributes(one.__doc__) for one in reducer.__mro__}
    for name, text in said.items():
        if see := re.match(r"see `(\w+)`[.;]? ?", text):
            of_its_own = sentence(text[see.end() :])
            said[name] = f"{told[see[1]][name]} {of_its_own}".rstrip()
    rows = [
        (f"`{name}`", _type(info), _default(info), sentence(said.get(name) or COMMON.get(name, "")))
        for name, info in reducer.model_fields.items()
        if name != "kind"
    ]
    first = plain((reducer.__doc__ or "").strip().splitlines()[0])
    head = f"### `{{kind: {kind}}}`\n\n{first}"
    return f"{head}\n\n{table(('key', 'type and limits', 'default', 'meaning'), rows)}" if rows else head


def _affects(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    return {"rows": "yes", "execution": "no"}[str(extra["affects"])] if isinstance(extra, dict) else "yes"


def _type(info: FieldInfo) -> str:
    limits = [limit for item in info.metadata if (limit := _limit(item))]
    return ", ".join([_kind(info.annotation), *limits])


def _limit(item: Any) -> str:
    pattern = getattr(item, "pattern", None)
    if pattern:
        return f"matches `{pattern}`"
    for kind, words in _LIMITS.items():
        if isinstance(item, kind):
            return words.format(getattr(item, _BOUND.get(kind, ""), ""))
    return ""


def _kind(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inside[0])
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if origin is None:
        return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
            getattr(annotation, "__name__", ""), "any JSON"
        )
    if str(origin) in ("typing.Literal",):
        return ", ".join(f"`{choice}`" for choice in inside)
    if origin in (tuple, list):
        return f"list of {_kind(inside[0])}"
    if origin is dict:
        return "map"
    return " or ".join(dict.fromkeys(_kind(one) for one in inside))  # a union


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) and value == type(value)() and len(type(value).model_fields) > 1:
        return "its own defaults"
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    return f"`{json.dumps(value, default=str)}`"


_INTRODUCTION = """\
A job is one YAML file. `input`, `model` and `output` are required; everything else has a default. An unknown key is
refused with the nearest valid one. `--set section.key=value` overrides one key on the command line. The
value of a key that holds text is taken as it stands (`--set "input.pattern=**/*.mp4"`), but for quotes around the whole of it and for `null`; any
other is read as YAML: `--set reduction='{preset: none}'`. Numbers are finite, and YAML's `off` is the word `off`.

"Changes rows" says whether a key can change what stands in a row. Such keys are part of the run's *config fingerprint*: a run that was
begun with other values is refused, and wants an `output.uri` of its own. The other keys may differ from session to session of
one run. `configs/caption_videos_llava_onevision.yaml` has every key with a comment."""
_REDUCERS = """\
One method with its settings. [Plans and methods](plans-and-methods.md) says where each may act and where it comes from. All keys
change rows."""
_SWEEP = "`jobs/sweep_reduction.py` reads these keys; `input`, `media`, `task`, `sampling` and `output` are a job's. `on_loop: retry` and `logprobs` are refused: a sweep draws each answer once, and keeps no rows."
