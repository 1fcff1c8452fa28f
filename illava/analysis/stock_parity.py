"""Compares a model with stock transformers on requests of one's own: first logits, greedy answers, token counts.

Both sides run with the same weights and dtype, one after the other, so that one copy of the weights is held at a time.
Stock gets its pictures from its own image processor (the one of Pillow, which needs no torchvision); a video's pixels
are ours, since transformers reads videos by torchvision alone. The prompt is rendered here; stock's model refuses a
prompt whose placeholders are not as many as the features that its own tower makes, so counts are compared, too.

Shape suffixes: V vocabulary.
"""

from __future__ import annotations

import gc
import importlib
import inspect
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from illava.devices import open_device
from illava.engine.batching import sample_next_token
from illava.engine.config import EngineConfig
from illava.engine.engine import Engine
from illava.engine.request_state import RequestState
from illava.engine.sampling import SamplingBatch
from illava.errors import ILLaVAError, ModelLoadError
from illava.families import load_part, load_spec
from illava.families.base import Family
from illava.families.loading import load_weights
from illava.plan import EMPTY_PLAN
from illava.preprocess import VisualInput
from illava.requests import Generation, Request, SamplingParams
from illava.vlm import VLM

# Of the largest stock logit: what sums in another order make of it, at most, in a model of some dozen layers.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_KV_CACHE_BYTES = 1 << 30  # one request is answered at a time


@dataclass(frozen=True, slots=True, eq=False)
class ParityCase:
    """Holds one medium of one's own and what is asked about it.

    Attributes:
        name: for the report.
        media: as the model's preprocessor made them.
        prompt: the question.
        pictures: uint8 [H, W, 3] each, from which ``media`` were made; empty for a video.
    """

    name: str
    media: tuple[VisualInput, ...]
    prompt: str
    pictures: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, slots=True)
class CaseParity:
    """Holds what both sides made of one case.

    Attributes:
        name: of the case.
        logit_difference: largest difference of the first token's logits, as a share of stock's largest logit.
        num_same_tokens: tokens of the answer that are the same, from the first one on.
        num_tokens: tokens of stock's answer.
        is_near_tie: where the answers part, stock's own logits tell the two tokens apart by less than the tolerance.
        texts: ours and stock's.
        num_vision_tokens, num_prompt_tokens: ours.
        problem: why stock cannot answer it, such as a prompt with another count of placeholders; None where it can.
    """

    name: str
    logit_difference: float = 0.0
    num_same_tokens: int = 0
    num_tokens: int = 0
    is_near_tie: bool = False
    texts: tuple[str, str] = ("", "")
    num_vision_tokens: int = 0
    num_prompt_tokens: int = 0
    problem: str | None = None

    @property
    def has_same_answer(self) -> bool:
        return self.problem is None and self.num_same_tokens == self.num_tokens


@dataclass(frozen=True, slots=True)
class Parity:
    """Holds the comparison of all cases.

    Attributes:
        cases: in their order.
        dtype: that both sides ran in.
        tolerance: of the first logits' difference, as a share of their scale.
    """

    cases: tuple[CaseParity, ...]
    dtype: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether logits agree within the tolerance, and answers but for near ties."""
        return all(
            one.problem is None and one.logit_difference <= self.tolerance and (one.has_same_answer or one.is_near_tie)
            for one in self.cases
        )


@dataclass(slots=True)
class _Ours:
    answer: Generation
    logits_V: Tensor
    inputs: dict[str, Any]


def measure_parity(
    model_id: str,
    cases: Sequence[ParityCase],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    max_new_tokens: int = 32,
) -> Parity:
    """Compare the unreduced model with stock transformers; ``cases`` are asked one by one.

    Raises:
        ModelLoadError, DeviceError: the model cannot be loaded, or is quantised.
        ILLaVAError: we cannot answer a case.
    """
    spec, files = load_spec(model_id, revision=revision)
    if files.stored_scheme is not None:
        raise ModelLoadError(
            f"{model_id!r} is quantised ({files.stored_scheme}); parity compares plain weights, so name the checkpoint "
            "that it was made from"
        )
    config = EngineConfig(kv_cache_bytes=_KV_CACHE_BYTES)
    if dtype == "auto" and open_device(device).type == "cpu":
        dtype = "float32"  # which compares best, whatever the processor multiplies
    vlm = VLM.from_pretrained(model_id, revision=revision, dtype=dtype, device=device, engine_config=config)
    tokenizer, stop_ids = vlm.family.tokenizer, sorted(vlm.family.stop_token_ids)
    on, of = vlm.family.decoder.device, vlm.family.decoder.dtype
    image_processor = _image_processor(model_id, revision) if any(one.pictures for one in cases) else None
    ours = [_answer(vlm, one, image_processor, max_new_tokens) for one in cases]
    del vlm
    gc.collect()
    if on.type == "cuda":
        torch.cuda.empty_cache()
    stock = load_weights(load_part(spec.family).model_class, model_id, revision=revision, dtype=of, device=on)
    tolerance = TOLERANCES[of]
    settings = {
        "tokenizer": tokenizer,
        "stop_ids": stop_ids,
        "max_new_tokens": max_new_tokens,
        "tolerance": tolerance,
    }
    found = [_compare(stock, case, own, **settings) for case, own in zip(cases, ours, strict=True)]
    return Parity(tuple(found), str(of).removeprefix("torch."), tolerance)


def _answer(vlm: VLM, case: ParityCase, image_processor: Any, max_new_tokens: int) -> _Ours:
    request = Request(case.name, (*case.media, case.prompt), SamplingParams(max_new_tokens=max_new_tokens))
    first: list[Tensor] = []

    def draw(logits_BV: Tensor, sampling: SamplingBatch, group: Sequence[RequestState]) -> Tensor:
        if not first:
            first.append(logits_BV[0].float().cpu())
        return sample_next_token(logits_BV, sampling, group)

    engine = Engine(vlm.family, vlm.engine.cache, vlm.engine.config, draw=draw)
    (answer,) = engine.generate([request], EMPTY_PLAN, errors="raise")
    return _Ours(answer, first[0], _stock_inputs(vlm.family, request, case, image_processor))


@torch.inference_mode()
def _stock_inputs(family: Family, request: Request, case: ParityCase, image_processor: Any) -> dict[str, Any]:
    """Make what the stock model takes for a request, on the host."""
    encoded = family.encode(request.media, EMPTY_PLAN, trace=False)
    token_ids = family.render(request.content, [one.num_placeholders for one in encoded]).token_ids
    ids = torch.tensor([token_ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parameters = inspect.signature(family.model_class.forward).parameters
    if case.pictures:
        made = dict(image_processor(list(case.pictures)))
    else:
        made = _video_inputs(family, request.media[0], parameters)
    taken = {name: value.cpu() for name, value in made.items() if name in parameters and isinstance(value, Tensor)}
    if not taken:
        raise ILLaVAError(f"parity is not known for {family.model_type}: stock takes none of {', '.join(made)}")
    return inputs | taken


def _video_inputs(family: Family, video: VisualInput, parameters: Container[str]) -> dict[str, Any]:
    encoder: Any = family.encoder
    if "video_grid_thw" in parameters:
        grid = encoder.grid(video)
        step_s = 2 * video.timestamps_s[1] if len(video.timestamps_s) > 1 else 1.0
        return {
            "pixel_values_videos": encoder.patches(video),
            "video_grid_thw": torch.tensor([[grid.times, grid.rows, grid.cols]]),
            "second_per_grid_ts": torch.tensor([step_s]),
        }
    if "pixel_values_videos" in parameters:
        return {"pixel_values_videos": encoder.pixels([video])[None]}
    return {"pixel_values": encoder.patches(video)}  # frames are pictures to this model


def _image_processor(model_id: str, revision: str | None) -> Callable[[list[np.ndarray]], Any]:
    """Make stock's image processor, with the options that the model's whole processor gives it."""
    import transformers
    from transformers import AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    try:
        processor = AutoImageProcessor.from_pretrained(model_id, revision=revision, backend="pil")
    except (OSError, ValueError, ImportError) as error:
        raise ModelLoadError(f"transformers cannot make the image processor of {model_id!r}: {error}") from error
    name = PROCESSOR_MAPPING_NAMES.get(load_spec(model_id, revision=revision)[0].model_type)
    whole = getattr(transformers, name or "", None)
    options = getattr(whole, "images_kwargs", None)
    if options is None and whole is not None:  # as the first releases of transformers 5 have it
        named = vars(importlib.import_module(whole.__module__)).get(f"{name}Kwargs")
        options = getattr(named, "_defaults", {}).get("images_kwargs")
    return partial(processor, return_tensors="pt", **(options or {}))


@torch.inference_mode()
def _compare(
    stock: Any,
    case: ParityCase,
    ours: _Ours,
    *,
    tokenizer: Any,
    stop_ids: list[int],
    max_new_tokens: int,
    tolerance: float,
) -> CaseParity:
    from transformers import GenerationConfig

    usage = ours.answer.usage
    counts = (0, 0) if usage is None else (usage.num_vision_tokens, usage.num_prompt_tokens)
    inputs = {
        name: value.to(stock.device, stock.dtype if name.startswith("pixel") else None)
        for name, value in ours.inputs.items()
    }
    ids = inputs["input_ids"]
    if "mm_token_type_ids" in inspect.signature(type(stock).forward).parameters:
        image, video = stock.config.image_token_id, getattr(stock.config, "video_token_id", -1)
        inputs["mm_token_type_ids"] = (ids == image).int() + 2 * (ids == video).int()
    if hasattr(stock.model, "rope_deltas"):
        stock.model.rope_deltas = None  # transformers keeps them from the call before
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    try:
        told = stock.generate(**inputs, generation_config=greedy)
    except (ValueError, IndexError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return CaseParity(
            case.name, num_vision_tokens=counts[0], num_prompt_tokens=counts[1], problem=f"stock refuses it: {reason}"
        )
    theirs = told.sequences[0, ids.shape[1] :].tolist()
    own = list(ours.answer.token_ids)
    same = next((n for n, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), min(len(own), len(theirs)))
    logits_V = told.logits[0][0].float().cpu()
    scale = float(logits_V.abs().max())
    near_tie = False
    if same < len(theirs) and same < len(own):
        at_V = told.logits[same][0].float()
        near_tie = float(at_V.max() - at_V[own[same]]) <= tolerance * scale
    return CaseParity(
        case.name,
        logit_difference=float((ours.logits_V - logits_V).abs().max()) / scale,
        num_same_tokens=same,
        num_tokens=max(len(theirs), len(own)),
        is_near_tie=near_tie,
        texts=(ours.answer.text, tokenizer.decode(theirs, skip_special_tokens=True)),
        num_vision_tokens=counts[0],
        num_prompt_tokens=counts[1],
    )
