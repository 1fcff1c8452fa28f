"""Models that cannot be computed with: a job's command ends with 2 and words, before anything is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from illava.errors import ModelLoadError
from illava.families import load_preprocessor
from pipeline.__main__ import main
from pipeline.cli import run_cli
from pipeline.config.schema import ModelConfig
from pipeline.execution import runner
from pipeline.sweep.command import sweep_cli
from tests.support.media.clips import barcode_frame
from tests.support.models.published_llava import edit
from tests.support.models.quantised_models import PUBLISHED, int8, make_quantised, put_json, store_layers
from tests.support.runs.fakes import job_config


@pytest.fixture
def job(tmp_path, onevision_folder):
    """A job over one picture on a copy of the tiny model; the path of its YAML, the model's folder, the output's."""
    Image.fromarray(barcode_frame(0, width=120, height=80)).save(tmp_path / "0.png")
    model, out = shutil.copytree(onevision_folder, tmp_path / "model"), tmp_path / "out"
    source = {"uri": str(tmp_path), "pattern": "*.png"}
    config = job_config(out, source, model={"model_id": str(model)}, sampling={"max_new_tokens": 2})
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path), model, out


def refused(job: str, *flags: str, capsys) -> str:
    """What the command says on stderr."""
    assert run_cli("job", ["--config", job, *flags]) == 2
    said = capsys.readouterr().err
    assert "defect" not in said
    return said


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
@pytest.mark.parametrize("method", [*PUBLISHED, "sevenbit", "adapter"])
def test_quantised_models_and_adapters_end_with_2_before_anything_is_written(job, method, flags, capsys) -> None:
    path, model, out = job
    if method in PUBLISHED:
        shutil.move(model, plain := model.with_name("plain"))
        make_quantised(plain, model, method)
    elif method == "adapter":
        put_json(model, "adapter_config.json", {"base_model_name_or_path": "org/base"})
    else:
        edit(model / "config.json", quantization_config={"quant_method": method})
    said = refused(path, *flags, capsys=capsys)
    assert method in said
    assert (
        "name the base model in model.model_id" if method == "adapter" else "take the unquantised repository"
    ) in said
    assert not out.exists(), "another model may use this folder"


def test_a_quantised_model_of_the_hub_leaves_the_output_free(job, capsys, monkeypatch) -> None:
    """Its configuration is fetched before the run is begun; here the hub's answer is a folder."""
    path, model, out = job
    edit(model / "config.json", quantization_config={"quant_method": "awq"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(model))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    hub = ("--set", "model.model_id=org/model-AWQ", "--set", f"model.revision={'c' * 40}")
    for flags in ((), ("--dry-run",)):
        assert "quantised by awq" in refused(path, *hub, *flags, capsys=capsys)
    assert not out.exists()


def test_tensors_that_are_no_weights_end_a_job_with_2(job, capsys) -> None:
    path, model, _ = job
    store_layers(model, int8)
    assert "no plain floating-point weights" in refused(path, capsys=capsys)


def test_a_model_is_refused_before_its_gigabytes_are_hashed(job, capsys, monkeypatch) -> None:
    path, model, _ = job
    edit(model / "config.json", quantization_config={"quant_method": "awq"})
    monkeypatch.setattr("pipeline.runs.config_fingerprint.folder_digest", lambda _: pytest.fail("hashed"))
    refused(path, capsys=capsys)


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_a_model_of_no_family_ends_with_2_before_it_is_hashed_or_anything_is_written(
    job, flags, capsys, monkeypatch
) -> None:
    path, model, out = job
    edit(model / "config.json", model_type="mistral")
    (model / "preprocessor_config.json").unlink()  # of which a text model has none
    monkeypatch.setattr("pipeline.runs.config_fingerprint.folder_digest", lambda _: pytest.fail("hashed"))
    said = refused(path, *flags, capsys=capsys)
    assert "is a 'mistral' model, which is not supported" in said
    assert "llava_onevision, qwen2_5_vl" in said
    assert "not complete" not in said
    assert not out.exists()


def test_a_sweep_and_its_plan_end_with_2(job, tmp_path, capsys) -> None:
    _, model, _ = job
    edit(model / "config.json", quantization_config={"quant_method": "gptq"})
    root = Path(runner.__file__).parents[2]
    sweep = yaml.safe_load((root / "configs" / "sweep_demo.yaml").read_text())
    for one in sweep["models"].values():
        one["model_id"] = str(model)
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    for flags in ((), ("--dry-run",)):
        assert sweep_cli("sweep", ["--config", str(path), *flags]) == 2
        said = capsys.readouterr().err
        assert "quantised by gptq" in said
        assert "defect" not in said


@pytest.mark.parametrize("declared", [None, "idefics3", "llava_qwen"])
def test_a_model_of_no_supported_family_is_told_by_its_model_type(job, declared, capsys) -> None:
    path, model, out = job
    (model / "preprocessor_config.json").unlink()  # a folder of another family lacks other files, too
    config = json.loads((model / "config.json").read_text())
    del config["model_type"]
    (model / "config.json").write_text(json.dumps(config | ({"model_type": declared} if declared else {})))
    for flags in ((), ("--dry-run",)):
        said = refused(path, *flags, capsys=capsys)
        if isinstance(declared, str):
            assert f"is a '{declared}' model, which is not supported" in said
        else:
            assert "names no model_type, so its family is not known" in said
        assert "Supported are: " in said
        assert "complete" not in said
    assert not out.exists()


def test_a_revision_beside_a_folder_is_refused_where_a_run_begins_and_lives_on_in_earlier_runs(
    job, capsys, monkeypatch
) -> None:
    path, model, out = job
    hub = ("--set", f"model.revision={'c' * 40}")
    for flags in ((), ("--dry-run",)):
        said = refused(path, *hub, *flags, capsys=capsys)
        assert f"model.revision: {'c' * 40} is a commit of the hub, but {model} is a folder here" in said
        assert "--set model.revision=null" in said
        assert not out.exists()
    beside = ("--set", f"model.adapter={{id: {model}, revision: {'d' * 40}}}")
    assert f"model.adapter.revision: {'d' * 40} is a commit" in refused(path, *beside, capsys=capsys)
    with monkeypatch.context() as earlier:  # as a version did that knew nothing of it
        earlier.setattr(ModelConfig, "false_revisions", ())
        assert run_cli("job", ["--config", path, *hub]) == 0
    assert run_cli("job", ["--config", path, *hub]) == 0
    assert main(["report", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert "all invariants hold" in capsys.readouterr().out
    with pytest.raises(ModelLoadError, match="is a folder here, and revision 'main' would be one of the hub"):
        load_preprocessor(str(model), revision="main")
