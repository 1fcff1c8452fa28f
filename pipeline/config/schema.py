"""Defines `JobConfig`, the one schema of configs/*.yaml. Units stand in names; unknown keys are refused.

Every field says by `result_field(...)` or `runtime_field(...)` whether it can change a row's content. The first kind
enters the config fingerprint, the second does not; a test fails on a field that says neither. Loads neither torch nor
ray.
"""

from __future__ import annotations

import difflib
import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from illava.pixel_limits import PixelLimits
from illava.plan import ReductionPlan
from illava.weight_files import Quantization
from pipeline.config.base import Section, optional_result_field, result_field, result_fields, runtime_field
from pipeline.config.grammar import GrammarConfig
from pipeline.config.runtime import ActorRange, RuntimeConfig
from pipeline.config.sampling import SamplingConfig
from pipeline.config.tasks import CaptionConfig, DocumentConfig, QuestionConfig, TaskConfig
from pipeline.storage.uris import is_local, without_extra_slashes

__all__ = [
    "READER_AND_DRIVER_BYTES",
    "ActorRange",
    "AdapterConfig",
    "CaptionConfig",
    "DocumentConfig",
    "FpsSampling",
    "FrameSampling",
    "GrammarConfig",
    "InputConfig",
    "JobConfig",
    "KeyframeSampling",
    "MediaConfig",
    "ModelConfig",
    "OutputConfig",
    "PricesConfig",
    "QuestionConfig",
    "RuntimeConfig",
    "SamplingConfig",
    "Section",
    "TaskConfig",
    "UniformSampling",
    "result_field",
    "result_fields",
    "runtime_field",
]

# What a reader or the driver holds at most beside the items in hand: the interpreter, Ray and the libraries.
READER_AND_DRIVER_BYTES = 500_000_000


class InputConfig(Section):
    """Says where items come from: a prefix with a pattern, or a manifest of URIs.

    The manifest's hash enters the run fingerprint, so the fields themselves need not.

    Attributes:
        uri: prefix that is listed; also the base of a manifest's relative URIs.
        pattern: glob below the prefix; ``**`` crosses folders.
        manifest: Parquet, JSONL or CSV with a column ``uri`` or ``uris``.
        limit: only the first so many items, in manifest order.
        exclude_runs: an earlier run's folder, or one that holds several runs (``output.uri`` may be one of them):
            items with a text there under the same config fingerprint are left out, and those that failed by what their
            file is, as long as it is the same.
        follow_links: a local folder that links among the media may lead into, such as a Hugging Face cache's
            ``datasets--owner--name``, whose files are links to ``blobs``. Links within `uri` or the manifest's folder
            are always followed, links to folders never.
    """

    uri: str | None = runtime_field(None)
    pattern: str = runtime_field("**/*")
    manifest: str | None = runtime_field(None)
    limit: int | None = runtime_field(None, ge=1)
    exclude_runs: str | None = runtime_field(None)
    follow_links: str | None = runtime_field(None, min_length=1)

    @field_validator("follow_links")
    @classmethod
    def _is_local(cls, folder: str | None) -> str | None:
        if folder is not None and not is_local(folder):
            raise ValueError("a local folder; object stores have no links")
        return folder


class UniformSampling(Section):
    """Takes ``num_frames`` frames, evenly spaced over the whole clip."""

    kind: Literal["uniform"] = result_field("uniform")


class FpsSampling(Section):
    """Takes ``fps`` frames a second, thinned evenly to at most ``num_frames``."""

    kind: Literal["fps"] = result_field("fps")
    fps: float = result_field(1.0, gt=0)


class KeyframeSampling(Section):
    """Takes key frames, thinned evenly to at most ``num_frames``."""

    kind: Literal["keyframe"] = result_field("keyframe")


FrameSampling = Annotated[UniformSampling | FpsSampling | KeyframeSampling, Field(discriminator="kind")]


class MediaConfig(Section):
    """Says how bytes become frames, and sets the budgets that are checked before anything is decoded.

    Attributes:
        num_frames: frames given to the model, at most.
        frame_sampling: which frames.
        decoder: ``auto`` is decord, then PyAV for what decord cannot read; ``pyav`` for untrusted media.
        ranged_reads: ``auto`` fetches of a large mp4 or mov in a store only the index and the chosen frames' groups of
            pictures, where that surely gives the same frames (PyAV decodes them); ``off`` fetches whole objects.
        verify_md5: ``auto`` compares a whole object from S3 with its ETag where that is its MD5 by S3's rule (no upload
            in parts, no encryption with keys); ``off`` for stores whose ETags are something else.
        load_timeout_s: deadline of one item's load; its child process is killed then.
        max_bytes: largest object that is read.
        max_pixels_per_frame: largest declared width x height; larger media are failed rows. See ``max_pixels`` for the
            size that the model reads them at.
        max_duration_s: longest clip.
        max_images: most images of one image set.
        max_pages: most pages of one document that are read.
        over_max_pages: of task ``document``: of a longer one, or of one of more page images than ``max_images``, the
            ``first`` so many pages are read, and its row is ``partial`` and says how many there are; or its row
            ``fail``s, as it does under every other task.
        page_dpi: dots an inch at which a PDF's pages are rendered; a page that would have more than
            ``max_pixels_per_frame`` then fails.
        max_pixels: pixels of an image, and of each frame of a video, after the resize, at most; for families of native
            resolution (Qwen). In place of the processor's ``max_pixels``; a token is 28 x 28 px there (Qwen3-VL:
            32 x 32), of two frames in a video.
        min_pixels: the same, at least; smaller pictures are enlarged.
        total_pixels: of a whole video, after the resize, counted once for two frames, as qwen-vl-utils has it: divided
            by a token's pixels, the most tokens of a video. Every frame gets an even share, at least 1.05 times the
            least pixels of a frame.
        max_tiles: tiles that a single image is cut into at most, base tile apart; for tiled families (LLaVA-OneVision,
            LLaVA-NeXT, InternVL). As if the processor's ``image_grid_pinpoints`` named no canvas of more tiles, or as
            its ``max_patches``.
    """

    num_frames: int = result_field(32, ge=1, le=4096)
    frame_sampling: FrameSampling = result_field(UniformSampling())
    decoder: Literal["auto", "decord", "pyav"] = result_field("auto")
    ranged_reads: Literal["auto", "off"] = result_field("auto")
    verify_md5: Literal["auto", "off"] = runtime_field("auto")
    load_timeout_s: float = runtime_field(120.0, gt=0, le=1_000_000)  # poll counts milliseconds in 31 bits
    max_bytes: int = result_field(8_000_000_000, ge=1)
    max_pixels_per_frame: int = result_field(64_000_000, ge=1)
    max_duration_s: float = result_field(6 * 3600.0, gt=0)
    max_images: int = result_field(64, ge=1)
    max_pages: int = result_field(100, ge=1)
    over_max_pages: Literal["first", "fail"] = optional_result_field("first", off="fail")
    page_dpi: int = result_field(144, ge=18, le=1200)
    max_pixels: int | None = optional_result_field(ge=1)
    min_pixels: int | None = optional_result_field(ge=1)
    total_pixels: int | None = optional_result_field(ge=1)
    max_tiles: int | None = optional_result_field(ge=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> MediaConfig:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels is {self.min_pixels} and max_pixels is {self.max_pixels}: lower min_pixels")
        return self

    @property
    def pixel_limits(self) -> PixelLimits:
        """How large the model reads the media."""
        return PixelLimits(self.max_pixels, self.min_pixels, self.total_pixels, self.max_tiles)


class AdapterConfig(Section):
    """Names a LoRA adapter (safetensors, as peft writes it) that is added to the model, language model and tower alike.

    Attributes:
        id: hub id or local folder; its base model must be ``model.model_id``.
        revision: 40 hex digits of the hub commit; null for a local folder.
        merge: into the weights, at no cost for each token; ``false`` computes it beside them, for the same answers.
    """

    id: str = result_field(min_length=1)
    revision: str | None = result_field(None, pattern=r"^[0-9a-f]{40}$")
    merge: bool = result_field(True)


class ModelConfig(Section):
    """Names the model. A hub id needs a pinned revision; a local folder is identified by the hashes of its files.

    Attributes:
        model_id: hub id or local folder (safetensors only).
        revision: 40 hex digits of the hub commit; null for a local folder.
        dtype: ``auto`` is bfloat16 on a CPU that multiplies it natively (AVX-512 BF16, AMX) and float32 on others; on a
            GPU the checkpoint's own, but bfloat16 for float16. A run keeps what it first started with, on any machine.
        device: ``auto`` is CUDA where each actor has a GPU, else CPU, and a run of one may go on on the other;
            ``cuda`` and ``cpu`` hold for all rows of a run. Which GPU is CUDA_VISIBLE_DEVICES' or Ray's to say.
        quantization: of the decoder's linear layers while the model is loaded (torchao): ``float8`` and ``int8`` halve
            their memory, ``int4`` leaves a quarter; tower, projector and output head stay as they are. ``none`` is as
            stored. float8 is multiplied as such on cards of compute capability 8.9 and later, else in ``dtype``.
        adapter: a LoRA adapter that is added to the model; null adds none.
        kv_cache_bytes: size of the paged key/value pool, with the recurrent states of Qwen3.5; null takes 60 % of what
            the weights leave, 2 GiB on CPU.
        max_batch_requests: requests in one running decode batch, at most; null takes what the key/value pool holds of
            the job's own requests, 32 at least and 256 at most, and 32 on CPU or where the card is not known when the
            run begins, as on a Ray cluster elsewhere. `--dry-run` says it for the common cards.
    """

    model_id: str = result_field(min_length=1)
    revision: str | None = result_field(None, pattern=r"^[0-9a-f]{40}$")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = result_field("auto")
    device: Literal["auto", "cpu", "cuda"] = runtime_field("auto")
    quantization: Quantization = optional_result_field("none", off="none")
    adapter: AdapterConfig | None = optional_result_field()
    kv_cache_bytes: int | None = runtime_field(None, ge=1)
    max_batch_requests: int | None = runtime_field(None, ge=1)

    @property
    def hub_revision(self) -> str | None:
        """The revision to load: none of a local folder, beside which runs of earlier versions may have one."""
        return None if os.path.isdir(self.model_id) else self.revision

    @property
    def false_revisions(self) -> tuple[tuple[str, str, str], ...]:
        """Keys with a commit of the hub beside a folder of this machine, for which rows would name the commit."""
        found = [("model.revision", self.revision, self.model_id)]
        if self.adapter is not None:
            found.append(("model.adapter.revision", self.adapter.revision, self.adapter.id))
        return tuple((key, commit, name) for key, commit, name in found if commit is not None and os.path.isdir(name))

    @field_validator("device", mode="before")
    @classmethod
    def _is_a_device(cls, device: Any) -> Any:
        if isinstance(device, str) and device.startswith("cuda:"):
            raise ValueError(
                "write cuda, and choose the GPU by CUDA_VISIBLE_DEVICES; on Ray each actor is given its own"
            )
        if device not in ("auto", "cpu", "cuda"):
            near = difflib.get_close_matches(str(device).lower(), ("auto", "cpu", "cuda"), 1)
            near = ["cuda"] if device == "gpu" else near
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"one of auto, cpu, cuda; nothing else runs the models here{hint}")
        return device


class PricesConfig(Section):
    """Says what an hour costs; only the cost columns depend on it."""

    gpu_hour_usd: float = runtime_field(0.0, ge=0)
    cpu_hour_usd: float = runtime_field(0.0, ge=0)
    storage_request_usd: float = runtime_field(0.0, ge=0)


class OutputConfig(Section):
    """Says where the run folder stands.

    Attributes:
        uri: the run folder; the same configuration resumes there, any other is refused. Slashes too many are left out.
        items_per_shard: items of one Parquet part; fixed for the life of a run, part of its fingerprint.
        compression: of the Parquet parts.
    """

    uri: str = runtime_field(min_length=1)
    items_per_shard: int = runtime_field(64, ge=1)
    compression: Literal["zstd", "snappy", "gzip", "none"] = runtime_field("zstd")

    @field_validator("uri")
    @classmethod
    def _in_normal_form(cls, uri: str) -> str:
        return without_extra_slashes(uri)


class JobConfig(Section):
    """Describes a whole job. `name` is for people; `seed` drives every random draw."""

    name: str = runtime_field("job")
    seed: int = result_field(0)
    input: InputConfig = runtime_field()
    media: MediaConfig = result_field(MediaConfig())
    model: ModelConfig = result_field()
    reduction: ReductionPlan = result_field(ReductionPlan())
    task: TaskConfig = result_field(CaptionConfig())
    sampling: SamplingConfig = result_field(SamplingConfig())
    runtime: RuntimeConfig = runtime_field(RuntimeConfig())
    prices: PricesConfig = runtime_field(PricesConfig())
    output: OutputConfig = runtime_field()

    @model_validator(mode="after")
    def _has_a_gpu_for_cuda(self) -> JobConfig:
        if self.model.device == "cuda" and self.runtime.gpus_per_actor == 0:
            raise ValueError("model.device is cuda and runtime.gpus_per_actor is 0; make one of them auto")
        return self

    @model_validator(mode="after")
    def _has_a_grammar_for_its_task(self) -> JobConfig:
        if (grammar := self.sampling.grammar) and (problem := grammar.misfit(self.task)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _draws_candidates_at_random(self) -> JobConfig:
        if self.task.candidates is not None and self.sampling.temperature == 0:
            raise ValueError("task.candidates are all the same at sampling.temperature 0; set one above 0")
        return self

    @field_validator("task", mode="before")
    @classmethod
    def _is_a_caption_unless_it_says_otherwise(cls, task: Any) -> Any:
        return {"kind": "caption", **task} if isinstance(task, dict) else task
