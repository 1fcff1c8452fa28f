"""Times tower, prefill and decode steps alone: stock transformers, the engine without and with a plan, as calls.

The tower is what turns uint8 tiles into visual tokens, projector and layout included; stock is given the pixels that
the family makes, within its time. Prefill is a packed prompt through the decoder to the logits of its last tokens;
sampling and rendering are left out on all sides. Decode steps are in `decode_steps`. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.device_clock import DeviceClock
from benchmarks.speed.decode_steps import step_calls
from illava import VLM, Request, VisualInput
from illava.decoder.prefill import prefill
from illava.engine.prompt import Prompt, assemble, pack
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.reduction.scopes import planned_lengths
from illava.visual_tokens import EncodedVisual

Calls = dict[str, Callable[[], float]]


class Cell:
    """One batch of clips on one model: its stages as calls that give seconds.

    Args:
        vlm: the engine's side.
        model: stock's, on the same weights.
        videos: a clip each request.
        prompt: the text of all.
        plan: of the side ``plan``.
    """

    def __init__(self, vlm: VLM, model: Any, videos: Sequence[VisualInput], prompt: str, plan: ReductionPlan) -> None:
        self._vlm, self._model, self._videos = vlm, model, list(videos)
        self._family, self._prompt, self._plan = vlm.family, prompt, plan
        self._encoded: dict[ReductionPlan, list[EncodedVisual]] = {}
        self._clock = DeviceClock(vlm.family.decoder.device)

    def calls(self, stage: str, *, steps: int) -> Calls:
        """Of ``tower``, ``prefill`` or ``decode``; a call of the last takes ``steps`` steps: seconds of one."""
        if stage == "decode":
            num_text = len(self._family.render((self._prompt,), []).token_ids)
            batch, frames = len(self._videos), len(self._videos[0].tiles)
            return step_calls(
                self._vlm, self._model, self._plan, batch=batch, frames=frames, num_text=num_text, steps=steps
            )
        if stage == "tower":
            return {
                "stock": partial(self._seconds, self._stock_tower),
                "empty": partial(self._seconds, partial(self._encode, EMPTY_PLAN)),
                "plan": partial(self._seconds, partial(self._encode, self._plan)),
            }
        whole, reduced = self._prompts(EMPTY_PLAN), self._prompts(self._plan)
        embedded_BSD = torch.stack([prompt.hidden_TD for prompt in whole])
        return {
            "stock": partial(self._seconds, partial(self._stock_prefill, embedded_BSD)),
            "empty": partial(self._seconds, partial(self._prefill, whole, EMPTY_PLAN)),
            "plan": partial(self._seconds, partial(self._prefill, reduced, self._plan)),
        }

    def _stock_tower(self) -> None:
        pixels_F3HW = self._family.encoder.pixels(self._videos).to(self._family.decoder.dtype)
        self._model.model.get_video_features(pixels_F3HW.unflatten(0, (len(self._videos), -1)))

    def _encode(self, plan: ReductionPlan) -> None:
        self._encoded[plan] = self._family.encode(self._videos, plan, trace=False)

    def _prompts(self, plan: ReductionPlan) -> list[Prompt]:
        if plan not in self._encoded:
            self._encode(plan)
        requests = [Request(str(n), (video, self._prompt)) for n, video in enumerate(self._videos)]
        parts = zip(requests, self._encoded[plan], strict=True)
        return [assemble(self._family, request, [encoded]) for request, encoded in parts]

    def _stock_prefill(self, embedded_BSD: Tensor) -> None:
        out = self._model.model.language_model(inputs_embeds=embedded_BSD, use_cache=True)
        self._model.lm_head(out.last_hidden_state[:, -1:])

    def _prefill(self, prompts: Sequence[Prompt], plan: ReductionPlan) -> None:
        decoder, cache = self._family.decoder, self._vlm.engine.cache
        request_ids = list(range(len(prompts)))
        for request_id, prompt in zip(request_ids, prompts, strict=True):
            cache.admit(request_id, planned_lengths(prompt.token_spans, plan, decoder.num_layers))
        blocks = cache.batch(request_ids, [[0] * decoder.num_layers] * len(prompts))
        done = prefill(decoder, pack(prompts), plan, cache, blocks, seeds=request_ids)
        for request_id in request_ids:
            cache.free(request_id)
        if done.errors or not done.logits_BV.isfinite().all():
            raise RuntimeError(f"a prefill went wrong: {done.errors or 'its logits are not finite'}")

    @torch.inference_mode()
    def _seconds(self, work: Callable[[], None]) -> float:
        started = self._clock()
        work()
        return self._clock() - started
