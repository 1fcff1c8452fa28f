"""Tests ``model.dtype: auto`` on CPU: chosen once a run by the processor's features, and kept on any other."""

from __future__ import annotations

import json

import pytest

from illava import devices
from illava.devices import has_native_bfloat16
from illava.errors import DeviceError
from pipeline.execution.executors import placed_run
from pipeline.planning.model_fit import model_fit
from pipeline.runs.config_fingerprint import resolve_dtype
from pipeline.runs.run import open_run, plan_run
from pipeline.runs.run_record import read_run_file
from pipeline.storage import storage
from tests.support.processors import pretend_processor
from tests.support.runs.run_folders import complete, make_config, put_media

CHOSEN = {True: "bfloat16", False: "float32"}


@pytest.fixture
def processor(monkeypatch, tmp_path):
    def become(native: bool) -> None:
        pretend_processor(monkeypatch, tmp_path, native_bfloat16=native)

    return become


@pytest.fixture
def config(model_folder, root):
    put_media(storage.join(root, "in"), 10)
    places = {"input": {"uri": storage.join(root, "in")}, "output": {"uri": storage.join(root, "out")}}
    return lambda **model: make_config(
        model_folder, model={"device": "cpu"} | model, runtime={"executor": "local"}, **places
    )


@pytest.mark.parametrize("declared", ["float32", "bfloat16", "float16", None])
@pytest.mark.parametrize("native", [True, False])
def test_on_cpu_the_processor_decides_whatever_the_checkpoint(model_folder, processor, config, native, declared):
    (model_folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "dtype": declared}))
    processor(native)
    assert resolve_dtype(config()) == CHOSEN[native]
    assert resolve_dtype(config(dtype="float16")) == "float16", "a dtype that is named is what it is"


@pytest.mark.parametrize("native", [True, False])
def test_a_run_keeps_its_dtype_on_an_unlike_machine_and_for_all_actors(processor, config, native):
    processor(native)
    opened = open_run(config())
    assert read_run_file(opened.uri)["recipe"]["model.dtype"] == CHOSEN[native]
    complete(opened, shards=[0])
    processor(not native)
    assert resolve_dtype(config()) == CHOSEN[not native], "a new run would take the other"
    for run in (opened, open_run(config())):  # one driver that goes on, and one that resumes elsewhere
        assert run.fingerprint == opened.fingerprint
        with placed_run(run, debug=False) as (for_actors, _):
            assert (for_actors.model.dtype, resolve_dtype(for_actors)) == (CHOSEN[native], CHOSEN[native])
    assert read_run_file(opened.uri)["recipe"]["model.dtype"] == CHOSEN[native]


@pytest.mark.parametrize("native", [True, False])
def test_a_dry_run_says_what_auto_takes_and_that_it_stays(onevision_folder, processor, config, native):
    processor(native)
    says = dict(model_fit(plan_run(config(model_id=str(onevision_folder)))))["device"]
    no = "" if native else "no "
    assert says.startswith(f"cpu, {CHOSEN[native]} (auto: the processor here has {no}native bfloat16 products")
    named = dict(model_fit(plan_run(config(model_id=str(onevision_folder), dtype="float32"))))["device"]
    assert named == "cpu, float32"


def test_the_variable_says_it_for_unlike_workers_and_is_refused_in_other_words(processor, monkeypatch):
    processor(False)
    monkeypatch.setenv("ILLAVA_NATIVE_BFLOAT16", "1")
    assert has_native_bfloat16()
    has_native_bfloat16.cache_clear()
    monkeypatch.setenv("ILLAVA_NATIVE_BFLOAT16", "yes")
    with pytest.raises(DeviceError, match="'yes' is neither 0 nor 1; unset it"):
        has_native_bfloat16()


def test_a_machine_that_says_nothing_of_its_processor_has_none(processor, monkeypatch, tmp_path):
    processor(True)
    monkeypatch.setattr(devices, "_CPUINFO", str(tmp_path / "missing"))
    assert not has_native_bfloat16()
