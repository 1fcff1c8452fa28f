"""Tests the config fingerprint: which fields are declared, what ``auto`` becomes, which versions and weights enter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from pipeline.config import grammar, runtime, sampling, schema, tasks
from pipeline.config.schema import JobConfig, Section, result_fields
from pipeline.config.tasks import AskConfig
from pipeline.errors import ConfigError
from pipeline.runs.config_fingerprint import folder_digest, resolve_config_fingerprint, resolve_dtype
from tests.support.runs.run_folders import make_config


def sections(model):
    """Every section class reachable from a model, unions included."""
    seen, pending = set(), [model]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for info in current.model_fields.values():
            pending += [
                kind for kind in kinds_in(info.annotation) if isinstance(kind, type) and issubclass(kind, Section)
            ]
    return seen


def kinds_in(annotation):
    """An annotation's type and those within it."""
    return [annotation, *(kind for one in getattr(annotation, "__args__", ()) for kind in kinds_in(one))]


def test_every_config_field_says_what_it_affects():
    reachable = sections(JobConfig)
    found = (kind for module in (schema, tasks, sampling, grammar, runtime) for kind in vars(module).values())
    declared = {kind for kind in found if isinstance(kind, type) and issubclass(kind, Section)} - {Section, AskConfig}
    assert reachable == declared  # the walk sees every section there is
    undeclared = [
        f"{model.__name__}.{name}"
        for model in reachable
        for name, info in model.model_fields.items()
        if (info.json_schema_extra or {}).get("affects") not in {"rows", "execution"}
    ]
    assert undeclared == []


def test_an_undeclared_field_is_noticed():
    class Careless(Section):
        forgotten: int = 3

    info = Careless.model_fields["forgotten"]
    assert (info.json_schema_extra or {}).get("affects") is None


def test_a_rows_field_is_never_hidden_below_an_execution_section():
    for model in sections(JobConfig):
        for name, info in model.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
                below = sections(info.annotation)
                affected = {i.json_schema_extra["affects"] for m in below for i in m.model_fields.values()}
                if info.json_schema_extra["affects"] == "execution":
                    assert affected == {"execution"}, name


@pytest.mark.parametrize(
    ("declared", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "bfloat16"),
        ({"dtype": None, "text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
    ],
    ids=str,
)
def test_dtype_auto_is_the_checkpoints_on_a_gpu(model_folder, declared, dtype):
    (model_folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"} | declared))
    auto = make_config(model_folder, model={"device": "cuda"})
    assert resolve_dtype(auto) == dtype
    explicit = make_config(model_folder, model={"device": "cpu", "dtype": dtype})
    assert resolve_config_fingerprint(auto).digest == resolve_config_fingerprint(explicit).digest


def test_a_fingerprint_holds_the_row_keys_the_weights_and_the_versions_and_nothing_else(model_folder):
    config = make_config(model_folder, model={"dtype": "float32"})
    fields = resolve_config_fingerprint(config).fields
    others = {key for key in fields if key != "model.files" and not key.startswith("versions.")}
    assert others == result_fields(config).keys()
    assert others >= {"seed", "model.dtype", "reduction", "task.prompt", "media.num_frames", "sampling.temperature"}
    assert not {"schema_version", "model.device", "attention_backend", "kernels"} & fields.keys()
    on_gpu = {"executor": "ray", "gpus_per_actor": 1}
    assert (
        resolve_config_fingerprint(make_config(model_folder, model={"dtype": "float32"}, runtime=on_gpu)).fields
        == fields
    )


def test_what_is_off_or_can_never_happen_does_not_enter_the_fingerprint(model_folder):
    def keys(**sampling):
        fields = resolve_config_fingerprint(make_config(model_folder, sampling=sampling)).fields
        return {key.removeprefix("sampling.") for key in fields if key.startswith("sampling.")}

    before = {"max_new_tokens", "temperature", "top_p"}
    assert keys() == keys(max_new_tokens=255, on_loop="cut") == keys(max_new_tokens=999, loop_tokens=None) == before
    assert keys(max_new_tokens=256) == before | {"loop_tokens"}
    assert keys(max_new_tokens=256, on_loop="cut") == before | {"loop_tokens", "on_loop"}
    assert keys(top_k=3, stop=["."], logprobs=True) == before | {"top_k", "stop", "logprobs"}
    assert keys(presence_penalty=0.0) == before | {"presence_penalty"}


def test_versions_and_weights_enter_the_fingerprint(model_folder, monkeypatch):
    from pipeline.runs import config_fingerprint

    base = resolve_config_fingerprint(make_config(model_folder))
    assert {"versions.torch", "versions.transformers", "versions.pillow", "versions.av"} <= set(base.fields)
    assert "versions.illava" not in base.fields
    digests = {base.digest}
    monkeypatch.setattr(config_fingerprint, "_version", lambda name: "0" if name == "torch" else "1")
    digests.add(resolve_config_fingerprint(make_config(model_folder)).digest)
    monkeypatch.undo()
    (model_folder / "model.safetensors").write_bytes(b"Weights")
    digests.add(resolve_config_fingerprint(make_config(model_folder)).digest)
    assert len(digests) == 3


def test_a_hub_model_needs_its_revision():
    with pytest.raises(ConfigError, match=r"needs model\.revision"):
        resolve_config_fingerprint(make_config("org/model"))


def test_folder_digest_follows_names_and_bytes(model_folder):
    base = folder_digest(str(model_folder))
    (model_folder / "README.md").write_text("not a weight")
    (model_folder / ".cache").mkdir()
    (model_folder / ".cache" / "x").write_text("hidden")
    assert folder_digest(str(model_folder)) == base
    (model_folder / "config.json").rename(model_folder / "other.json")
    assert folder_digest(str(model_folder)) != base


def test_a_settled_file_is_hashed_once_and_a_changed_one_again(model_folder, monkeypatch):
    import hashlib

    weights = model_folder / "model.safetensors"
    long_ago = time.time() - 3600
    for path in model_folder.iterdir():
        os.utime(path, (long_ago, long_ago))
    base = folder_digest(str(model_folder))
    read = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or original(file, kind))
    assert folder_digest(str(model_folder)) == base
    assert read == []
    weights.write_bytes(b"changed")
    assert folder_digest(str(model_folder)) != base
    assert read == [str(weights)]


def test_a_just_written_file_is_never_remembered(model_folder):
    weights, long_ago = model_folder / "model.safetensors", time.time() - 3600
    os.utime(model_folder / "config.json", (long_ago, long_ago))
    found = weights.stat()
    base = folder_digest(str(model_folder))
    weights.write_bytes(b"WEIGHTS")  # same size
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))  # a coarse clock would show no change
    assert folder_digest(str(model_folder)) != base


def test_fingerprint_and_planning_load_neither_torch_nor_ray(tmp_path, model_folder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"x")
    script = (
        "import sys; from tests.support.runs.run_folders import make_config; from pipeline.runs.run import plan_run\n"
        f"run = plan_run(make_config({str(model_folder)!r}, input={{'uri': {str(tmp_path / 'in')!r}}}, "
        f"output={{'uri': {str(tmp_path / 'out')!r}}}))\n"
        "assert run.num_shards == 1\n"
        "print([m for m in ('torch', 'ray', 'decord', 'av', 'transformers') if m in sys.modules])"
    )
    here = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": here},
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert not (tmp_path / "out").exists()


def test_sections_are_models():
    assert issubclass(Section, BaseModel)


@pytest.mark.parametrize(("metric", "number"), [("yes_no", 1), ("mme", None), ("auto", None), (None, None)])
def test_a_change_of_one_kind_of_job_orphans_no_other(config, metric, number):
    job = config()
    if metric:
        job = job.model_copy(update={"task": tasks.QuestionConfig(metric=metric)})
    assert resolve_config_fingerprint(job).fields.get("behaviour.yes_no") == number
