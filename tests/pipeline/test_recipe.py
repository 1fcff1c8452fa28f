"""The recipe: every field that can change a row changes it, and none that cannot."""

import os
import subprocess
import sys
import time

import pytest
from pydantic import BaseModel
from runs import make_config

from pipeline import config as config_module
from pipeline.config import JobConfig, Section, recipe_fields
from pipeline.errors import ConfigError
from pipeline.file_hashes import folder_digest
from pipeline.recipe import resolve_device, resolve_dtype, resolve_recipe

# One other valid value for each field that can change a row; a new field must be added here.
OTHER_VALUES = {
    "seed": 1,
    "media.num_frames": 8,
    "media.frame_sampling.kind": "keyframe",
    "media.decoder": "pyav",
    "media.ranged_reads": "off",
    "media.max_bytes": 10,
    "media.max_pixels_per_frame": 10,
    "media.max_duration_s": 10.0,
    "media.max_images": 3,
    "media.max_pages": 3,
    "media.page_dpi": 72,
    "model.model_id": "org/model",
    "model.revision": "0" * 40,
    "model.dtype": "bfloat16",
    "model.device": "cuda",
    "reduction": {"preset": "illava-video"},
    "task.prompt": "Other.",
    "sampling.max_new_tokens": 5,
    "sampling.temperature": 0.5,
    "sampling.top_p": 0.5,
}
CONSTANT = {"task.kind"}  # never changes alone: `test_answer_questions.py` changes the whole task
EXECUTION_ONLY = {
    "name": "other",
    "input.pattern": "**/*.mp4",
    "media.load_timeout_s": 1.0,
    "media.verify_md5": "off",
    "model.kv_cache_bytes": 10,
    "model.max_batch_requests": 2,
    "runtime.executor": "ray",
    "runtime.num_vlm_actors": {"min": 2, "max": 3},
    "runtime.cpus_per_actor": 2.0,
    "runtime.num_reader_actors": 9,
    "runtime.max_inflight_bytes": 9,
    "runtime.max_attempts": 9,
    "runtime.item_timeout_s": 9.0,
    "runtime.max_open_shards": 9,
    "runtime.cache_dir": "/tmp/x",
    "runtime.cache_bytes": 9,
    "prices.gpu_hour_usd": 3.0,
    "prices.cpu_hour_usd": 3.0,
    "prices.storage_request_usd": 3.0,
    "output.compression": "none",
}
# Decided by other means: by the items themselves, by where the run is, by what ``model.device: auto`` becomes.
OTHERWISE = {
    *("input.uri", "input.manifest", "input.limit", "input.skip_done_in"),
    *("output.uri", "output.items_per_shard", "runtime.gpus_per_actor"),
}


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def sections(model):
    """Every section class reachable from a model, unions included."""
    seen, pending = set(), [model]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        for info in current.model_fields.values():
            kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
            pending += [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
    return seen


def test_every_config_field_says_what_it_affects():
    reachable = sections(JobConfig)
    declared = {k for k in vars(config_module).values() if isinstance(k, type) and issubclass(k, Section)} - {Section}
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


def test_the_table_of_other_values_is_complete(model_folder):
    assert set(recipe_fields(make_config(model_folder))) == OTHER_VALUES.keys() | CONSTANT


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_every_rows_field_changes_the_recipe(model_folder, key):
    base = resolve_recipe(make_config(model_folder))
    changes = nested(key, OTHER_VALUES[key])
    if key == "model.model_id":
        changes["model"]["revision"] = "1" * 40
    changed = resolve_recipe(make_config(model_folder, **changes))
    assert changed.digest != base.digest
    assert changed.fields[key] != base.fields[key]


def test_fields_of_another_kind_of_sampling_count_too(model_folder):
    digests = {
        resolve_recipe(make_config(model_folder, media={"frame_sampling": {"kind": "fps", "fps": fps}})).digest
        for fps in (1.0, 2.0)
    }
    assert len(digests) == 2


def test_the_table_of_execution_fields_is_complete():
    keys = {"name"}
    for section, info in JobConfig.model_fields.items():
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        for kind in (k for k in kinds if isinstance(k, type) and issubclass(k, Section)):
            for name, field in kind.model_fields.items():
                if (field.json_schema_extra or {}).get("affects") == "execution":
                    keys.add(f"{section}.{name}")
    assert keys == EXECUTION_ONLY.keys() | OTHERWISE


@pytest.mark.parametrize("key", EXECUTION_ONLY)
def test_no_execution_field_changes_the_recipe(model_folder, key):
    base = make_config(model_folder)
    changed = make_config(model_folder, **nested(key, EXECUTION_ONLY[key]))
    assert changed != base
    assert resolve_recipe(changed).digest == resolve_recipe(base).digest


def test_auto_is_resolved_before_it_is_digested(model_folder):
    on_ray = {"executor": "ray", "gpus_per_actor": 1}
    assert resolve_device(make_config(model_folder, runtime=on_ray)) == "cuda"
    assert resolve_dtype(make_config(model_folder, runtime=on_ray)) == "bfloat16"
    assert resolve_device(make_config(model_folder, runtime=on_ray | {"executor": "local"})) == "cpu"
    auto = make_config(model_folder)
    explicit = make_config(model_folder, model={"device": "cpu", "dtype": "float32"})
    assert resolve_recipe(auto).digest == resolve_recipe(explicit).digest
    fields = resolve_recipe(make_config(model_folder, runtime=on_ray)).fields
    assert (fields["model.device"], fields["attention_backend"]) == ("cuda", "varlen")


def test_versions_schema_and_weights_enter_the_recipe(model_folder, monkeypatch):
    from pipeline import recipe

    base = resolve_recipe(make_config(model_folder))
    assert {"versions.torch", "versions.transformers", "versions.illava", "versions.pillow", "versions.av"} <= set(
        base.fields
    )
    digests = {base.digest}
    monkeypatch.setattr(recipe, "SCHEMA_VERSION", 99)
    digests.add(resolve_recipe(make_config(model_folder)).digest)
    monkeypatch.undo()
    monkeypatch.setattr(recipe, "_version", lambda name: "0" if name == "torch" else "1")
    digests.add(resolve_recipe(make_config(model_folder)).digest)
    monkeypatch.undo()
    (model_folder / "model.safetensors").write_bytes(b"Weights")
    digests.add(resolve_recipe(make_config(model_folder)).digest)
    assert len(digests) == 4


def test_a_hub_model_needs_its_revision():
    with pytest.raises(ConfigError, match=r"needs model\.revision"):
        resolve_recipe(make_config("org/model"))


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


def test_recipe_and_planning_load_neither_torch_nor_ray(tmp_path, model_folder):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"x")
    script = (
        "import sys; from runs import make_config; from pipeline.shards import plan_run\n"
        f"run = plan_run(make_config({str(model_folder)!r}, input={{'uri': {str(tmp_path / 'in')!r}}}, "
        f"output={{'uri': {str(tmp_path / 'out')!r}}}))\n"
        "assert run.num_shards == 1\n"
        "print([m for m in ('torch', 'ray', 'decord', 'av', 'transformers') if m in sys.modules])"
    )
    here = os.path.dirname(__file__)
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
