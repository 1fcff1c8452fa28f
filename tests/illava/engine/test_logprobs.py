"""Log-probabilities of drawn tokens: the model's own, for who asked, at no other's expense."""

from dataclasses import replace

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from illava import VLM, Request, SamplingParams
from tests.support.closeness import assert_close

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_are_the_models_own_and_change_nobodys_answer(onevision_folder, temperature):
    vlm = VLM.from_pretrained(str(onevision_folder), kv_cache_bytes=8 << 20)
    told = SamplingParams(7, temperature=temperature, top_p=0.8, min_new_tokens=7, logprobs=True)
    words = {"a": "What is it, then?", "b": "Say it again.", "c": "No."}
    requests = [Request(name, (said,), replace(told, logprobs=name != "b")) for name, said in words.items()]
    silent = vlm.generate([replace(r, sampling=replace(told, logprobs=False)) for r in requests])
    spoken = vlm.generate(requests)
    assert [g.token_ids for g in spoken] == [g.token_ids for g in silent]
    assert [g.token_logprobs is None for g in spoken] == [False, True, False]
    assert [g.token_logprobs for g in silent] == [None] * 3
    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(onevision_folder).eval()
    for request, generation in zip(requests, spoken, strict=True):
        if generation.token_logprobs is None:
            continue
        prompt, answer = vlm.family.render(request.content, []).token_ids, generation.token_ids
        with torch.inference_mode():
            logits = stock(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert_close(torch.tensor(generation.token_logprobs), expected)
