"""Where the model runs: what `auto` becomes, what is refused before a model loads, and that a run goes on elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from illava import devices
from illava.errors import DeviceError, ModelLoadError
from pipeline.cli import run_cli
from pipeline.config.load import load_config
from pipeline.config.placement import ClusterGPUs, gpus_of, place_here, place_on_ray, said
from pipeline.errors import ConfigError
from pipeline.execution.budget import Budget, BudgetGuard
from pipeline.execution.runner import run_job
from tests.support.runs import fakes
from tests.support.runs.fakes import DEMO_MODEL, job_config, numbered_items, read_rows, violations

pytestmark = pytest.mark.xdist_group("ray")  # one local cluster at a time

ROOT = Path(__file__).resolve().parents[3]


def job(device="auto", gpus="auto", *, executor="ray", out="out", source=None, **sections):
    runtime = {"gpus_per_actor": gpus, **sections.pop("runtime", {})}
    model = {"device": device, **sections.pop("model", {})}
    return job_config(out, source or {"uri": "in"}, executor=executor, model=model, runtime=runtime, **sections)


ON_RAY = [
    # device, gpus_per_actor, GPUs of a node, may come -> device, GPUs
    ("auto", "auto", 0, False, ("cpu", 0)),
    ("auto", "auto", 8, False, ("cuda", 1)),
    ("auto", "auto", 0, True, ("cuda", 1)),
    ("auto", 0, 8, False, ("cpu", 0)),
    ("auto", 0.5, 1, False, ("cuda", 0.5)),
    ("auto", 2, 8, False, ("cuda", 2)),
    ("auto", 2, 1, True, ("cuda", 2)),
    ("cpu", "auto", 8, False, ("cpu", 0)),
    ("cuda", "auto", 1, False, ("cuda", 1)),
    ("cuda", "auto", 0, True, ("cuda", 1)),
    ("cuda", 1, 1, False, ("cuda", 1)),
]


@pytest.mark.parametrize(("device", "gpus", "there", "may_come", "chosen"), ON_RAY)
def test_auto_is_one_gpu_where_the_cluster_has_any(device, gpus, there, may_come, chosen) -> None:
    placed = place_on_ray(job(device, gpus), ClusterGPUs(there, may_come))
    assert (placed.model.device, gpus_of(placed)) == chosen
    assert said(placed).startswith(chosen[0])
    assert (f"{chosen[1]:g} GPU" in said(placed)) == (chosen[1] > 0)


@pytest.mark.parametrize(
    ("device", "gpus", "there", "words"),
    [
        ("auto", 1, 0, r"runtime\.gpus_per_actor is 1.*no GPU.*gpus_per_actor=auto"),
        ("auto", 0.5, 0, "no GPU"),
        ("auto", 4, 2, "4.*2 on the node with most"),
        ("cuda", "auto", 0, r"model\.device is cuda.*no GPU.*model\.device=auto"),
        ("cpu", 1, 0, "no GPU"),
    ],
)
def test_gpus_that_never_come_are_refused_and_not_waited_for(device, gpus, there, words) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        place_on_ray(job(device, gpus), ClusterGPUs(there))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("device", "gpus", "has_cuda", "chosen"),
    [
        ("auto", "auto", False, ("cpu", 0)),
        ("auto", "auto", True, ("cuda", 1)),
        ("auto", 0, True, ("cpu", 0)),
        ("auto", 1, True, ("cuda", 1)),
        ("cpu", "auto", True, ("cpu", 0)),
        ("cpu", 1, False, ("cpu", 1)),
    ],
)
def test_one_process_takes_the_gpu_it_has(monkeypatch, device, gpus, has_cuda, chosen) -> None:
    monkeypatch.setattr(devices, "has_cuda", lambda: has_cuda)
    placed = place_here(job(device, gpus, executor="local"))
    assert (placed.model.device, gpus_of(placed)) == chosen


def test_one_process_refuses_a_gpu_it_does_not_have(monkeypatch) -> None:
    monkeypatch.setattr(devices, "has_cuda", lambda: False)
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        place_here(job("auto", 1, executor="local"))
    with pytest.raises(DeviceError):
        place_here(job("cuda", executor="local"))


@pytest.mark.parametrize(
    ("built", "count", "name", "words"),
    [
        (False, 0, "cuda", "is built without CUDA; install a CUDA build"),
        (True, 0, "cuda", "sees no CUDA device"),
        (True, 1, "cuda:7", "cuda:7: this process sees 1 CUDA device, cuda:0$"),
        (True, 2, "cuda:2", "2 CUDA devices, cuda:0 to cuda:1$"),
        (True, 1, "gpu", "none of auto, cpu, cuda, cuda:N; did you mean 'cuda'"),
        (True, 1, "CPU", "did you mean 'cpu'"),
        (True, 1, 1, "cuda:1: this process sees 1 CUDA device"),
        (True, 1, None, "did you mean 'auto'"),
        (True, 1, "cpu:1", "there is one CPU device"),
        (True, 1, "cuad", "did you mean 'cuda'"),
        (True, 1, "mps", "none of"),
        (True, 1, "meta", "none of"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_words(monkeypatch, built, count, name, words) -> None:
    import torch

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(DeviceError, match=words):
        devices.open_device(name)


def test_a_device_is_looked_for_before_a_model_is_loaded() -> None:
    from illava import VLM

    with pytest.raises(DeviceError, match="none of auto"):
        VLM.from_pretrained("/no/model/is/here", device="gpu")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": "bf16"}, ModelLoadError, "dtype 'bf16' is none of auto, float32, bfloat16, float16; .*'bfloat16'"),
        ({"dtype": "Float16"}, ModelLoadError, "did you mean 'float16'"),
        ({"dtype": None}, ModelLoadError, "dtype None is none of auto"),
        ({"dtype": "float8_e4m3fn"}, ModelLoadError, "is none of auto"),
        ({"torch_dtype": "bfloat16"}, TypeError, "a word of transformers: give dtype='bfloat16'"),
        ({"device_map": "auto"}, TypeError, "a word of transformers: give device='cuda:0'"),
        ({"kv_cache_bytes": "2GB"}, TypeError, "kv_cache_bytes is a number of bytes, such as 2 << 30; got '2GB'"),
        ({"max_batch_requests": 2.5}, TypeError, "max_batch_requests is a whole number; got 2.5"),
    ],
)
def test_a_wrong_option_of_a_model_is_said_before_it_is_loaded(options, error, words) -> None:
    from illava import VLM

    with pytest.raises(error, match=words):
        VLM.from_pretrained("/no/model/is/here", **({"device": "cpu"} | options))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.device=gpu", "did you mean cuda"),
        ("model.device=cuda:0", "CUDA_VISIBLE_DEVICES"),
        ("model.device=mps", "one of auto, cpu, cuda"),
        ("model.device=null", "one of auto, cpu, cuda"),
        ("runtime.gpus_per_actor=1.5", "a whole number above it"),
        ("runtime.gpus_per_actor=-1", "from 0 to 1"),
        ("runtime.gpus_per_actor=.nan", "from 0 to 1"),
        ("runtime.gpus_per_actor=true", "from 0 to 1"),
        ("model={model_id: m, device: cuda}", r"gpus_per_actor is 0"),
    ],
)
def test_what_names_no_device_is_refused_when_the_file_is_read(override, words) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(str(ROOT / "configs/demo.yaml"), ["runtime.gpus_per_actor=0", override])


# Sweeps and compared methods have schemas of their own.
SHIPPED = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.stem.startswith(("sweep", "compare"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_job_runs_with_a_gpu_and_without(path) -> None:
    config = load_config(str(path))
    assert (config.model.device, config.runtime.gpus_per_actor) == ("auto", "auto")
    for gpus, device in ((0, "cpu"), (1, "cuda")):
        assert place_on_ray(config, ClusterGPUs(gpus)).model.device == device


@pytest.mark.parametrize("name", ["sweep_demo", "sweep_paper"])
def test_shipped_sweeps_run_with_a_gpu_and_without(name) -> None:
    models = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())["models"]
    assert {model["device"] for model in models.values()} == {"auto"}


THREE_KEYS = f"input: {{uri: {ROOT}/configs/demo/clips/}}\nmodel: {{model_id: {DEMO_MODEL}}}\n"


def three_keys(tmp_path) -> str:
    path = tmp_path / "three.yaml"
    path.write_text(THREE_KEYS + f"output: {{uri: {tmp_path}/out}}\n")
    return str(path)


@pytest.mark.parametrize("executor", ["ray", "local"])
def test_a_job_of_three_keys_runs(tmp_path, executor) -> None:
    command = [sys.executable, "jobs/caption_videos.py", "--config", three_keys(tmp_path), "--limit", "2"]
    command += ["--set", f"runtime.executor={executor}"] if executor == "local" else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 ok, 0 partial, 0 failed" in done.stdout
    [device] = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("  device")]
    assert f"the model is on {' '.join(device)}" in done.stderr
    assert all(row["text"].strip() for row in read_rows(tmp_path / "out"))
    assert violations(tmp_path / "out") == []
    placements = json.loads((tmp_path / "out/_RUN.json").read_text())["placements"]
    assert [one["device"] for one in placements] == [device[0].strip(",")]


@pytest.fixture(scope="module")
def gpu_cluster():
    """A local Ray that says it has a GPU; `run_job` joins the session its process has."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, _node_ip_address="127.0.0.1")
        yield ray
        ray.shutdown()


def run_fake(config, **options):
    worker, loader = partial(fakes.barcode_worker), partial(fakes.fake_loader)
    return run_job(config, worker_factory=worker, loader_factory=loader, **options)


def test_a_run_begun_on_a_gpu_goes_on_without_one_and_says_both(tmp_path, gpu_cluster, caplog, monkeypatch) -> None:
    caplog.set_level("INFO", "pipeline")
    items = {"source": numbered_items(tmp_path, 40), "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(
            BudgetGuard, "allows_more", lambda self, num_in_work: not num_in_work
        )  # the first shards, no others
        first = run_fake(job(**items, runtime={"max_open_shards": 1}), budget=Budget(1.0, "s"))
    assert 0 < first.num_left < 40
    assert "the model is on cuda, 1 GPU an actor" in caplog.text
    caplog.clear()
    rest = run_fake(job(**items, executor="local"))
    assert (rest.exit_code, rest.num_done_before) == (0, 40 - first.num_left)
    assert "the model is on cpu, " in caplog.text
    placements = json.loads((tmp_path / "out/_RUN.json").read_text())["placements"]
    assert placements == [
        {"device": "cuda", "gpus_per_actor": 1.0, "num_sessions": 1},
        {"device": "cpu", "gpus_per_actor": 0.0, "num_sessions": 1},
    ]
    assert violations(tmp_path / "out") == []
    named = run_fake(job("cpu", **items, executor="local"))
    assert named.num_done_before == 40, "a device named is no other run: the dtype counts, and it is the checkpoint's"


def test_actors_on_a_gpu_are_paid_for_as_such(tmp_path, gpu_cluster) -> None:
    prices = {"gpu_hour_usd": 3600.0}
    summary = run_fake(job(source=numbered_items(tmp_path, 8), out=tmp_path / "out", prices=prices))
    assert summary.cost.total_usd == pytest.approx(sum(worker.wall_s for worker in summary.workers))


def test_a_job_that_cannot_begin_leaves_its_folder_to_the_mended_one(tmp_path, gpu_cluster) -> None:
    """A folder claimed for ``gpus_per_actor: 2`` or ``device: cuda`` would refuse what the message tells to do."""
    items = {"source": numbered_items(tmp_path, 8), "out": tmp_path / "out"}
    with pytest.raises(ConfigError, match="1 on the node with most"):
        run_fake(job("cuda", 2, **items))
    assert not (tmp_path / "out").exists()
    assert run_fake(job(**items)).exit_code == 0


def test_a_gpu_whose_torch_cannot_use_it_is_told_before_a_model_loads(tmp_path, gpu_cluster, capsys) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this torch has a GPU")
    assert run_cli("a job", ["--config", three_keys(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "error: device cuda: " in said
    assert "defect" not in said
    assert "lost" not in said, "no actor is started again for it"
