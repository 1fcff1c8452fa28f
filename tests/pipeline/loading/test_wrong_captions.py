"""Tests whole runs against a store that sends wrong bytes: no caption is made of them, and every item has its row.

The caption is a digest of all pixels, so one changed byte would be another caption. Pictures are uncompressed, so that
no decoder notices it first; videos are read by ranges. About 4 s in `make test`; 500 items in `make test-long`.
"""

from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.execution.runner import run_job
from pipeline.loading.loader import Loader
from tests.support.media.clips import write_video
from tests.support.media.long_videos import noisy_frames
from tests.support.models.digest_model import digest_worker
from tests.support.runs import fakes
from tests.support.stores.wrong_store import ALWAYS, WRONG_BODIES, WRONG_RANGES, WRONG_VERSIONS, Served

RANGED_FROM_BYTES = 50_000
H264 = {"crf": "23", "preset": "ultrafast", "threads": "1"}
FROM_RANGES = ("cut off", "short", "long", *WRONG_VERSIONS, *WRONG_RANGES)
# What is read, what is wrong with its answers, after how many right ones, and for how many.
CASES = [
    *(("picture", fault, 0, many) for fault in (*WRONG_BODIES, *WRONG_VERSIONS) for many in (ALWAYS, 1)),
    *(("video", fault, 0, many) for fault in FROM_RANGES for many in (ALWAYS, 1)),
    *(("video", fault, 2, ALWAYS) for fault in FROM_RANGES),
]


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Kind -> its bytes before and after a change, of one size."""
    folder = tmp_path_factory.mktemp("versions")
    frames = noisy_frames(60, side=96)
    videos = [
        write_video(folder / f"{n}.mp4", shown, keyframe_interval=5, options=H264).read_bytes()
        for n, shown in enumerate((frames, frames[::-1]))
    ]
    size = max(map(len, videos)) + 8
    return {"picture": [_bitmap(seed) for seed in (1, 2)], "video": [_padded(data, size) for data in videos]}


def _bitmap(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (112, 112, 3), np.uint8)
    Image.fromarray(pixels).save(data := io.BytesIO(), "BMP")
    return data.getvalue()


def _padded(mp4: bytes, size: int) -> bytes:
    """With a box at the end that players pass over."""
    return mp4 + (size - len(mp4)).to_bytes(4) + b"free" + bytes(size - len(mp4) - 8)


def run(wrong_store, folder, served, **media):
    """Item id -> row, of one run over those objects."""
    lines = []
    for item_id, one in served.items():
        uri = f"s3://bucket/{item_id}"
        wrong_store.put(uri, one)
        lines.append(json.dumps({"item_id": item_id, "uri": uri, "size": len(one.old), "etag": one.etag}))
    (folder / "items.jsonl").write_text("\n".join(lines))

    def loader(config, preprocessor):
        return Loader(config.media, preprocessor, ranged_from_bytes=RANGED_FROM_BYTES)

    config = fakes.job_config(
        folder / "out",
        {"manifest": str(folder / "items.jsonl")},
        media={"num_frames": 2, "decoder": "pyav", **media},
        runtime={"max_attempts": 2},
        output={"items_per_shard": 64},
    )
    run_job(config, worker_factory=digest_worker, loader_factory=loader)
    assert fakes.violations(folder / "out") == []
    return {row["item_id"]: row for row in fakes.read_rows(folder / "out")}


def served_cases(versions, num_items):
    """Item id -> what is served, the cases in turn; and both versions of each kind, served rightly."""
    suffix = {"picture": "bmp", "video": "mp4"}
    served = {}
    for kind, (old, new) in versions.items():
        served[f"old-{kind}.{suffix[kind]}"] = Served(old, new)
        served[f"new-{kind}.{suffix[kind]}"] = Served(new, old)
    for n in range(num_items):
        kind, fault, num_right, num_wrong = CASES[n % len(CASES)]
        old, new = versions[kind]
        options = {"num_right": num_right, "num_wrong": num_wrong, "is_multipart": n // len(CASES) % 2 == 1}
        served[f"{n}-{kind}.{suffix[kind]}"] = Served(old, new, fault, seed=n, **options)
    return served


@pytest.mark.parametrize("num_items", [len(CASES), pytest.param(500, marks=pytest.mark.long)])
def test_wrong_answers_give_no_caption_of_their_bytes(wrong_store, versions, tmp_path, num_items):
    served = served_cases(versions, num_items)
    rows = run(wrong_store, tmp_path, served)
    assert set(rows) == set(served)
    right = {kind: rows[name]["text"] for name in rows for kind in versions if name.startswith(f"old-{kind}")}
    other = {kind: rows[name]["text"] for name in rows for kind in versions if name.startswith(f"new-{kind}")}
    assert len({*right.values(), *other.values()}) == 4, "every version has its own caption"
    statuses = Counter()
    for n in range(num_items):
        kind, fault, num_right, num_wrong = CASES[n % len(CASES)]
        (row,) = (rows[name] for name in (f"{n}-{kind}.bmp", f"{n}-{kind}.mp4") if name in rows)
        case = n, kind, fault, num_right, num_wrong, row["status"], row["error_message"]
        assert row["text"] == (right[kind] if row["status"] == "ok" else ""), case
        may_recover = num_wrong == 1 and fault not in {*WRONG_VERSIONS, *WRONG_RANGES}
        assert row["status"] == ("ok" if may_recover else "failed"), case
        if row["status"] == "failed":
            expected = "changed_object" if fault in {*WRONG_VERSIONS, *WRONG_RANGES} else "store_error"
            assert row["error_type"] == expected, case
        statuses[kind, row["status"]] += 1
    assert min(statuses.values()) >= num_items // len(CASES) * 3
    assert len(statuses) == 4


def test_videos_here_are_read_by_ranges(wrong_store, versions, tmp_path):
    served = {"old.mp4": Served(*versions["video"])}
    (row,) = run(wrong_store, tmp_path, served).values()
    assert 0 < row["bytes_fetched"] < 0.6 * len(served["old.mp4"].old)
    assert wrong_store.num_asked["/bucket/old.mp4"] >= 3, "so a case that is right twice is wrong within one load"


@pytest.mark.parametrize(("verify", "status"), [("auto", "failed"), ("off", "ok")])
def test_a_store_whose_tags_are_no_md5_can_be_told(wrong_store, versions, tmp_path, verify, status):
    served = {"old.bmp": Served(*versions["picture"], tag="0123456789abcdef" * 2)}
    (row,) = run(wrong_store, tmp_path, served, verify_md5=verify).values()
    assert row["status"] == status
    assert ("media.verify_md5=off" in (row["error_message"] or "")) == (status == "failed")
