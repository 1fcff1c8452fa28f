"""Says what ``--without`` leaves out of rows that are shown or exported (`without`).

``uri`` is where the media lie: addresses, entity tags, and messages, which name files. ``prompt`` is what was asked:
the prompt, its options and the turns of the configuration. ``fields`` are the other columns of the user's manifest.
``frames`` are pictures of the media. Ids, answers and counts stay: an id is the user's own, or a hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConfigError

LEFT_OUT = "(left out)"  # where a text stood
# Kind -> the row's columns that go.
COLUMNS: dict[str, tuple[str, ...]] = {
    "uri": ("uri", "uris", "media_etag", "error_message"),
    "prompt": ("prompt", "options"),
    "fields": ("fields",),
    "frames": ("frame_timestamps_s",),
}
# Kind -> the keys of a recorded configuration that go.
CONFIG_KEYS: dict[str, tuple[str, ...]] = {
    "uri": ("input.uri", "input.manifest", "input.pattern", "input.exclude_runs", "input.follow_links"),
    "prompt": (
        "task.prompt",
        "task.system_prompt",
        "task.turns",
        "task.prompt_template",
        "task.choice_template",
        "task.open_template",
        "task.refine",
    ),
}


def parse_without(text: str) -> frozenset[str]:
    """Read ``uri,prompt,fields,frames`` or some of it.

    Raises:
        ConfigError: a word is none of these.
    """
    kinds = frozenset(word.strip() for word in text.split(",") if word.strip())
    if unknown := sorted(kinds - COLUMNS.keys()):
        raise ConfigError(f"--without {', '.join(unknown)}: there are {', '.join(COLUMNS)}")
    return kinds


def columns_without(kinds: frozenset[str]) -> frozenset[str]:
    """Return the row's columns that go."""
    return frozenset(name for kind in kinds for name in COLUMNS[kind])


def without(row: Mapping[str, Any], kinds: frozenset[str]) -> dict[str, Any]:
    """Return a row's other columns; messages of its pages go with the row's own."""
    gone = columns_without(kinds)
    kept = {name: value for name, value in row.items() if name not in gone}
    if "error_message" in gone and kept.get("pages"):
        kept["pages"] = [{**page, "error_message": None} for page in kept["pages"]]
    return kept


def config_without(config: Mapping[str, Any], kinds: frozenset[str]) -> dict[str, Any]:
    """Return a recorded configuration in which what goes is `LEFT_OUT` where it was a text, else null."""
    changed = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    for section, _, name in (key.partition(".") for kind in kinds for key in CONFIG_KEYS.get(kind, ())):
        keys = changed.get(section)
        if isinstance(keys, dict) and name in keys:
            keys[name] = LEFT_OUT if isinstance(keys[name], str) else None
    return changed
