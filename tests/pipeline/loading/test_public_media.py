"""Tests benchmarks/reliability/public_media.py on files of the test corpus: sums by kind, and what must not happen.

About 4 s.
"""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.reliability import public_media
from pipeline.records import ROW_ERROR_TYPES
from tests.support.media import adversarial_documents, adversarial_pictures, adversarial_videos
from tests.support.media.stream_writers import DATA
from tests.support.runs import fakes

FILES = [
    *[file for file in adversarial_videos.READABLE if file.name in {"h264.mp4", "vp8.webm", "mjpeg.avi"}],
    *[file for file in adversarial_videos.BROKEN if file.name in {"cut.mkv", "audio-only.mp4", "encrypted.mp4"}],
    *[file for file in adversarial_pictures.READABLE if file.name in {"rgb.png", "exif-6.jpg", "cmyk.tiff"}],
    *[file for file in adversarial_pictures.BROKEN if file.name == "wrong-checksum.png"],
    *[file for file in adversarial_documents.PDFS if file.name in {"one-page.pdf", "encrypted.pdf"}],
]


@pytest.fixture
def folder(tmp_path):
    """Some files of the corpus, one of them in a folder below, and one that is no media."""
    (tmp_path / "media" / "below").mkdir(parents=True)
    for place, file in enumerate(FILES):
        file.write(tmp_path / "media" / ("below" if place % 2 else "") / file.name)
    (tmp_path / "media" / "notes.txt").write_text("none")
    return tmp_path / "media"


def test_every_file_is_counted_by_kind(folder, tmp_path):
    media = public_media.find_media([folder, DATA])
    assert len(media) == len(FILES) + len(list(DATA.iterdir()))
    outcome = public_media.play(media, tmp_path / "runs")
    assert outcome.violations == []
    assert sum((+counts for counts in outcome.results.values()), Counter()).total() == len(media)
    assert {name for counts in outcome.results.values() for name in counts} <= {"ok", "partial", *ROW_ERROR_TYPES}
    assert outcome.results["video"]["encrypted_video"] == 1
    assert outcome.results["video"]["no_video_stream"] == 3
    assert outcome.results["document"]["dynamic_form"] == 1
    assert outcome.results["document"]["encrypted_document"] == 2


def test_a_lost_row_and_a_row_that_depends_on_order_are_found(folder, tmp_path, monkeypatch):
    media = [one for one in public_media.find_media([folder]) if one[1].suffix in {".png", ".jpg"}]
    media = [one for one in media if one[1].name != "wrong-checksum.png"]
    read_rows = fakes.read_rows

    def spoiled(output):
        rows = sorted(read_rows(output), key=lambda row: row["item_id"])
        return rows[1:] if "once" in str(output) else [rows[0], {**rows[1], "text": "another"}, *rows[2:]]

    monkeypatch.setattr(fakes, "read_rows", spoiled)
    found = public_media.play(media, tmp_path / "runs").violations
    assert [violation.partition(": ")[2] for violation in found] == [
        "no row",
        "('ok', None), in another order ('ok', None)",
    ]
