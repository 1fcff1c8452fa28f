"""The registry of families: every part of a spec stands, and a model of no family is refused by its type.

About 8 s of `make test`, most of it imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from illava import VLM
from illava.errors import ModelLoadError, PlanError
from illava.families import FAMILIES, load_family, load_part, load_preprocessor, require_supported
from illava.families.base import Family
from illava.families.model_shape import check_plan, load_model_shape
from illava.families.text_scorer import RelevanceModel
from illava.plan import ReductionPlan, preset
from illava.presets import PRESETS
from illava.reducers.base import ClipScorer
from tests.support.models.families import MAKERS, make_folder, stock_class

ROOT = Path(__file__).resolve().parents[3]


def test_every_registered_family_has_a_maker_of_a_tiny_model():
    """Matrix, media stage, unmerging and FLOPs run over these: see `tests/support/models/families.py`."""
    assert set(MAKERS) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_part_of_a_spec_serves_its_family(model_type, tmp_path):
    spec, folder = FAMILIES[model_type], str(make_folder(model_type, tmp_path))
    assert spec.model_type == model_type == stock_class(model_type).config_class.model_type
    assert issubclass(load_part(spec.family), Family)
    family, shape = load_family(folder, dtype=torch.float32, device="cpu"), load_model_shape(folder)
    assert (family.model_type, load_preprocessor(folder).model_type) == (model_type, model_type)
    assert load_preprocessor(folder) == family.preprocessor
    assert shape.geometry == family.preprocessor.geometry
    assert (shape.num_vision_blocks, shape.num_decoder_layers) == (family.num_vision_blocks, family.decoder.num_layers)
    refused = 0
    for plan in [*map(preset, PRESETS), *map(_vision_step, range(9)), *map(_decoder_step, range(1, 9))]:
        of_weights = _said(family.check, plan)
        assert _said(check_plan, plan, folder) == of_weights, "the dry run says what the loaded model would say"
        refused += of_weights is not None
    assert 0 < refused < len(PRESETS) + 17


def _vision_step(block: int) -> ReductionPlan:
    keep = {"kind": "illava", "keep_ratio": 0.5}
    return ReductionPlan.model_validate({"steps": [{"stage": "vision_block", "layers": [block], "reducer": keep}]})


def _decoder_step(layer: int) -> ReductionPlan:
    keep = {"kind": "fastv", "keep_ratio": 0.5}
    return ReductionPlan.model_validate({"steps": [{"stage": "decoder_layer", "layers": [layer], "reducer": keep}]})


def _said(check, *arguments) -> str | None:
    try:
        check(*arguments)
    except PlanError as error:
        return str(error)
    return None


def test_what_readers_and_plans_need_of_a_family_imports_no_torch(tmp_path):
    folders = [str(make_folder(model_type, tmp_path / model_type)) for model_type in FAMILIES]
    code = (
        "import sys\nfrom illava.families import load_preprocessor, require_supported\n"
        "from illava.families.model_shape import check_plan, load_model_shape\nfrom illava.plan import EMPTY_PLAN\n"
        f"for folder in {folders}:\n"
        "    require_supported(folder), load_preprocessor(folder), load_model_shape(folder)\n"
        "    check_plan(EMPTY_PLAN, folder)\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_presets_are_shipped_and_a_configuration_of_the_family_takes_one(model_type):
    presets = FAMILIES[model_type].presets
    assert all(preset(name).steps for name in presets)
    configs = [yaml.safe_load(path.read_text()) for path in (ROOT / "configs").glob(f"caption_*_{model_type}.yaml")]
    assert {config["reduction"]["preset"] for config in configs} == set(presets)
    block = (ROOT / "docs" / "choose-a-model.md").read_text()
    assert all(f"`{name}`" in block for name in presets)


def read_family(folder: str) -> None:
    load_family(folder, dtype=torch.float32, device="cpu")


READERS = (read_family, VLM.from_pretrained, load_preprocessor, load_model_shape, require_supported)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("model_type", ["llama", "smolvlm", ["qwen2_vl"], None])
def test_a_model_of_no_family_is_refused_by_its_type_not_by_what_its_folder_lacks(tmp_path, read, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelLoadError, match=r"not supported .*config\.json") as refusal:
        read(str(tmp_path))
    said = str(refusal.value)
    assert repr(model_type) in said
    assert "not complete" not in said
    assert all(name in said for name in FAMILIES)


def test_a_text_scorer_of_another_kind_is_refused_by_its_type_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    scorer = ClipScorer(model_id=str(tmp_path))
    with pytest.raises(ModelLoadError, match="is a 'siglip' model; this method needs a 'clip' model"):
        RelevanceModel(scorer, device=torch.device("cpu"), dtype=torch.float32)


def test_a_supported_model_without_its_processor_is_not_complete(tmp_path):
    folder = make_folder("llava_next", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no preprocessor_config.json; the model folder is not complete"):
        load_preprocessor(str(folder))


@pytest.mark.parametrize("model_type", ["llava_next", "qwen2_vl"])
def test_a_configuration_that_transformers_cannot_read_is_refused_in_words(tmp_path, model_type):
    folder = make_folder(model_type, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = "wide"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=f"cannot load .* as {stock_class(model_type).__name__}"):
        read_family(str(folder))
