"""A tiny Qwen model of every family, with its stock model and its preprocessor."""

import pytest
import torch

from illava import VLM, load_preprocessor
from tests.support.models.cells import family_params
from tests.support.models.families import QWEN, make_folder, stock_class


@pytest.fixture(scope="module", params=family_params(QWEN))
def loaded(request, tmp_path_factory):
    folder = make_folder(request.param, tmp_path_factory.mktemp(request.param))
    stock = stock_class(request.param).from_pretrained(folder, dtype=torch.float32).eval()
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
