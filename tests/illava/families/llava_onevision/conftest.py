"""The tiny LLaVA-OneVision: its stock model, the family, its preprocessor, and all three at a budget of one tile."""

import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from illava.families import load_family, load_preprocessor
from tests.support.models.onevision import make_onevision


@pytest.fixture(scope="module")
def stock(onevision_folder):
    return LlavaOnevisionForConditionalGeneration.from_pretrained(onevision_folder).eval()


@pytest.fixture(scope="module")
def family(onevision_folder):
    return load_family(str(onevision_folder), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def preprocessor(onevision_folder):
    return load_preprocessor(str(onevision_folder))


@pytest.fixture(scope="module")
def tight(tmp_path_factory):
    """Stock, family and preprocessor of a model whose budget of one tile makes every larger image be resized."""
    folder = str(make_onevision(tmp_path_factory.mktemp("tight"), max_tiles=1))
    stock = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    return stock, load_family(folder, dtype=torch.float32, device="cpu"), load_preprocessor(folder)
