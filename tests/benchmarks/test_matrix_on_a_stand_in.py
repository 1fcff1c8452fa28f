"""Every family x every method x every stage on a stand-in for CUDA: no tensor of a wrong device or dtype.

See `benchmarks.common.stand_in_cuda`: device tensors have real twins, host tensors are real, and two devices or two
dtypes in one operation are refused as on a GPU. The model is in bfloat16, as there, so a float32 that stays is met; and
nothing computes in float64 but what is named here. Every video, image and request is packed into one call.

What is done once, and why that is enough:

- All plans of a family that act in the decoder begin with one encoding: the tower has run before they act.
- A plan that acts in or before the tower is prefilled only if its encoding differs from those prefilled before in what
  a prefill could stumble over: which tensors it holds, their dtypes and their devices.
- Drawing and log-probabilities see logits alone, so these prefills ask for them and the others do not.
- A text scorer knows no family: the methods that need one run in one.
"""

from contextlib import suppress
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from benchmarks.common.stand_in_cuda import DEVICE, StandInCuda
from benchmarks.tables.family_matrix import SETTINGS, plan_of, stages_of
from illava import VLM, Request, SamplingParams, load_preprocessor
from illava.engine.media_phase import MediaPhase
from illava.errors import ILLaVAError
from illava.families import FAMILIES, load_part
from illava.families.loading import load_tokenizer
from illava.families.text_scorer import RelevanceModel
from illava.plan import ReductionPlan
from illava.reducers.base import ClipScorer, ClipSegScorer
from illava.requests import KeptEncoding
from tests.support.models.clip import make_clip, make_clipseg
from tests.support.models.families import MAKERS, make_folder

pytestmark = pytest.mark.long

DTYPE = torch.bfloat16
IN_TOWER, IN_DECODER = ("media", "vision_block", "vision_output"), ("decoder_input", "decoder_layer")
WITH_SCORER = "llava_onevision"
IN_DOUBLE = {"pixels", "patches", "best_boxes"}  # rescaled as transformers does, for equal bits; sums that are compared
GREEDY = SamplingParams(max_new_tokens=2, min_new_tokens=2)
DRAWN = {
    "image": replace(GREEDY, temperature=0.7, top_p=0.9, top_k=20, seed=3, logprobs=True),
    "images": replace(GREEDY, repetition_penalty=1.2, logprobs=True),
}


def picture(height, width, seed):
    """White, with a block of noise: much repeats."""
    made, rng = np.full((height, width, 3), 255, np.uint8), np.random.default_rng(seed)
    made[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(
        0, 256, (height // 2 - height // 4, width // 2 - width // 4, 3)
    )
    return made


class OnDevice:
    """One family's tiny model there, and its requests by modality."""

    def __init__(self, name, folder):
        preprocessor, family = load_preprocessor(folder), load_part(FAMILIES[name].family)
        model = family.model_class.from_pretrained(folder, dtype=DTYPE).eval().requires_grad_(False)
        self.stand_in = StandInCuda(values=True)
        with self.stand_in:
            model = self.stand_in.to_device(model)
            self.family = family(model, load_tokenizer(folder, revision=None), preprocessor)
            self.vlm = VLM(self.family, kv_cache_bytes=8 << 20, decode_graphs=False)
        first, second, third = (
            preprocessor.images([picture(*size)])[0] for size in ((64, 48, 0), (40, 56, 1), (56, 40, 2))
        )
        content = {"image": (first, "What?"), "images": ("A:", second, "then B:", third, "Compare.")}
        if "video" in self.family.media_kinds:
            frames = [picture(48, 48, n // 2) for n in range(7)]
            content["video"] = ("See", preprocessor.video(frames), "what happens?")
        self.requests = {modality: Request(modality, parts) for modality, parts in content.items()}
        self.scorers = {}

    def plans(self, *stages):
        for setting in SETTINGS.values():
            for stage in stages_of(self.family, setting):
                if stage in stages and ("scorer" not in setting or self.scorers):
                    yield self.with_scorer(plan_of(self.family, setting, stage))

    def with_scorer(self, plan):
        (step,) = plan.steps
        if step.reducer.text_scorer is None:
            return plan
        reducer = step.reducer.model_copy(
            update={"scorer": next(s for s in self.scorers if s.kind == step.reducer.text_scorer.kind)}
        )
        return ReductionPlan(steps=(step.model_copy(update={"reducer": reducer}),))

    def shown(self, plan):
        """The requests as stage ``media`` of the plan leaves them; one that it refuses in words, whole."""
        phase, shown = MediaPhase(self.family), {}
        phase._scorers |= self.scorers
        for modality, request in self.requests.items():
            with suppress(ILLaVAError):
                shown[modality] = phase.apply(request, plan)
        return self.requests | shown

    def encode(self, requests, plan):
        media = [mm_item for request in requests.values() for mm_item in request.media]
        encoded = self.family.encode(media, plan, trace=True, seeds=range(len(media)))
        assert {mm_item.feature_KD.dtype for mm_item in encoded} == {DTYPE}
        return encoded

    def answer(self, requests, encoded, plan, sampling):
        """Prefill all requests with these encodings of their media, and decode a step."""
        waiting, asked = list(encoded), []
        for modality, request in requests.items():
            kept = KeptEncoding(plan, request.media, tuple(waiting.pop(0) for _ in request.media))
            asked.append(replace(request, sampling=sampling.get(modality, GREEDY), encoding=kept))
        for done in self.vlm.generate(asked, plan=plan):
            assert len(done.token_ids) == GREEDY.max_new_tokens


def told(encoded):
    """What a prefill could stumble over."""
    return frozenset(
        (field.name, *((part.dtype, part.device, part.dim()) for part in parts))
        for mm_item in encoded
        for field in fields(mm_item)
        for value in [getattr(mm_item, field.name)]
        for parts in [value if isinstance(value, tuple) else (value,)]
        if parts and all(isinstance(part, torch.Tensor) for part in parts)
    )


def scorers_there(stand_in, root):
    """Both scorers, loaded on the host and moved."""
    found = {}
    for kind, folder in ((ClipScorer, make_clip(root / "clip")), (ClipSegScorer, make_clipseg(root / "clipseg"))):
        scorer = kind(model_id=str(folder))
        loaded = found[scorer] = RelevanceModel(scorer, device=torch.device("cpu"), dtype=DTYPE)
        with stand_in:
            loaded._model, loaded._device = stand_in.to_device(loaded._model), DEVICE
            loaded._mean_311, loaded._std_311 = loaded._mean_311.to(DEVICE), loaded._std_311.to(DEVICE)
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_what_check_accepts_runs_there(name, tmp_path):
    there = OnDevice(name, str(make_folder(name, tmp_path / "model")))
    if name == WITH_SCORER:
        there.scorers = scorers_there(there.stand_in, tmp_path)
    with there.stand_in, there.stand_in.recorded() as work:
        prefilled, acted = [], 0
        for plan in there.plans(*IN_TOWER):
            requests = there.shown(plan)
            encoded = there.encode(requests, plan)
            if told(encoded) not in prefilled:
                prefilled.append(told(encoded))
                there.answer(requests, encoded, plan, DRAWN)
            acted += 1
        scored = there.encode(there.requests, plan_of(there.family, SETTINGS["illava"], "decoder_input"))
        for plan in there.plans(*IN_DECODER):
            there.answer(there.requests, scored, plan, {})
            acted += 1
    assert acted > 40
    assert len(prefilled) < 8
    assert {line.rpartition(" ")[2] for line in work.doubles} <= IN_DOUBLE, work.doubles
