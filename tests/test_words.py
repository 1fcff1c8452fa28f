"""The field's words instead of the project's former ones: a former identifier stands in no code.

Names are read by `tokenize` and, in f-strings, by `ast`, so English words in prose and strings are free.
`docs/glossary.md` gives the words themselves. Time: 4 s of one core.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("illava/", "pipeline/", "jobs/", "benchmarks/", "docs/", "tests/")
ILLAVA = ("illava/", "tests/illava/")
PIPELINE = ("pipeline/", "tests/pipeline/", "tests/support/runs/")
# Former identifier -> today's, by the folders or files (of a name's beginning) in which it must not stand.
WORDS: dict[tuple[str, ...], dict[str, str]] = {
    CODE: {
        # tokens and reduction
        "lift": "embed_in_batch",
        "keep_owners": "assign_to_representatives",
        "Entrance": "PatchSelection",
        "entrance": "patch_selection",
        "Survivors": "KeptTokens",
        "survivors": "kept_tokens",
        "EncodedMedium": "EncodedVisual",
        "MediumPiece": "VisualSpan",
        "TextPiece": "TextSpan",
        "MediumCells": "VisualCells",
        "medium_keys": "visual_keys",
        "medium_seeds": "visual_seeds",
        "medium_place": "visual_coords",
        "idle_steps": "noop_steps",
        "_refuse_idle": "_refuse_noop",
        "patch_place": "patch_coords",
        "add_medium": "add_visual",
        "of_medium": "of_visual",
        "medium_P": "visual_P",
        # engine
        "MediaStage": "MediaPhase",
        "EncodingStage": "EncodePhase",
        "PrefillStage": "PrefillPhase",
        "LiveRequest": "RequestState",
        "KnownMedia": "MediaDedupCache",
        "FreePages": "BlockAllocator",
        "BatchPages": "BatchBlockTables",
        "LayerPages": "LayerBlockTable",
        "outcomes_of": "to_outcomes",
        "draw_next": "sample_next_token",
        "num_common": "common_prefix_len",
        "held_of": "cached_prefix",
        "FittingBatch": "OOMBackoff",
        "lost_s": "wasted_s",
        # loading and storage
        "DoubtError": "RangeReadUnsafeError",
        "Stretch": "GopSegment",
        "starts_afresh": "is_idr",
        "can_be_entered": "is_random_access_point",
        "last_words": "stderr_tail",
        "StayingSession": "NoRedirectSession",
        # execution
        "Passage": "ItemTimeline",
        "DeathCount": "CircuitBreaker",
        "Allowance": "BudgetGuard",
        "Tally": "RunStats",
        "Flow": "QueueDepths",
        "FAREWELL_S": "SHUTDOWN_TIMEOUT_S",
        "Hold": "SharedBuffer",
        "Patience": "ActorPoolAutoscaler",
        # runs and configuration
        "Recipe": "ConfigFingerprint",
        "resolve_recipe": "resolve_config_fingerprint",
        "recorded_recipe": "recorded_config_fingerprint",
        "recipe_difference": "config_diff",
        "recipe_fields": "result_fields",
        "skip_done_in": "exclude_runs",
        # planning, evaluation and report
        "foretell": "estimate",
        "foretold": "estimated",
        "_foretell": "_estimated",
        "render_plan": "render_dry_run",
        "render_sweep_plan": "render_sweep_dry_run",
        "adapt": "convert_rows",
        "AdaptedItem": "ConvertedItem",
        "dearest": "most_expensive",
        "slanted": "skewed",
        "truths": "references",
        "render_truth": "render_references",
    },
    (*ILLAVA, "benchmarks/", "tests/benchmarks/", "pipeline/report/", "tests/support/models/"): {
        "medium": "visual",
        "mediums": "visuals",
        "carry": "gather_kept",
    },
    ("illava/reduction/", "illava/families/", "tests/illava/"): {
        "entered": "original_index",
        "entered_of": "original_indices",
        "num_entered": "num_original",
        "by_entered": "by_original_index",
    },
    ("illava/reduction/", "tests/illava/reduction/"): {
        "standing": "select",
        "joined": "merge_frames",
    },
    (
        "illava/tokens.py",
        "illava/preprocess.py",
        "illava/reducers/",
        "illava/families/",
        "illava/engine/",
        "illava/reduction/patch_selection.py",
        "illava/reduction/grid_",
        "pipeline/report/",
        "tests/illava/reducers/",
        "tests/illava/families/",
        "tests/pipeline/report/",
    ): {
        "owner": "representative",
        "owners": "representatives",
        "owner_T": "representative_T",
        "owner_P": "representative_P",
        "owner_N": "representative_N",
        "owner_RC": "representative_RC",
        "owner_FRC": "representative_FRC",
    },
    (*ILLAVA, "tests/support/", "benchmarks/"): {
        "num_slots": "num_placeholders",
        "slot_K": "placeholder_K",
    },
    ILLAVA: {
        "front": "take_batch",
        "isolated": "run_with_fallback",
        "unify": "intern",
        "alike": "prefix_lengths",
        "_num_alike": "_common_prefix_len",
        "beginning": "prefix",
        "held_by_layer": "computed_by_layer",
        "own_patches": "patches_per_request",
    },
    ("illava/engine/", "tests/illava/engine/"): {
        "held": "num_computed",
        "room": "capacity",
        "abandon": "reset",
        "Advance": "StepResult",
        "Entry": "BatchInput",
    },
    ("illava/decoder/", "illava/engine/", "illava/attention/", "illava/vlm.py", "tests/illava/decoder/"): {
        "page": "block",
        "pages": "blocks",
        "page_size": "block_size",
        "page_bytes": "block_bytes",
        "num_pages": "num_blocks",
        "num_free_pages": "num_free_blocks",
        "num_pages_for": "num_blocks_for",
        "shared_pages": "shared_blocks",
        "own_pages": "own_blocks",
        "free_pages": "free_blocks",
        "batch_pages": "block_tables",
        "spare": "null_block",
        "PAGE": "BLOCK_SIZE",
    },
    ("pipeline/",): {"medium": "mm_item", "truth": "references"},
    PIPELINE: {
        "dismiss": "release",
        "dismissed": "released",
        "FAREWELL_S": "SHUTDOWN_TIMEOUT_S",
    },
    ("pipeline/execution/", "tests/pipeline/execution/"): {
        "followers": "shared_load_items",
        "settle": "finalize",
        "tally": "stats",
        "suspect": "quarantined",
        "suspects": "quarantined",
        "follower": "shared_load_item",
        "see": "observe",
        "turn": "poll",
        "room": "capacity",
        "abandon": "reset",
        "Advance": "StepResult",
        "Entry": "BatchInput",
    },
    ("pipeline/loading/", "tests/pipeline/loading/"): {"Child": "SandboxProcess"},
    ("pipeline/config/base.py", "pipeline/config/schema.py", "pipeline/config/tasks.py"): {
        "execution": "runtime_field",
        "rows": "result_field",
    },
    ("pipeline/runs/", "pipeline/execution/", "pipeline/planning/", "tests/pipeline/"): {
        "claim": "create_or_resume",
        "reopen": "unfinish",
        "adopt": "resume_run",
        "refusal": "config_mismatch_message",
    },
}
# Files that may name a former word: they accept it, or test that it is accepted.
ALLOWED: dict[str, set[str]] = {"tests/pipeline/test_old_names.py": {"skip_done_in"}}
# What users typed, as it stood in texts of every kind, and where it may still be read.
TYPED = {
    r"skip_done_in": "exclude_runs",
    r"--plan\b(?!s)": "--dry-run",
    r"--probe\b": "--estimate",
    r"pipeline adapt\b": "convert",
}
TEXTS = (*CODE, "configs/", "README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "mkdocs.yml")
MAY_BE_READ = (
    "docs/glossary.md",
    "pipeline/cli.py",
    "pipeline/old_names.py",
    "pipeline/runs/run_record.py",
    "tests/pipeline/runs/data/",
    "tests/pipeline/test_old_names.py",
    "tests/test_words.py",
)


def files() -> list[str]:
    found = (path.relative_to(ROOT).as_posix() for top in CODE for path in (ROOT / top).rglob("*.py"))
    return sorted(name for name in found if "runs_27c8a0a" not in name and name != "tests/test_words.py")


def names_of(source: str) -> dict[str, int]:
    """The identifiers of a source, each with the first line it stands on."""
    found: dict[str, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            found.setdefault(token.string, token.start[0])
    for text in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr)):
        for node in ast.walk(text):  # until Python 3.12 the whole f-string is one token
            name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node))
            if name:
                found.setdefault(getattr(node, name), text.lineno)
    return found


@cache
def names() -> dict[str, dict[str, int]]:
    return {name: names_of((ROOT / name).read_text("utf-8")) for name in files()}


@pytest.mark.parametrize("where", WORDS, ids=lambda where: where[0])
def test_no_code_has_a_former_word(where) -> None:
    found = defaultdict(list)
    for name, identifiers in names().items():
        for old in identifiers.keys() & WORDS[where].keys():
            if name.startswith(where) and old not in ALLOWED.get(name, set()):
                found[f"{old} is called {WORDS[where][old]}"].append(f"{name}:{identifiers[old]}")
    assert dict(found) == {}


def test_nobody_is_told_to_type_a_former_name() -> None:
    found = []
    for path in texts():
        name = path.relative_to(ROOT).as_posix()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            found += [f"{name}:{number}: {old} is {new} now" for old, new in TYPED.items() if re.search(old, line)]
    assert found == []


def test_no_page_shows_a_former_identifier() -> None:
    """In backticks; of the words that are former ones everywhere."""
    found = []
    for path in (path for path in texts() if path.suffix == ".md"):
        spans = re.findall(r"`([^`\n]+)`", path.read_text("utf-8"))
        old = {word for span in spans for word in re.findall(r"\w+", span)} & WORDS[CODE].keys()
        found += [f"{path.relative_to(ROOT)}: {word} is called {WORDS[CODE][word]}" for word in sorted(old)]
    assert found == []


def texts() -> list[Path]:
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".jinja", ".json", ""}
    paths = [path for top in TEXTS for path in ([ROOT / top] if (ROOT / top).is_file() else (ROOT / top).rglob("*"))]
    return [
        path
        for path in paths
        if path.is_file()
        and path.suffix in kinds
        and "__pycache__" not in path.parts
        and not path.relative_to(ROOT).as_posix().startswith(MAY_BE_READ)
    ]


def test_names_are_read_and_prose_is_not() -> None:
    source = '"""Things carry on."""\n# carry\ncarry = f"{lift} carry"\n'
    assert names_of(source) == {"carry": 3, "lift": 3}


def test_the_table_is_about_this_repository() -> None:
    """Every place exists, every exception is one, no word of today is a former one of the same place."""
    for where, words in WORDS.items():
        assert [place for place in where if not any(name.startswith(place) for name in names())] == []
        assert words.keys().isdisjoint(words.values())
    for name, allowed in ALLOWED.items():
        assert allowed <= names()[name].keys()
