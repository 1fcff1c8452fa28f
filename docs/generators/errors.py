"""docs/errors.md: every type of a failed row, and every exception with its exit code: meaning, cause, next command."""

from __future__ import annotations

from typing import NamedTuple

from docs.generators.markdown import GENERATED, table
from illava.errors import ILLaVAError
from pipeline import known_errors
from pipeline.errors import ItemError, PipelineError
from pipeline.records import ROW_ERROR_TYPES


class Words(NamedTuple):
    """What is said of one error: its meaning, its usual cause, and the next command."""

    meaning: str
    cause: str
    then: str


def _retry(*types: str, more: str = "") -> str:
    return f"`python -m pipeline retry RUN_URI --only {','.join(types)}{more}`"


ROWS: dict[str, Words] = {
    "unsafe_uri": Words(
        "The address is not one that jobs may read.",
        "Another scheme than `s3://`, `gs://`, `file:///` or a plain path; `..`, `::`, user info; a local path outside `input.uri`, also through a link; a file's name that is not UTF-8.",
        f"Links into a folder that may be read: {_retry('unsafe_uri', more=' --set input.follow_links=FOLDER')}. Else correct the manifest, rename the file, or set `input.uri` to the folder that holds the media; then run a new job.",
    ),
    "not_found": Words(
        "The store has no such object.",
        "It was deleted after the input was listed, or the manifest names it wrongly.",
        f"Put the object back, then {_retry('not_found')}.",
    ),
    "access_denied": Words(
        "The store refused this object, and others not.",
        "A policy on the object or prefix, or on its encryption key.",
        f"Give the job's role the right to read it, then {_retry('access_denied')}.",
    ),
    "store_error": Words(
        "The store kept failing for this object.",
        "Throttling, server errors or broken connections beyond all attempts.",
        f"{_retry('store_error')}, later or with fewer `runtime.num_reader_actors`.",
    ),
    "changed_object": Words(
        "Size or ETag differ from the frozen manifest's.",
        "The object was written again after the run began; or a body did not match its checksum.",
        "Run a new job into a new `output.uri`: this run's items are those it froze.",
    ),
    "too_large": Words(
        "The item is over a budget of bytes, pixels, seconds, images or pages, or over a reader's share of the cache.",
        "The message names the key and both numbers.",
        f"For the cache: {_retry('too_large', more=' --set runtime.cache_bytes=200_000_000_000')}. For a limit under `media`: a new run with a higher one.",
    ),
    "empty_media": Words(
        "Zero bytes, or no frames.", "An upload that never finished.", "Upload it again under a new run, or leave it."
    ),
    "unsupported_media": Words(
        "A container, codec or picture format that is not read.",
        "HEIC, raw formats; a codec without a decoder; frames that change their size or orientation midway; skewed rotation; a picture without a defined white (float, signed, CIELAB).",
        "Convert the file, for instance to H.264 in mp4 or to PNG.",
    ),
    "no_video_stream": Words(
        "The file has sound, subtitles or data, and no pictures.",
        "Audio saved as mp4.",
        "Leave it out of the manifest.",
    ),
    "corrupt_media": Words(
        "The bytes cannot be decoded.",
        "Truncated or damaged files; media that only decord or only PyAV reads.",
        "Try the file with `--set media.decoder=pyav` in a new run; else make it anew.",
    ),
    "encrypted_document": Words(
        "The PDF opens with a password only, or not with the one that was given.",
        "A protected file.",
        f"Give the password in the manifest's column `password`, or one for all PDFs in `ILLAVA_PDF_PASSWORD`: {_retry('encrypted_document')}. Or remove it, for instance with `qpdf --decrypt`, and run the file again.",
    ),
    "encrypted_video": Words(
        "The video needs a key.",
        "DRM (CENC, FairPlay, encrypted WebM), or a scrambled transport stream.",
        "Export it without encryption, and run it again; no player's licence is asked for here.",
    ),
    "dynamic_form": Words(
        "The PDF is a dynamic XFA form; its only page says that another reader is needed.",
        "A form made with Adobe LiveCycle or AEM.",
        "Open it in Adobe Acrobat and print it to PDF, then run that file.",
    ),
    "load_timeout": Words(
        "The load passed its deadline and its process was killed.",
        "Very long clips at high resolution, large PDFs, a slow store.",
        f"{_retry('load_timeout', more=' --set media.load_timeout_s=600')}.",
    ),
    "load_crashed": Words(
        "The decoder's process died.",
        "A file that crashes decord or FFmpeg; the kernel killing processes for want of memory.",
        f"{_retry('load_crashed')} once; then `--set media.decoder=pyav` in a new run.",
    ),
    "load_out_of_memory": Words(
        "Decoding wanted more than the 4 GiB its process may have.",
        "Frames or pages of many pixels.",
        "A new run with fewer `media.num_frames`, or a lower `media.page_dpi`.",
    ),
    "media_lost": Words(
        "The item was loaded and gone before the model saw it, on every attempt.",
        "Nodes that leave the cluster, or an object store of Ray's that is too small.",
        f"{_retry('media_lost')}.",
    ),
    "bad_request": Words(
        "The model cannot take this prompt with these media.",
        "A model that reads images only was given a video; no text where the plan compares pictures with it.",
        "Change the manifest or the model; new run.",
    ),
    "prompt_too_long": Words(
        "Prompt, media and answer are longer than the model's positions (`max_position_embeddings`).",
        "Many frames, images or pages in one request; a very long prompt; a large `sampling.max_new_tokens`. A larger cache helps nothing.",
        "Fewer `task.pages_per_request` or `media.num_frames`, a lower `media.max_pixels` or `media.max_tiles`, a lower `sampling.max_new_tokens`, a shorter prompt; or a model of more positions: new run. A plan that merges makes room only with `layout: released`, or at stage `media`.",
    ),
    "cache_too_small": Words(
        "More tokens than the whole KV cache holds.",
        "Many frames, images or pages in one request, on a device with little memory left beside the weights.",
        f"{_retry('cache_too_small', more=' --set model.kv_cache_bytes=20_000_000_000')}, as much as the device has; or as `prompt_too_long`. Runs of earlier versions call it `prompt_too_long`.",
    ),
    "out_of_memory": Words(
        "Too large for the device, even alone in its batch.",
        "One request's activations do not fit beside the weights and the KV cache.",
        f"{_retry('out_of_memory', more=' --set model.kv_cache_bytes=4_000_000_000')}, or a larger card.",
    ),
    "numerical_error": Words(
        "The logits were not finite.",
        "float16 in a model that overflows in it; damaged weights.",
        "`model.dtype: bfloat16` in a new run.",
    ),
    "invalid_answer": Words(
        "The answer is not the JSON that `task.json_schema` asks for, or no whole one of `sampling.grammar`.",
        "A cut answer (`finish_reason` is `length` or `loop`); with `task.enforce_schema: false` a model too weak for the schema.",
        "Raise `sampling.max_new_tokens`, or bound texts and lists in the schema (`maxLength`, `maxItems`), in a new run.",
    ),
    "reduction_did_not_fire": Words(
        "A configured step of the plan removed nothing for this item.",
        "A picture of so few tokens that there is nothing to remove.",
        "Leave the step out for such items: a run of their own with another plan.",
    ),
    "worker_died": Words(
        "The item ended its actor again and again, the last time alone.",
        "A crash in a driver or library that this item provokes.",
        f"Read the actor's log under `--debug`; {_retry('worker_died')} on other machines.",
    ),
    "item_timeout": Words(
        "The item never came back from the model.",
        "A hanging driver; an answer longer than `runtime.item_timeout_s` allows.",
        f"{_retry('item_timeout', more=' --set runtime.item_timeout_s=7200')}.",
    ),
    "internal_error": Words(
        "A defect of this program; the message names it.",
        "Ours.",
        f"Report it with the message; after an update {_retry('internal_error')}.",
    ),
}
EXCEPTIONS: dict[str, Words] = {
    "ConfigError": Words(
        "The configuration or the command line is wrong.",
        "Unknown keys, values out of range, flags that exclude each other; every problem at once, one a line.",
        "Correct what is named.",
    ),
    "MissingPackageError": Words(
        "A package is not installed.",
        "An extra such as `[s3]`, or another Python than the project's.",
        "Run the command that the message has.",
    ),
    "InputError": Words(
        "The manifest or listing cannot be used.",
        "No items, duplicate ids, a missing column, an address that is not allowed.",
        "Correct the manifest; the message names the rows.",
    ),
    "RefusedError": Words(
        "The output belongs to another run, or a run is not what the command needs.",
        "An `output.uri` used before with another configuration or input.",
        "`python -m pipeline status RUN_URI`; then another `output.uri`, or the keys back that differ.",
    ),
    "InterruptedRunError": Words(
        "A signal ended a command that has no answer without its end.",
        "Ctrl-C or SIGTERM in an estimate.",
        "The same command.",
    ),
    "StorageError": Words(
        "The store, or the disk for staging, failed for the whole run.",
        "No bucket, no space, no right to write.",
        "Mend it; the same command resumes.",
    ),
    "CredentialsError": Words(
        "Credentials are missing, wrong or expired.",
        "A session token that ran out.",
        "Renew them in the job's environment; the same command resumes.",
    ),
    "ClusterError": Words(
        "Ray cannot be started or reached, or its actors do not stay alive.",
        "No cluster at `RAY_ADDRESS`, too few cores, an image without the packages.",
        "`ray status`; the same command resumes.",
    ),
    "PlanError": Words(
        "The reduction plan makes no sense for this model.",
        "A layer the model has not, a method where its evidence is not measured, a preset of another family.",
        "See the [matrix of methods and families](plans-and-methods.md).",
    ),
    "ReductionDidNotFireError": Words(
        "A configured step removed nothing.", "See `reduction_did_not_fire`.", "Leave the step out."
    ),
    "RequestError": Words("A request this model cannot answer.", "In jobs a row `bad_request`.", "Change the request."),
    "RequestTooLargeError": Words(
        "One request, its media and its answer are longer than the model's positions.",
        "In jobs a row `prompt_too_long`.",
        "Fewer or smaller frames, images or pages at once, or a lower `max_new_tokens`.",
    ),
    "CacheTooSmallError": Words(
        "One request needs more KV blocks than the whole pool has.",
        "In jobs a row `cache_too_small`.",
        "Raise `kv_cache_bytes`, or fewer frames.",
    ),
    "PreprocessError": Words(
        "Frames that cannot be brought to model size.",
        "Wrong dtype or shape, an empty list.",
        "Give uint8 `[F, H, W, 3]`.",
    ),
    "ModelLoadError": Words(
        "Weights or configuration that cannot be loaded.",
        "A checkpoint in AWQ or GPTQ, an adapter of another model, another family, no safetensors, a wrong revision.",
        "See [choose a model](choose-a-model.md); `hf download MODEL --revision REVISION`.",
    ),
    "DeviceError": Words(
        "The device is not known, or this process has none.", "`cuda` without CUDA.", "`--set model.device=auto`."
    ),
    "RandomWeightsError": Words(
        "Quality was asked of random weights.",
        "A folder made for speed tests.",
        "Take trained weights, or `quality: false` in a sweep.",
    ),
    "NumericalError": Words(
        "The logits were not finite.", "In jobs a row `numerical_error`.", "`model.dtype: bfloat16`."
    ),
}
_HEAD = ("meaning", "usual cause", "next")


def page() -> str:
    """The whole page.

    Raises:
        SystemExit: a type or an exception has no text here, or a text belongs to none.
    """
    exceptions = {kind.__name__: kind for base in (PipelineError, ILLaVAError) for kind in _below(base)}
    exceptions.pop(ItemError.__name__)  # it becomes a row
    _complete("RowErrorType", set(ROWS), set(ROW_ERROR_TYPES))
    _complete("exceptions", set(EXCEPTIONS), set(exceptions))
    rows = [(f"`{name}`", *ROWS[name]) for name in ROW_ERROR_TYPES]
    raised = [(f"`{name}`", _exit_code(kind), *EXCEPTIONS[name]) for name, kind in exceptions.items()]
    known = [
        (
            ", ".join(f"`{name.removeprefix('builtins.')}`" for name in entry.classes),
            str(entry.exit_code),
            _advice(entry),
        )
        for entry in known_errors._TABLE
    ]
    parts = [GENERATED, "# Errors", _INTRODUCTION, "## Failed rows", _ROWS, table(("`error_type`", *_HEAD), rows)]
    parts += ["## Exceptions and exit codes", _EXCEPTIONS, table(("exception", "exit code", *_HEAD), raised)]
    parts += ["## Errors of Python and of libraries", _KNOWN, table(("exception", "exit code", "advice"), known)]
    return "\n\n".join(parts) + "\n"


def _advice(entry: known_errors._Entry) -> str:
    says = f" (where it says `{entry.says}`)" if entry.says else ""
    return f"{entry.advice}{says}"


def _below(base: type[Exception]) -> list[type[Exception]]:
    return [
        one for kind in base.__subclasses__() if kind.__module__.endswith(".errors") for one in (kind, *_below(kind))
    ]


def _exit_code(kind: type[Exception]) -> str:
    if kind.__name__ == "InterruptedRunError":
        return "130 or 143"
    return str(getattr(kind, "exit_code", 2))


def _complete(what: str, told: set[str], there: set[str]) -> None:
    if told != there:
        raise SystemExit(
            f"docs/generators/errors.py: {what} without a text or texts without one: {sorted(told ^ there)}"
        )


_INTRODUCTION = """\
An item that fails becomes a row with `status: failed`, an `error_type` from a closed list and a message; the run goes on
and ends with exit code 3. An error that concerns the whole run ends the command in words and with an exit code, and without a
traceback unless `--debug` is given. Rows that failed are computed again by
`python -m pipeline retry RUN_URI`, all of them or `--only` some types; good rows are never touched."""
_ROWS = "Count them: `SELECT error_type, count(*) FROM rows GROUP BY 1`. A page of a document uses the same types."
_EXCEPTIONS = "[Commands](cli.md) says what each exit code asks of whoever ran the command."
_KNOWN = """\
What a machine, a file or a setting can cause is told in words too. An exception that stands in none of these tables is called a
defect of this program, with exit code 5: please report it."""
