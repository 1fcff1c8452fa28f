"""Provokes mistakes of a user: what is typed, on what files. `tests/pipeline/test_mistakes.py` says the answers.

A world is a folder with a valid configuration (`job.yaml`), a finished run (`done`) and one that lacks parts (`begun`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.config.load import load_config
from pipeline.execution.runner import run_job
from tests.support.runs import fakes
from tests.support.runs.fakes import DEMO_MODEL, numbered_items

SHARED = ("job.yaml", "done", "begun")


@dataclass(frozen=True, slots=True)
class World:
    """A folder with what every mistake starts from, and a folder of this mistake's own.

    Attributes:
        shared: holds ``job.yaml`` and the runs ``done`` and ``begun``; nothing is changed there.
        folder: of this mistake.
    """

    shared: Path
    folder: Path

    def path(self, name: str) -> str:
        """The full path of what all share, or of a name in the own folder."""
        return str((self.shared if name in SHARED else self.folder) / name)

    def file(self, name: str, content: str | bytes = "") -> str:
        """Write a file; its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def job(self, *sets: str, command: str = "caption") -> list[str]:
        """The arguments of a job on the valid configuration with some keys set."""
        own = ["--set", f"output.uri={self.folder / 'new'}"] if not any("output.uri" in one for one in sets) else []
        return [command, "--config", self.path("job.yaml"), *own, *(word for one in sets for word in ("--set", one))]

    def plan(self, *sets: str) -> list[str]:
        """The same as a dry run."""
        return [*self.job(*sets), "--dry-run"]

    def config(self, name: str, **sections: object) -> str:
        """A configuration of its own: the valid one with other sections."""
        data = yaml.safe_load(Path(self.path("job.yaml")).read_text())
        data.update(sections)
        return self.file(name, yaml.safe_dump({key: value for key, value in data.items() if value is not None}))

    def manifest(self, *lines: object) -> str:
        """``--set`` for a manifest of its own."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        return "input.manifest=" + self.file("own.jsonl", "\n".join(texts))

    def media(self, *names: str) -> str:
        """``--set`` for a folder with files of these names."""
        (self.folder / "media").mkdir()
        for name in names:
            self.file(f"media/{name}", "x")
        return f"input={{uri: {self.folder / 'media'}}}"

    def model(self, change: Callable[[Path], None]) -> str:
        """``--set`` for a copy of the demo model with a change."""
        folder = self.folder / "model"
        shutil.copytree(DEMO_MODEL, folder)
        change(folder)
        return f"model.model_id={folder}"

    def damaged(self, change: Callable[[Path], None]) -> str:
        """A copy of the finished run with a change; its path."""
        folder = Path(shutil.copytree(self.path("done"), self.folder / "damaged"))
        change(folder)
        return str(folder)


def make_world(folder: Path) -> Path:
    """Write the configuration and the two runs, and return the folder."""
    folder.mkdir()
    source = numbered_items(folder, 6)
    job = {
        "name": "mistakes",
        "input": source,
        "media": {"num_frames": 2},
        "model": {"model_id": str(DEMO_MODEL), "device": "cpu", "dtype": "float32"},
        "runtime": {"executor": "local", "gpus_per_actor": 0},
        "output": {"uri": str(folder / "new"), "items_per_shard": 2},
    }
    path = World(folder, folder).file("job.yaml", yaml.safe_dump(job))
    for name in ("done", "begun"):
        config = load_config(path, [f"output.uri={folder / name}"])
        run_job(config, worker_factory=fakes.barcode_worker, loader_factory=fakes.fake_loader)
    (folder / "begun" / "data" / "part-00001.parquet").unlink()
    (folder / "begun" / "_RUN.json").unlink()
    return folder


def edit_json(path: Path, **keys: object) -> None:
    """Change keys of a JSON file; None takes a key away."""
    data = {name: value for name, value in (json.loads(path.read_text()) | keys).items() if value is not None}
    path.write_text(json.dumps(data))


def drop(*names: str) -> Callable[[Path], None]:
    """A change of a model folder: files that go."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def changed(name: str, **keys: object) -> Callable[[Path], None]:
    """A change of a model folder: keys of a JSON file."""
    return lambda folder: edit_json(folder / name, **keys)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    """A change of a folder: a file with another content."""
    return lambda folder: (folder / name).write_bytes(content) and None


def all_of(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Several changes, in order."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def broken_off(folder: Path) -> None:
    """A change of a model folder: an interrupted download."""
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_processor(folder: Path) -> None:
    """A change of a model folder: what describes its pictures is gone."""
    for path in folder.glob("*processor*"):
        path.unlink()


def tome(block: int, num_merged: int) -> str:
    """A step in the tower, in YAML."""
    return f"{{stage: vision_block, layers: [{block}], reducer: {{kind: tome, num_merged: {num_merged}}}}}"


def fastv(layer: int) -> str:
    """A step in the decoder, in YAML."""
    return f"{{stage: decoder_layer, layers: [{layer}], reducer: {{kind: fastv, keep_ratio: 0.5}}}}"


INDEX = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'


MISTAKES: dict[str, Callable[[World], list[str]]] = {
    "no command": lambda w: [],
    "unknown command": lambda w: ["captoin"],
    "unknown flag": lambda w: [*w.job(), "--dry-rnu"],
    "no config": lambda w: ["caption"],
    "limit is no number": lambda w: [*w.job(), "--limit", "few"],
    "limit 0": lambda w: [*w.job(), "--limit", "0"],
    "log style": lambda w: [*w.job(), "--log", "yaml"],
    "set without =": lambda w: w.job("media.num_frames"),
    "set into a value": lambda w: w.job("name.x=1"),
    "estimate of too few": lambda w: [*w.job(), "--estimate", "1"],
    "budget in bananas": lambda w: [*w.job(), "--budget", "3 bananas"],
    "budget without prices": lambda w: [*w.job(), "--budget", "5USD"],
    "budget of a dry run": lambda w: [*w.plan(), "--budget", "3h"],
    "status of what": lambda w: ["status"],
    "export format": lambda w: ["export", w.path("done"), "--format", "xml", "--to", "x"],
    "compare with nothing": lambda w: ["compare", w.path("done")],
    "convert unknown benchmark": lambda w: [
        "convert",
        "mmbnch",
        w.path("x.tsv"),
        "--media",
        "m",
        "--manifest",
        "x.jsonl",
    ],
    "judge unknown benchmark": lambda w: ["export-for-judge", w.path("done"), "mmvt", "--output", w.path("x.json")],
    "config missing": lambda w: ["caption", "--config", w.path("job.yaml").replace("job", "jbo")],
    "config is a folder": lambda w: ["caption", "--config", w.path("done")],
    "config with tabs": lambda w: ["caption", "--config", w.file("a.yaml", "input:\n\turi: x")],
    "config is a list": lambda w: ["caption", "--config", w.file("a.yaml", "- a\n- b")],
    "config is empty": lambda w: ["caption", "--config", w.file("a.yaml", "")],
    "config is binary": lambda w: ["caption", "--config", w.file("a.yaml", b"\xff\xfe\x00\x01")],
    "config has a key twice": lambda w: ["caption", "--config", w.file("a.yaml", "name: a\nname: b\n")],
    "misspelt section": lambda w: ["caption", "--config", w.config("a.yaml", medai={"num_frames": 2})],
    "misspelt key": lambda w: w.job("media.num_frame=2"),
    "no model": lambda w: ["caption", "--config", w.config("a.yaml", model=None)],
    "a word for a number": lambda w: w.job("media.num_frames=many"),
    "0 frames": lambda w: w.job("media.num_frames=0"),
    "a number that is none": lambda w: w.job("media.load_timeout_s=.nan"),
    "unknown task": lambda w: w.job("task.kind=capton"),
    "unknown reducer": lambda w: w.job("reduction.steps=[{stage: vision_block, layers: [1], reducer: {kind: tom}}]"),
    "a wrong stage": lambda w: w.job("reduction.steps=[{stage: decoder_input, reducer: {kind: tome, num_merged: 2}}]"),
    "unknown preset": lambda w: w.job("reduction.preset=ilava-video"),
    "preset and steps": lambda w: w.job(f"reduction={{preset: illava-video, steps: [{fastv(2)}]}}"),
    "two steps at one place": lambda w: w.job(f"reduction.steps=[{fastv(2)}, {fastv(2)}]"),
    "json without a schema": lambda w: w.job("task={kind: document, output: json}", command="documents"),
    "a branch for a revision": lambda w: w.job("model.revision=main"),
    "device gpu": lambda w: w.job("model.device=gpu"),
    "device cuda:0": lambda w: w.job("model.device=cuda:0"),
    "cuda without a GPU share": lambda w: w.job("model.device=cuda"),
    "max_failed 1.5": lambda w: w.job("runtime.max_failed=1.5"),
    "min above max": lambda w: w.job("runtime.num_vlm_actors={min: 3, max: 1}"),
    "a template without its place": lambda w: w.job("task={kind: question, open_template: What}", command="answer"),
    "no input": lambda w: ["caption", "--config", w.config("a.yaml", input={})],
    "no such folder": lambda w: w.job(f"input={{uri: {w.path('nowhere')}}}"),
    "an empty folder": lambda w: w.job(w.media()),
    "no media in it": lambda w: w.job(w.media("a.txt")),
    "a pattern that finds nothing": lambda w: w.job(w.media("a.mp4"), "input.pattern=*.png"),
    "no such manifest": lambda w: w.job("input.manifest=" + w.path("itms.jsonl")),
    "an empty manifest": lambda w: w.job(w.manifest()),
    "a broken line": lambda w: w.job(w.manifest({"uri": "0.mp4"}, '{"uri": "1.mp4')),
    "no column uri": lambda w: w.job(w.manifest({"path": "0.mp4"})),
    "ids twice": lambda w: w.job(w.manifest({"id": "a", "uri": "0.mp4"}, {"id": "a", "uri": "1.mp4"})),
    "a path out of the folder": lambda w: w.job(w.manifest({"uri": "../../etc/x.mp4"})),
    "an http address": lambda w: w.job(w.manifest({"uri": "http://example.com/x.mp4"})),
    "an unknown extension": lambda w: w.job(w.manifest({"uri": "x.docx"})),
    "questions of a folder": lambda w: w.job(w.media("a.mp4"), "task={kind: question}", command="answer"),
    "no questions": lambda w: w.job(w.manifest({"uri": "0.mp4"}), "task={kind: question}", command="answer"),
    "videos as documents": lambda w: w.job("task={kind: document}", command="documents"),
    "no earlier run": lambda w: w.job("input.exclude_runs=" + w.path("nights")),
    "links into nowhere": lambda w: w.job("input.follow_links=" + w.path("nowhere")),
    "no such model folder": lambda w: w.job("model.model_id=./modl"),
    "a hub id without a revision": lambda w: w.job("model.model_id=llava-hf/x"),
    "no config.json": lambda w: w.job(w.model(drop("config.json"))),
    "a broken config.json": lambda w: w.job(w.model(written("config.json", b"{"))),
    "another family": lambda w: w.job(w.model(changed("config.json", model_type="bert"))),
    "a quantised model": lambda w: w.job(w.model(changed("config.json", quantization_config={"quant_method": "awq"}))),
    "an adapter": lambda w: w.job(w.model(written("adapter_config.json", b"{}"))),
    "no preprocessor": lambda w: w.job(w.model(no_processor)),
    "no weights": lambda w: w.plan(w.model(drop("model.safetensors"))),
    "weights broken off": lambda w: w.plan(w.model(broken_off)),
    "weights are a web page": lambda w: w.plan(w.model(written("model.safetensors", b"<html>not found</html>"))),
    "pickled weights only": lambda w: w.plan(
        w.model(all_of(drop("model.safetensors"), written("pytorch_model.bin", b"x")))
    ),
    "a shard is missing": lambda w: w.plan(
        w.model(
            all_of(
                drop("model.safetensors"),
                written("model.safetensors.index.json", INDEX),
                written("model-00001-of-00002.safetensors", b"x"),
            )
        )
    ),
    "no tokenizer": lambda w: w.plan(w.model(drop("tokenizer.json"))),
    "no chat template": lambda w: w.plan(
        w.model(
            all_of(
                drop("chat_template.json", "chat_template.jinja"), changed("tokenizer_config.json", chat_template=None)
            )
        )
    ),
    "a preset of a larger model": lambda w: w.plan("reduction.preset=illava-qwen2-vl"),
    "a preset with too many merges": lambda w: w.plan("reduction.preset=illava-draw"),
    "a block that is not there": lambda w: w.plan(f"reduction.steps=[{tome(40, 2)}]"),
    "a layer that is not there": lambda w: w.plan(f"reduction.steps=[{fastv(40)}]"),
    "a budget of all tokens": lambda w: w.plan(f"reduction.steps=[{tome(1, 98)}, {tome(2, 98)}]"),
    "released layout": lambda w: w.plan(f"reduction={{layout: released, steps: [{tome(1, 3)}]}}"),
    "a cache too small for a token": lambda w: w.plan("model.kv_cache_bytes=10"),
    "a cache larger than the machine": lambda w: w.plan("model.kv_cache_bytes=1000000000000000"),
    "no GPU here": lambda w: w.plan("model.device=cuda", "runtime.gpus_per_actor=auto"),
    "no GPU for an actor": lambda w: w.plan("model.device=auto", "runtime.gpus_per_actor=1"),
    "no GPU for Ray here": lambda w: w.plan("model.device=cuda", "runtime.gpus_per_actor=auto", "runtime.executor=ray"),
    "another configuration": lambda w: w.job("output.uri=" + w.path("done"), "sampling.max_new_tokens=5"),
    "another shard size": lambda w: w.job("output.uri=" + w.path("done"), "output.items_per_shard=3"),
    "another input": lambda w: [*w.job("output.uri=" + w.path("done")), "--limit", "2"],
    "output is a file": lambda w: w.job("output.uri=" + w.file("taken", "x")),
    "output scheme": lambda w: w.job("output.uri=ftp://host/x"),
    "parts without a run": lambda w: w.job("output.uri=" + w.damaged(drop("run.json"))),
    "a damaged run.json": lambda w: w.job("output.uri=" + w.damaged(written("run.json", b"{"))),
    "an edited run.json": lambda w: w.job("output.uri=" + w.damaged(changed("run.json", recipe_digest="0" * 32))),
    "status of nothing": lambda w: ["status", w.path("nowhere")],
    "verify of nothing": lambda w: ["verify", w.path("nowhere")],
    "retry of nothing": lambda w: ["retry", w.path("nowhere")],
    "report of nothing": lambda w: ["report", w.path("nowhere")],
    "export of nothing": lambda w: ["export", w.path("nowhere"), "--format", "csv", "--to", w.path("x.csv")],
    "compare with no run": lambda w: ["compare", w.path("done"), w.path("nowhere")],
    "retry of an unfinished run": lambda w: ["retry", w.path("begun")],
    "retry of an unknown type": lambda w: ["retry", w.path("done"), "--only", "corupt_media"],
    "retry with another input": lambda w: ["retry", w.path("done"), "--set", "input.limit=3"],
    "retry with another answer": lambda w: ["retry", w.path("done"), "--set", "sampling.max_new_tokens=3"],
    "verify of a run that lacks parts": lambda w: ["verify", w.path("begun")],
    "a part cut off": lambda w: ["status", w.damaged(written("data/part-00000.parquet", b"x"))],
}
