"""A reducer of another installed package: found by its entry point, run, and named in the run by version. About 4 s."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from illava.plan import ReductionPlan
from pipeline.__main__ import main
from pipeline.config.load import load_config
from pipeline.execution.runner import run_job
from tests.support.docs_pages import ROOT, blocks
from tests.support.runs.fakes import job_config

KIND = "largest_norm"
STEP = {"stage": "decoder_input", "reducer": {"kind": KIND, "keep_ratio": 0.5}}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Installs docs/extend.md's own example as a package of a version; returns a function that does."""
    site = tmp_path / "site"
    site.mkdir()
    (block,) = (one for one in blocks("python") if one.mark == "reducer")
    (site / "my_reducers.py").write_text(block.text)

    def install(version="1.2", entries=f"{KIND} = my_reducers:LargestNorm", name="my-reducers"):
        info = site / f"{name.replace('-', '_')}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[illava.reducers]\n{entries}\n")
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(str(site))
    yield install
    sys.modules.pop("my_reducers", None)


def test_a_plan_takes_the_kind_and_keeps_its_fields(package):
    package()
    plan = ReductionPlan.model_validate({"steps": [STEP]})
    reducer = plan.steps[0].reducer
    assert type(reducer).__name__ == "LargestNorm"
    assert reducer.num_kept(10) == 5
    again = ReductionPlan.model_validate(json.loads(plan.model_dump_json()))
    assert again == plan
    assert again.model_dump()["steps"][0]["reducer"]["keep_ratio"] == 0.5
    assert (
        plan.digest()
        != ReductionPlan.model_validate({"steps": [STEP | {"reducer": STEP["reducer"] | {"keep_ratio": 0.6}}]}).digest()
    )
    with pytest.raises(ValueError, match="keep_rato"):
        ReductionPlan.model_validate({"steps": [STEP | {"reducer": {"kind": KIND, "keep_rato": 0.5}}]})


def test_a_run_names_the_package_by_version_and_refuses_another(package, tmp_path, capsys):
    package()
    clips = {"uri": str(ROOT / "configs/demo/clips"), "pattern": "clip_000.mp4"}
    options = {"reduction": {"steps": [STEP]}, "sampling": {"max_new_tokens": 2}}
    config = job_config(tmp_path / "out", clips, **options)
    assert run_job(config).exit_code == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["recipe"]["versions.my-reducers"] == "1.2"
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["report", str(tmp_path / "out")]) == 0
    path = tmp_path / "job.json"
    path.write_text(config.model_dump_json())
    package("1.3")
    job = ["caption", "--config", str(path)]
    assert load_config(str(path)).reduction == config.reduction
    capsys.readouterr()
    assert main(job) == 4
    assert 'versions.my-reducers: "1.2" there, "1.3" here' in capsys.readouterr().err
    assert main([*job, "--accept", "versions.my-reducers"]) == 0
    plain = job_config(tmp_path / "plain", clips, sampling={"max_new_tokens": 2})
    assert run_job(plain).exit_code == 0
    assert "my-reducers" not in (tmp_path / "plain" / "run.json").read_text(), "a run that does not use it"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("other = my_reducers:LargestNorm", "no reducer of kind 'largest_norm'.* the kinds are: illava, .*, other"),
        (f"{KIND} = my_reducers:Nothing", "reducer 'largest_norm' of my-reducers 1.2 .* cannot be imported: Attr"),
        (f"{KIND} = json:dumps", "is no class over illava.reducers.base.Reducer"),
        (f"{KIND} = illava.reducers.tome:ToMe", "has the kind 'tome': its entry point must have the same name"),
    ],
)
def test_a_package_that_adds_none_is_told_by_name(package, entries, message):
    package(entries=entries)
    with pytest.raises(ValueError, match=message):
        ReductionPlan.model_validate({"steps": [STEP]})


def test_two_packages_of_one_kind_are_told(package):
    package()
    package("7", f"{KIND} = json:dumps", name="their-reducers")
    with pytest.raises(ValueError, match=r"two packages add a reducer of kind 'largest_norm': .*uninstall one"):
        ReductionPlan.model_validate({"steps": [STEP]})
