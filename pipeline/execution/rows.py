"""Makes result rows of items and generations, and merges the answers to one item's several requests into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from illava.requests import Generation, Timing, TokenUsage
from pipeline.config.placement import gpus_of
from pipeline.config.schema import JobConfig
from pipeline.cost import item_cost_usd
from pipeline.errors import classify
from pipeline.records import LoadedItem, LoadStats, MediaItem, ResultRow, RowErrorType
from pipeline.retention import retention_ratio
from pipeline.tasks.build import build_task
from pipeline.tasks.document import pages_outcome
from pipeline.tasks.grammar import grammar_fault

if TYPE_CHECKING:
    from illava.requests import FinishReason


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Names the run in every row; a ``plan_digest`` of None stands for the configuration's own."""

    recipe_digest: str
    run_fingerprint: str
    plan_digest: str | None = None


@dataclass(frozen=True, slots=True)
class RowMaker:
    """Makes the rows of one run; workers and the driver both use it."""

    config: JobConfig
    run: RunInfo

    def answered(
        self,
        loaded: LoadedItem,
        generations: Sequence[Generation],
        *,
        attempts: int,
        shard_index: int,
        candidates: Sequence[Sequence[str]] = (),
        drafts: Sequence[Sequence[str]] = (),
    ) -> ResultRow:
        """Make the row of an item that the model answered or failed on; its ``latency_s`` is 0 and set later.

        Args:
            loaded: the media that the model was given.
            generations: the model's answers, one per request, in order.
            attempts: times the item was started.
            shard_index: the shard that the item belongs to.
            candidates: of each request that was answered, the texts of all its answers.
            drafts: of each request that was answered, the texts before the last pass.
        """
        item, task, whole = loaded.item, build_task(self.config.task), merge_chunk_results(generations)
        timing = whole.timing
        measured: dict[str, Any] = {
            "frame_timestamps_s": loaded.frame_timestamps_s,
            "num_frames": len(loaded.frame_timestamps_s) or len(loaded.media),
            "num_pages": loaded.num_pages,
            "queue_s": timing.queue_s,
            "vision_s": timing.vision_s,
            "prefill_s": timing.prefill_s,
            "decode_s": timing.decode_s,
            "gpu_s": timing.device_s,
            **_usage(whole),
            "candidates": _joined(candidates),
            "drafts": _joined(drafts),
        }
        pages = task.pages(loaded, generations)
        if whole.error is not None:
            error_type, message = classify(whole.error)
            measured |= {"status": "failed", "error_type": error_type, "error_message": message}
        else:
            parsed = task.parse(item, whole.text)
            measured |= {
                "status": "partial" if loaded.partial else "ok",
                "error_message": loaded.partial,
                "text": whole.text,
                "answer": parsed.answer,
                "score": parsed.score,
                "finish_reason": whole.finish_reason,
                "answer_logprob": fmean(whole.token_logprobs) if whole.token_logprobs else None,
                "option_probabilities": whole.choice_probabilities,
            }
            if pages is None and (fault := grammar_fault(whole, self.config.sampling.grammar)):
                wrong = {"status": "failed", "error_type": "invalid_answer", "error_message": fault}
                measured |= wrong | {"answer": None, "score": None}
        if pages is not None:
            measured |= {"pages": pages, **pages_outcome(pages, loaded.page_notes)}
        return self._row(item, loaded.stats, attempts=attempts, shard_index=shard_index, **measured)

    def failed(
        self,
        item: MediaItem,
        error_type: RowErrorType,
        message: str,
        *,
        attempts: int,
        shard_index: int,
        stats: LoadStats | None = None,
    ) -> ResultRow:
        """Make the row of an item that never reached the model, or never came back from the model."""
        return self._row(
            item,
            stats or LoadStats(),
            attempts=attempts,
            shard_index=shard_index,
            status="failed",
            error_type=error_type,
            error_message=message,
        )

    def _row(self, item: MediaItem, stats: LoadStats, **measured: Any) -> ResultRow:
        config = self.config
        values: dict[str, Any] = {
            **_EMPTY,
            "item_id": item.item_id,
            "uri": item.uris[0],
            "uris": item.uris,
            "media_kind": item.media_kind,
            "media_etag": item.etags[0] or None if item.etags else None,
            "question_id": item.question_id,
            "prompt": build_task(config.task).prompt(item),
            "options": item.options,
            "category": item.category,
            "reference": item.reference,
            "fields": item.fields,
            "decoder": stats.decoder,
            "bytes_fetched": stats.bytes_fetched,
            "fetch_s": stats.fetch_s,
            "load_s": stats.load_s,
            "preprocess_s": stats.preprocess_s,
            "cpu_s": stats.cpu_s,
            "cost_usd": item_cost_usd(
                config.prices,
                gpu_s=measured.get("gpu_s", 0.0),
                cpu_s=stats.cpu_s,
                storage_requests=stats.storage_requests,
                gpus_per_actor=gpus_of(config),
                cpus_per_actor=config.runtime.cpus_per_actor,
            ),
            "model_id": config.model.model_id,
            "model_revision": config.model.revision,
            "plan_digest": self.run.plan_digest or config.reduction.digest(),
            "recipe_digest": self.run.recipe_digest,
            "run_fingerprint": self.run.run_fingerprint,
        }
        return ResultRow(**{**values, **measured})


# A row's values where nothing was measured.
_NO_COUNTS = ("num_frames", "num_patches", "num_patches_kept", "num_vision_tokens", "num_vision_tokens_kept")
_NO_TOKENS = ("num_decoder_tokens_kept", "num_prompt_tokens", "num_generated_tokens")
_NO_SECONDS = ("queue_s", "model_wait_s", "vision_s", "prefill_s", "decode_s", "latency_s", "gpu_s")
_EMPTY: dict[str, Any] = {
    "text": "",
    "candidates": None,
    "drafts": None,
    "answer": None,
    "score": None,
    "pages": None,
    "num_pages": None,
    "error_type": None,
    "error_message": None,
    "finish_reason": None,
    "finished_at": None,
    "answer_logprob": None,
    "option_probabilities": None,
    "frame_timestamps_s": (),
    "kept_ratio": 0.0,
    "retention_ratio": None,
    **dict.fromkeys((*_NO_COUNTS, *_NO_TOKENS), 0),
    **dict.fromkeys(_NO_SECONDS, 0.0),
}


def _joined(texts: Sequence[Sequence[str]]) -> tuple[str, ...] | None:
    """Join the windows' texts, as `merge_chunk_results` joins their answers."""
    return tuple("\n\n".join(of_windows) for of_windows in zip(*filter(None, texts), strict=True)) or None


def _usage(generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    if usage is None:
        return {}
    total = usage.num_vision_tokens
    return {
        "num_patches": usage.num_patches,
        "num_patches_kept": usage.num_patches_kept,
        "num_vision_tokens": total,
        "num_vision_tokens_kept": usage.num_vision_tokens_kept,
        "num_decoder_tokens_kept": usage.num_decoder_tokens_kept,
        "kept_ratio": usage.num_vision_tokens_kept / total if total else 0.0,
        "retention_ratio": retention_ratio(usage.num_decoder_tokens_kept, total),
        "num_prompt_tokens": usage.num_prompt_tokens,
        "num_generated_tokens": usage.num_generated_tokens,
    }


def merge_chunk_results(generations: Sequence[Generation]) -> Generation:
    """Merge the results of an item's chunks: join texts with a blank line, sum counts and seconds.

    The result carries an error only where no chunk was answered.

    Args:
        generations: results of requests that ran one after the other; their seconds hold no wait between them.
    """
    if len(generations) == 1:
        return generations[0]
    answered = [generation for generation in generations if generation.error is None]
    reasons = {generation.finish_reason for generation in answered}
    reason: FinishReason = "loop" if "loop" in reasons else "length" if "length" in reasons else "stop"
    told = [generation.token_logprobs for generation in answered if generation.token_logprobs is not None]
    return Generation(
        request_id=generations[0].request_id,
        text="\n\n".join(generation.text for generation in answered),
        token_ids=tuple(token for generation in answered for token in generation.token_ids),
        finish_reason=reason if answered else None,
        usage=_sum_of_usages(generations),
        timing=_sum_of_timings(generations),
        error=None if answered else generations[0].error,
        token_logprobs=tuple(logprob for one in told for logprob in one) if told else None,
    )


def of_two_tries(looped: Generation, again: Generation) -> Generation:
    """Return a request's second answer, with the counts and seconds of both."""
    both = (looped, again)
    return replace(again, usage=_sum_of_usages(both), timing=_sum_of_timings(both))


def of_second_pass(draft: Generation, answer: Generation) -> Generation:
    """Return a turn's second answer, with the tokens and seconds of both; the media were seen once."""
    both = (draft, answer)
    return replace(answer, usage=_usage_of_passes(both), timing=_sum_of_timings(both), encoding=None)


def of_candidates(answer: Generation, ended: Sequence[Generation]) -> Generation:
    """Return one of a turn's candidates, with the tokens of all; the media were seen once.

    Args:
        answer: the one that stands for all.
        ended: all of them in the order of their ends: they began together, so the last one's seconds are the turn's.
    """
    device_s = sum(one.timing.device_s for one in ended)
    return replace(answer, usage=_usage_of_passes(ended), timing=replace(ended[-1].timing, device_s=device_s))


def _usage_of_passes(generations: Sequence[Generation]) -> TokenUsage | None:
    """Of passes over the same media: tokens read and drawn add up, what concerns the media counts once."""
    usages = [generation.usage for generation in generations if generation.usage is not None]
    if not usages:
        return None
    first = max(usages, key=lambda usage: usage.num_patches)  # a pass over kept features shows the tower nothing
    totals = {name: sum(getattr(usage, name) for usage in usages) for name in _TEXT_COUNTS}
    return replace(first, **totals)


def _sum_of_usages(generations: Sequence[Generation]) -> TokenUsage | None:
    usages = [generation.usage for generation in generations if generation.usage is not None]
    return TokenUsage(*(sum(getattr(u, name) for u in usages) for name in _COUNTS)) if usages else None


def _sum_of_timings(generations: Sequence[Generation]) -> Timing:
    return Timing(*(sum(getattr(g.timing, f.name) for g in generations) for f in fields(Timing)))


_COUNTS = tuple(f.name for f in fields(TokenUsage) if f.name.startswith("num_"))
_TEXT_COUNTS = ("num_prompt_tokens", "num_generated_tokens")
