"""Runs the demo's captioning job as one would write it on Ray Data: a reader class, a model class, Parquet out.

Loader, preprocessing, model, plan and prompt are the pipeline's and illava's own. The sides differ in what moves the
items, and in the guarantees. Ray's workers can import this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from illava.families import load_preprocessor
from illava.preprocess import VisualInput
from illava.requests import Request, SamplingParams
from pipeline.config.schema import JobConfig
from pipeline.execution.runner import build_loader
from pipeline.execution.worker import load_vlm
from pipeline.inputs.build_manifest import build_manifest
from pipeline.records import MediaItem


class Reader:
    """Turns a row with a URI into a row with frames at model size; raises the loader's errors."""

    def __init__(self, config: JobConfig) -> None:
        self._loader = build_loader(config, load_preprocessor(config.model.model_id))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        item = MediaItem(row["item_id"], (row["uri"],), "video", (row["size"],), (row["etag"],), row["prompt"])
        loaded = self._loader.load(item)
        [visual] = loaded.media
        return {
            "item_id": row["item_id"],
            "uri": row["uri"],
            "prompt": row["prompt"],
            "tiles": visual.tiles,
            "height": visual.original_size[0],
            "width": visual.original_size[1],
            "timestamps_s": np.array(visual.timestamps_s),
        }


class Captioner:
    """Turns a batch of loaded rows into a batch of texts, when the slowest one has ended."""

    def __init__(self, config: JobConfig) -> None:
        self._config, self._vlm = config, load_vlm(config)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        sampling = SamplingParams(max_new_tokens=self._config.sampling.max_new_tokens)
        requests = []
        for n, item_id in enumerate(batch["item_id"]):
            size = int(batch["height"][n]), int(batch["width"][n])
            times_s = tuple(map(float, batch["timestamps_s"][n]))
            visual = VisualInput("video", np.ascontiguousarray(batch["tiles"][n]), size, times_s)
            requests.append(Request(str(item_id), (visual, str(batch["prompt"][n])), sampling))
        answers = self._vlm.generate(requests, plan=self._config.reduction, errors="return")
        return {
            "item_id": batch["item_id"],
            "uri": batch["uri"],
            "text": [answer.text for answer in answers],
            "num_generated_tokens": [answer.usage.num_generated_tokens if answer.usage else 0 for answer in answers],
        }


def run_on_ray_data(config: JobConfig, output: Path) -> None:
    """Run the whole job: the same manifest, as many readers and models, the same batch size.

    Raises:
        ray.exceptions.RayError: a row failed; files written before stay.
    """
    import ray.data

    rows = [
        {
            "item_id": item.item_id,
            "uri": item.uris[0],
            "size": item.sizes[0],
            "etag": item.etags[0],
            "prompt": item.prompt or config.task.prompt,
        }
        for item in build_manifest(config).items
    ]
    batch = config.model.max_batch_requests
    runtime = config.runtime
    made = {"fn_constructor_args": [config], "num_cpus": 1}
    readers, models = (
        ray.data.ActorPoolStrategy(size=size) for size in (runtime.num_reader_actors, runtime.num_vlm_actors.max)
    )
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // batch))
    dataset = dataset.map(Reader, compute=readers, **made)
    dataset = dataset.map_batches(Captioner, batch_size=batch, compute=models, **made)
    dataset.write_parquet(str(output))
