"""Loading keeps one copy of the weights on the host, and gives the numbers that transformers' own loading gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from illava.families.loading import load_weights
from tests.support.models.families import MAKERS, stock_class
from tests.support.models.llava_next import make_llava_next

MIB = 2**20
SHARD_BYTES = 80 * MIB

# VmHWM and not ru_maxrss: the latter starts at the peak of the process that forked this one.
MEASURE = """
import sys
import torch
from illava.families import load_family

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))

tiny, folder, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
load_family(tiny, dtype=dtype, device="cpu")  # all that is imported on the way
before = kib("VmRSS")
decoder = load_family(folder, dtype=dtype, device="cpu").decoder
loaded = kib("VmHWM")
for layer in decoder.layers:
    for weight in layer.parameters():
        assert weight.dtype == dtype and weight.device.type == "cpu"
        assert (weight.view(-1)[::64] == 0.125).all()  # reads every page
print((loaded - before) * 1024, (kib("VmHWM") - before) * 1024)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_llava_next(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A checkpoint of two wide layers, some 430 MiB of float32 in nine shards or so; and the bytes of its weights."""
    folder = make_llava_next(tmp_path_factory.mktemp("wide"))
    config = transformers.LlavaNextConfig.from_pretrained(folder)
    shape = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 2, "head_dim": 128}
    for name, value in (shape | {"num_attention_heads": 16, "num_key_value_heads": 16}).items():
        setattr(config.text_config, name, value)
    with torch.device("meta"):
        model = transformers.LlavaNextForConditionalGeneration(config)
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(0.125)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    yield folder, sum(weight.nbytes for weight in model.parameters())
    for shard in folder.glob("*.safetensors"):  # pytest keeps three runs
        shard.unlink()


def peaks(tiny, folder, dtype: str) -> list[int]:
    """Bytes of resident memory beyond what stood before: at most while loading, at most after reading it all."""
    command = [sys.executable, "-c", MEASURE, str(tiny), str(folder), dtype]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert run.returncode == 0, run.stderr
    return [int(word) for word in run.stdout.split()]


def test_weights_of_the_files_own_dtype_stand_in_memory_once(tiny, wide):
    folder, weight_bytes = wide
    assert len(list(folder.glob("*.safetensors"))) >= 8
    loading, reading = peaks(tiny, folder, "float32")
    assert loading < 0.2 * weight_bytes  # mapped: a device's memory would be filled from here, page by page
    assert 0.9 * weight_bytes < reading < 1.35 * weight_bytes


@pytest.mark.long
def test_converted_weights_stand_in_memory_once_and_a_shard_of_the_others(tiny, wide):
    folder, weight_bytes = wide
    loading, _ = peaks(tiny, folder, "bfloat16")
    assert 0.5 * weight_bytes < loading < 0.5 * weight_bytes + 2 * SHARD_BYTES


@pytest.mark.parametrize("name", MAKERS)
def test_same_bits_as_transformers_own_loading(name, tmp_path):
    tied = {"text": {"tie_word_embeddings": True}} if name == "llava_onevision" else {}
    model_class, folder = stock_class(name), MAKERS[name](tmp_path, **tied)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))  # the files are float32
    weights = load_file(folder / "model.safetensors")
    next(weight for key, weight in weights.items() if "proj.weight" in key).view(-1)[0] = 1e6  # no float16 holds it
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    same_bits(model_class, folder)

    mixed = {key: weight.half() if "norm" in key else weight for key, weight in weights.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    same_bits(model_class, folder)


def same_bits(model_class, folder):
    ours = load_weights(model_class, str(folder), revision=None, dtype=torch.bfloat16, device="cpu")
    stock = model_class.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for kind in ("named_parameters", "named_buffers"):
        got, want = dict(getattr(ours, kind)()), dict(getattr(stock, kind)())
        assert got.keys() == want.keys()  # a tied weight counts once
        for key, tensor in want.items():
            assert got[key].dtype == tensor.dtype, key
            assert torch.equal(got[key], tensor), key
    assert any(buffer.dtype == torch.float32 for buffer in ours.buffers())  # rotary frequencies
