"""A tiny Qwen model of every family, with its stock twin and its preprocessor."""

import pytest
import torch
import transformers

from illava import VLM, load_preprocessor
from tests.support.models.qwen import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    make, stock_class = FAMILIES[request.param]
    folder = make(tmp_path_factory.mktemp(request.param))
    stock = getattr(transformers, stock_class).from_pretrained(folder, dtype=torch.float32).eval()
    return VLM.from_pretrained(str(folder), kv_cache_bytes=8 << 20), stock, load_preprocessor(str(folder))


@pytest.fixture(scope="module")
def vlm(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def stock(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def pre(loaded):
    return loaded[2]
