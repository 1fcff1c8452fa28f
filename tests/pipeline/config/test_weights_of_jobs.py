"""A job's adapter and quantisation: part of its fingerprint, given to the model, or refused before anything is made."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest
import yaml
from PIL import Image

from pipeline.cli import run_cli
from pipeline.config.preflight import preflight
from pipeline.execution.worker import load_vlm
from pipeline.runs.config_fingerprint import resolve_config_fingerprint
from tests.support.media.clips import barcode_frame
from tests.support.models.lora import make_lora
from tests.support.models.published_llava import edit
from tests.support.models.quantised_models import make_quantised
from tests.support.runs.fakes import job_config


@pytest.fixture(scope="module")
def adapter(onevision_folder, tmp_path_factory):
    return make_lora(onevision_folder, tmp_path_factory.mktemp("lora"), "llava_onevision", r".*language_model.*v_proj")


@pytest.fixture
def make(tmp_path, onevision_folder):
    """A job over one picture, with these keys of `model`."""
    Image.fromarray(barcode_frame(0, width=120, height=80)).save(tmp_path / "0.png")

    def made(**model):
        keys = {"model_id": str(onevision_folder), "dtype": "float32", "kv_cache_bytes": 1 << 20} | model
        source = {"uri": str(tmp_path), "pattern": "*.png"}
        return job_config(tmp_path / "out", source, model=keys, sampling={"max_new_tokens": 2})

    return made


def test_a_job_gives_both_to_its_model(make, adapter):
    vlm = load_vlm(make(quantization="int8", adapter={"id": str(adapter), "merge": False}))
    assert vlm.backends["weights"] == "int8 by torchao, computed in float32, with an adapter beside them"


def test_the_fingerprint_has_them_where_they_are_set_and_an_adapters_content(make, adapter, tmp_path):
    plain = resolve_config_fingerprint(make()).fields
    assert not [
        key
        for key in plain
        if "adapter" in key or "quantization" in key or key in ("versions.peft", "versions.torchao")
    ]
    own = shutil.copytree(adapter, tmp_path / "adapter")
    fields = resolve_config_fingerprint(make(quantization="int8", adapter={"id": str(own)})).fields
    changed = {key: value for key, value in fields.items() if plain.get(key, "absent") != value}
    keys = {
        f"model.{key}"
        for key in ("quantization", *(f"adapter.{part}" for part in ("id", "revision", "merge", "files")))
    }
    assert changed.keys() == keys | {"versions.peft", "versions.torchao"}
    with open(own / "adapter_model.safetensors", "ab") as file:
        file.write(b" ")
    assert (
        resolve_config_fingerprint(make(adapter={"id": str(own)})).fields["model.adapter.files"]
        != fields["model.adapter.files"]
    )


def test_memory_is_counted_for_the_scheme(make, onevision_folder, tmp_path):
    plain = preflight(make(), "float32")
    int8 = preflight(make(quantization="int8"), "float32")
    saved = 3 * plain.weights.linear_values - 4 * plain.weights.linear_rows
    assert plain.weights_bytes - int8.weights_bytes == saved > 0
    fp8 = make_quantised(onevision_folder, tmp_path / "fp8", "fp8")  # dequantised on this CPU
    assert preflight(make(model_id=str(fp8)), "float32").weights_bytes == plain.weights_bytes


@pytest.fixture(scope="module")
def places(adapter, onevision_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    edit(shutil.copytree(adapter, root / "other") / "adapter_config.json", peft_type="IA3")
    return {"adapter": adapter, "fp8": make_quantised(onevision_folder, root / "fp8", "fp8"), "other": root / "other"}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"adapter": {"id": "org/adapter"}}, "a hub id needs model.adapter.revision"),
        ({"adapter": {"id": "{adapter}"}, "model_id": "{fp8}"}, "model.adapter wants the unquantised checkpoint"),
        ({"quantization": "int4", "model_id": "{fp8}"}, "model.quantization int4 wants the unquantised checkpoint"),
        ({"adapter": {"id": "{other}"}}, "of the kind IA3; only LORA is built"),
        ({"quantization": "float8"}, "needs torchao"),
    ],
)
def test_what_cannot_be_had_ends_with_2_before_anything_is_made(
    make, places, tmp_path, monkeypatch, capsys, *, model, words
):
    if "torchao" in words:
        monkeypatch.setitem(sys.modules, "torchao", None)
    filled = json.loads(re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]), json.dumps(model)))
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(make(**filled).model_dump(mode="json")))
    assert run_cli("job", ["--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "defect" not in said
    assert not (tmp_path / "out").exists()
