"""Answers lmms-eval's tasks by a job's model, so that numbers published with the harness can be had by its own command:

    lmms-eval --model illava --model_args config=configs/answer_questions.yaml,reduction.preset=none --tasks mme

Of the configuration `model`, `media`, `reduction` and `seed` count. The harness's task decides what is asked, how long
an answer may be and how it is scored. Videos are read as jobs read them, in the sandbox process. The harness alone
imports this file, through the entry point ``lmms_eval.models`` in pyproject.toml.

Source of the interface: lmms-eval 0.7.3, ``lmms_eval/api/model.py`` (class ``lmms``), ``lmms_eval/api/instance.py``,
``lmms_eval/models/registry_v2.py``; the arguments of a request as ``ConfigurableTask.construct_requests`` makes them in
``lmms_eval/api/task.py``; images before the text unless ``<image>`` stands in it, as
``lmms_eval/models/simple/llava_onevision.py``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from illava.engine.oom_backoff import OOMBackoff
from illava.errors import RequestError
from illava.families import load_preprocessor
from illava.preprocess import VisualInput
from illava.requests import Generation, Request, SamplingParams
from pipeline.config.load import load_config
from pipeline.config.placement import batch_of
from pipeline.errors import ConfigError, ItemError
from pipeline.execution.worker import load_vlm
from pipeline.loading.loader import Loader
from pipeline.records import MediaItem
from pipeline.redaction import visible
from pipeline.tasks.asking import request_of

logger = logging.getLogger(__name__)
IMAGE = "<image>"
_UNDERSTOOD = {"max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "until"}
_DEFAULT_NEW_TOKENS = 1024  # of lmms-eval's own models


def manifest() -> ModelManifest:
    """Return what the harness registers."""
    return ModelManifest("illava", simple_class_path=f"{__name__}.HarnessModel")


class HarnessModel(lmms):
    """Answers the harness's requests through one running batch. A failed request is answered by "", and said.

    Args:
        config: path of a job's YAML.
        device: overrides ``model.device``.
        batch_size, max_batch_size: the harness always gives them; ``model.max_batch_requests`` decides.
        overrides: keys of the configuration, such as ``media.num_frames``.
    """

    is_simple = True

    def __init__(
        self,
        config: str,
        *,
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        overrides |= {"model.device": device} if device else {}
        self._config = load_config(config, [f"{key}={_as_yaml(value)}" for key, value in overrides.items()])
        model, task = self._config.model, self._config.task
        if task.refine is not None or task.candidates is not None:
            raise ConfigError("task: the harness asks one answer a request; leave out refine and candidates")
        self._preprocessor = load_preprocessor(
            model.model_id, revision=model.revision, pixel_limits=self._config.media.pixel_limits
        )
        self._loader = Loader(self._config.media, self._preprocessor)
        self._batch = OOMBackoff(load_vlm(self._config), self._config.reduction)
        self._video: tuple[str, tuple[VisualInput, ...]] = ("", ())
        self._not_heeded: set[str] = set()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return one answer for each request, in order."""
        waiting = deque(enumerate(requests))
        answers: dict[int, GenerationResult] = {}
        asked: dict[str, int] = {}
        most = batch_of(self._config)
        while waiting or asked:
            while waiting and len(asked) < most:
                place, instance = waiting.popleft()
                name = f"{instance.task_name}/{instance.doc_id}/{place}"
                try:
                    self._batch.submit(self._request(name, instance))
                except (ItemError, RequestError) as error:
                    answers[place] = _failed(name, error)
                else:
                    asked[name] = place
            for generation in self._batch.step():
                place = asked.pop(generation.request_id)
                answers[place] = _answer(generation)
        return [answers[place] for place in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refuse a conversation of several rounds."""
        raise _refusal(requests)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refuse the likelihood of a given text."""
        raise _refusal(requests)

    def clean(self) -> None:
        """End the sandbox process."""
        self._loader.close()
        super().clean()

    def _request(self, name: str, instance: Instance) -> Request:
        context, options, doc_to_visual, doc_id, task, split = instance.args
        visuals = _flat(doc_to_visual(self.task_dict[task][split][doc_id]))
        media = [one for visual in visuals for one in self._media(visual)]
        return request_of(self._config.task, name, content_of(context, media), self._sampling(options))

    def _media(self, visual: Any) -> tuple[VisualInput, ...]:
        """A picture as the harness decoded it, or a video by its path; of neighbours with one video, loaded once."""
        if not isinstance(visual, str):
            return self._preprocessor.images([np.asarray(visual.convert("RGB"))])
        if self._video[0] != visual:
            item = MediaItem(visual, (visual,), "video", (-1,), ("",))
            self._video = visual, self._loader.load(item).media
        return self._video[1]

    def _sampling(self, options: Mapping[str, Any]) -> SamplingParams:
        if (options.get("num_beams") or 1) != 1:
            raise RequestError("num_beams: answers are drawn token by token; set --gen_kwargs num_beams=1")
        if unknown := options.keys() - _UNDERSTOOD - self._not_heeded:
            self._not_heeded |= unknown
            logger.warning("illava: generation_kwargs %s have no meaning here and are left out", sorted(unknown))
        drawn = options.get("do_sample", bool(options.get("temperature")))
        return SamplingParams(
            max_new_tokens=options.get("max_new_tokens") or _DEFAULT_NEW_TOKENS,
            temperature=float(options.get("temperature") or 0.0) if drawn else 0.0,
            top_p=float(options.get("top_p") or 1.0) if drawn else 1.0,
            seed=self._config.seed,
            stop=_stop_texts(options.get("until")),
        )


def content_of(context: str, media: Sequence[VisualInput]) -> tuple[str | VisualInput, ...]:
    """Put media where ``<image>`` stands in the text, else all before it.

    Raises:
        RequestError: as many marks as media, or none; anything between has no meaning.
    """
    texts = context.split(IMAGE)
    if len(texts) == 1:
        return (*media, context)
    if len(texts) - 1 != len(media):
        raise RequestError(f"the prompt has {len(texts) - 1} times {IMAGE} for {len(media)} media")
    parts: list[str | VisualInput] = [texts[0]]
    for text, mm_item in zip(texts[1:], media, strict=True):
        parts += [mm_item, text]
    return tuple(part for part in parts if not isinstance(part, str) or part)


def _flat(visuals: Any) -> Iterable[Any]:
    """The harness's tasks give a list, a list of lists, one picture or nothing."""
    if visuals is None:
        return []
    if isinstance(visuals, list | tuple):
        return [one for visual in visuals for one in _flat(visual)]
    return [visuals]


def _stop_texts(until: str | Sequence[str] | None) -> tuple[str, ...]:
    return tuple(mark for mark in ([until] if isinstance(until, str) else until or ()) if mark)


def _answer(generation: Generation) -> GenerationResult:
    if generation.error is not None:
        return _failed(generation.request_id, generation.error)
    usage = generation.usage
    counts = TokenCounts(usage.num_prompt_tokens, usage.num_generated_tokens) if usage else None
    return GenerationResult(generation.text, counts)


def _failed(name: str, error: Exception) -> GenerationResult:
    logger.warning('illava: %s failed and is answered by "": %s: %s', name, type(error).__name__, visible(str(error)))
    return GenerationResult("")


def _refusal(requests: Sequence[Instance]) -> RequestError:
    kind, task = requests[0].request_type, requests[0].task_name
    return RequestError(f"task {task} asks for {kind}; this model answers tasks of output_type generate_until")


def _as_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
