"""Why a folder's run is not this job's: every key that differs, with both values. Reads and writes nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.runs.run_folder import Run


def refusal(run: Run, found: dict[str, Any], differs: dict[str, tuple[Any, Any]], *, same_input: bool) -> str:
    """Every key that differs, with the value the folder has and the value of this job.

    Args:
        run: this job's.
        found: the folder's ``run.json``.
        differs: of the recipes, key -> the folder's and this job's value.
        same_input: both have the same items.
    """
    lines = [f"  {key}: {_short(there)} there, {_short(here)} here" for key, (there, here) in differs.items()]
    if found["items_per_shard"] != run.items_per_shard:
        lines.append(f"  output.items_per_shard: {found['items_per_shard']} there, {run.items_per_shard} here")
    if not same_input:
        lines.append(
            f"  input: {found['num_items']} items there, {len(run.manifest)} here (digest "
            f"{found['manifest_digest'][:12]} there, {run.manifest.digest[:12]} here): objects were added, removed or "
            "changed since the run began, or input.limit, input.pattern or the manifest is another"
        )
    return (
        f"{run.uri} holds another run; these keys differ:\n" + "\n".join(lines) + "\n"
        "Choose a new output.uri; to process only what is new, also set input.skip_done_in to the finished run's folder"
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
