"""Several actors of a node load one set of files: fetched once, and held in the host's memory once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from tests.support.models.llava_next import make_llava_next
from tests.support.stores.hub import COMMIT, model_hub

NUM_ACTORS = 4
LOAD = """
import sys
import torch
from illava.families import load_family

tiny, repo, commit = sys.argv[1:]
load_family(tiny, dtype=torch.float32, device="cpu")  # all that is imported on the way
print("imported", flush=True)
sys.stdin.readline()
layers = load_family(repo, revision=commit, dtype=torch.float32, device="cpu").decoder.layers
assert all((weight.view(-1)[::64] == 0.125).all() for weight in layers.parameters())  # reads every page
print("loaded", flush=True)
sys.stdin.readline()
""".replace("layers.parameters()", "(p for layer in layers for p in layer.parameters())")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_llava_next(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def wide(tmp_path):
    """A checkpoint of two wide layers, some 215 MB of float32; and the bytes of its layers."""
    folder = make_llava_next(tmp_path / "wide")
    config = LlavaNextConfig.from_pretrained(folder)
    shape = {"hidden_size": 1536, "intermediate_size": 3840, "num_hidden_layers": 2, "head_dim": 128}
    for name, value in (shape | {"num_attention_heads": 12, "num_key_value_heads": 12}).items():
        setattr(config.text_config, name, value)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(config)
    weights = {name: torch.full(weight.shape, 0.125) for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    yield folder, sum(weight.nbytes for weight in model.model.language_model.layers.parameters())
    (folder / "model.safetensors").unlink()  # pytest keeps three runs


def shared_bytes(processes) -> int:
    """Memory of all of them, a page that several map counted once."""
    total = 0
    for process in processes:
        with open(f"/proc/{process.pid}/smaps_rollup") as lines:
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024


def told(processes, word: str) -> None:
    for process in processes:
        line = process.stdout.readline().strip()
        assert line == word, process.communicate()[1]


def go_on(processes) -> None:
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.mark.long
def test_four_actors_fetch_a_checkpoint_once_and_hold_it_once(tiny, wide, tmp_path):
    folder, layer_bytes = wide
    with model_hub(folder, "org/wide", num_clients=NUM_ACTORS) as (endpoint, hub):
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", LOAD, str(tiny), "org/wide", COMMIT]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [subprocess.Popen(command, env=os.environ | own, **pipes) for _ in range(NUM_ACTORS)]
        try:
            told(processes, "imported")
            before = shared_bytes(processes)
            go_on(processes)
            told(processes, "loaded")
            after = shared_bytes(processes)
            go_on(processes)
            assert [process.wait(timeout=60) for process in processes] == [0] * NUM_ACTORS
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    assert hub.requests["HEAD", "model.safetensors"] >= NUM_ACTORS
    assert hub.requests["GET", "model.safetensors"] == 1
    assert 0.9 * layer_bytes < after - before < 2 * layer_bytes  # 1.06 was seen; four copies would be four
