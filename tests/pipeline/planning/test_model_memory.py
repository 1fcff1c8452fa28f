"""What a dry run says of memory: weights by scheme, cache and activations against the common cards."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs.generators import memory
from illava.engine.config import EngineConfig
from illava.memory_counts import CONTEXT_BYTES, MemoryCounts, fit, memory_counts
from illava.model_files import load_model_files
from illava.weight_files import count_stored
from pipeline.config.load import load_config
from pipeline.planning.model_fit import model_fit
from pipeline.runs.run import plan_run
from tests.support.models.quantised_models import make_quantised
from tests.support.runs.fakes import job_config

ROOT = Path(__file__).resolve().parents[3]
GB = 10**9


def test_a_model_fits_where_pool_and_activations_fit_beside_its_weights() -> None:
    counts = MemoryCounts(kv_token_bytes=57_344, activation_bytes=2 * GB)
    left = 24 * GB - CONTEXT_BYTES - 16 * GB
    assert fit(counts, 16 * GB, 24 * GB).cache_bytes == int(0.6 * left)
    assert fit(counts, 16 * GB, 24 * GB).fits  # 2.9 GB are left beside the pool
    assert not fit(counts, 19 * GB, 24 * GB).fits  # 1.7 GB are
    assert fit(counts, 19 * GB, 24 * GB, cache_bytes=2 * GB).fits
    assert not fit(counts, 24 * GB, 24 * GB).fits
    assert not fit(counts, 16 * GB, 24 * GB, share=0.5).fits


def test_the_widest_place_decides(onevision_folder) -> None:
    """4 layers of 2 key/value heads of 8; a tower's call of 32,768 patches is wider than a prefill."""
    files = load_model_files(str(onevision_folder))
    found = memory_counts(files, 2, EngineConfig(max_batch_requests=1))
    vocabulary = files.config["text_config"]["vocab_size"]
    assert found == MemoryCounts(4 * 2 * 2 * 8 * 2, 2 * (32_768 * (4 * 32 + 3 * 64) + 3 * vocabulary))


def said(folder, tmp_path, **model) -> dict[str, str]:
    run = plan_run(
        job_config(
            tmp_path / "out",
            {"uri": str(tmp_path)},
            model={"model_id": str(folder), "dtype": "bfloat16", "device": "auto"} | model,
        )
    )
    return dict(model_fit(run))


def weight_words(lines: dict[str, str]) -> str:
    return lines[""].removeprefix("for ").partition(" of weights")[0]


def test_a_dry_run_names_the_cards(onevision_folder, tmp_path) -> None:
    (tmp_path / "0.mp4").write_bytes(b"")
    lines = said(onevision_folder, tmp_path)
    sizes = re.findall(r"(\d+) GB: ([\d,]+)k tokens cached", lines["a card of"])
    assert [size for size, _ in sizes] == ["24", "48", "80", "141"]
    int8 = said(onevision_folder, tmp_path, quantization="int8")
    assert lines[""].endswith(" MB of activations at most, 0.256 kB a token")
    assert weight_words(lines) != weight_words(int8)
    assert "a card of" not in said(onevision_folder, tmp_path, device="cpu")


def test_weights_that_stay_float8_are_counted_as_stored(onevision_folder, tmp_path) -> None:
    (tmp_path / "0.mp4").write_bytes(b"")
    fp8 = make_quantised(onevision_folder, tmp_path / "fp8", "compressed-fp8")
    scheme = load_model_files(str(fp8)).stored_scheme
    assert scheme is not None
    assert scheme.has_common_product
    stored = count_stored(fp8, scheme)
    assert stored is not None
    assert weight_words(said(fp8, tmp_path)) == f"{stored.stored_bytes / 1e6:.3g} MB"


@pytest.mark.parametrize("gigabytes", [24, 48])
def test_the_profiles_for_two_cards_fit_them(gigabytes) -> None:
    config = load_config(ROOT / "configs" / f"caption_videos_qwen2_5_vl_{gigabytes}gb.yaml")
    name = config.model.model_id.partition("/")[2]
    published = memory.CHECKPOINTS[name]
    weights = memory.weight_counts(published).num_bytes(2, config.model.quantization)
    card = fit(memory.counts_of(name, published), weights, gigabytes * GB, cache_bytes=config.model.kv_cache_bytes)
    assert card.fits
    # 16 frames of 720p: 598 tokens a frame unreduced, in the worst layer; each running request has its own
    assert card.cache_bytes >= config.model.max_batch_requests * 57_344 * 8 * 598


def test_a_72b_runs_on_one_card_of_141_gb_in_float8_alone() -> None:
    name = "llava-onevision-qwen2-72b-ov-hf"
    published = memory.CHECKPOINTS[name]
    counts, weights = memory.counts_of(name, published), memory.weight_counts(published)
    assert [fit(counts, weights.num_bytes(2, scheme), 141 * GB).fits for scheme in ("none", "float8")] == [False, True]


def test_the_pages_sizes_are_those_of_its_table_of_checkpoints() -> None:
    page = (ROOT / "docs" / "choose-a-model.md").read_text("utf-8")
    first = dict(re.findall(r"^\| `[\w.-]+/([\w.-]+)` \| ([\d.]+) \|", page, flags=re.MULTILINE))
    shared = first.keys() & memory.CHECKPOINTS.keys()
    assert len(shared) >= 9
    for name in shared:
        assert memory.CHECKPOINTS[name].values * 2 == pytest.approx(float(first[name]), rel=0.02), name
