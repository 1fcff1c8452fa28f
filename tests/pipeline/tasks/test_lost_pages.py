"""Pages that are not there, and pages too many: each fails or is left out alone, and the row says so. Time: 2 s."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config.schema import MediaConfig
from pipeline.errors import ItemError
from pipeline.execution.reporting.summary import RunStats
from pipeline.execution.runner import build_loader, continue_run, run_job
from pipeline.inspection.status import render_status, run_status
from pipeline.inspection.verify_rows import check_row
from pipeline.loading.loader import Loader
from pipeline.records import MediaItem
from pipeline.report.write import write_report
from pipeline.runs.retry import begin_retry
from pipeline.storage import storage
from tests.support.media import pdf_files
from tests.support.media.pdf_files import page, write_pdf
from tests.support.runs.fakes import job_config, read_rows, violations
from tests.support.runs.misbehaving import Untouched


def loader_of(config, preprocessor):
    return build_loader(config, Untouched())


def read(folder: Path, documents: dict[str, list[str]], **media) -> dict[str, dict]:
    """Run a job over documents of these files."""
    lines = [json.dumps({"id": name, "uris": uris}) for name, uris in documents.items()]
    (folder / "items.jsonl").write_text("\n".join(lines))
    config = job_config(
        folder / "out", {"manifest": str(folder / "items.jsonl")}, task={"kind": "document"}, media=media
    )
    run_job(config, worker_factory=pdf_files.page_worker, loader_factory=loader_of)
    assert violations(folder / "out") == []
    return rows_of(folder)


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["item_id"]: row for row in read_rows(folder / "out")}


def picture(folder: Path, number: int) -> str:
    Image.new("RGB", (30, 30), (pdf_files.shade(number), 0, 0)).save(folder / f"{number}.png")
    return f"{number}.png"


def outcomes(row: dict) -> list[str]:
    return [one["text"] or one["error_type"] for one in row["pages"]]


def test_a_page_image_that_cannot_be_had_fails_alone_and_a_retry_by_its_type_reads_it(tmp_path) -> None:
    one, two = picture(tmp_path, 1), picture(tmp_path, 2)
    os.symlink("/etc/hostname", tmp_path / "outside.png")
    (tmp_path / "empty.png").touch()
    rows = read(
        tmp_path,
        {
            "lost": [one, "late.png", two],
            "unsafe": ["outside.png", one],
            "empty": [two, "empty.png"],
            "none": ["gone.png", "late.png"],
            "alone": ["gone.png"],
        },
        max_bytes=10_000,
    )
    assert outcomes(rows["lost"]) == ["page 1", "not_found", "page 2"]
    assert (rows["lost"]["status"], rows["lost"]["num_pages"]) == ("partial", 3)
    assert "1 of 3 pages failed; page 2: " in rows["lost"]["error_message"]
    assert "late.png" in rows["lost"]["error_message"]
    assert outcomes(rows["unsafe"]) == ["unsafe_uri", "page 1"]
    assert outcomes(rows["empty"]) == ["page 2", "empty_media"]
    assert (rows["none"]["status"], rows["none"]["error_type"]) == ("failed", "not_found")
    assert "none of its 2 pages could be had" in rows["none"]["error_message"]
    assert (rows["alone"]["status"], rows["alone"]["error_type"]) == ("failed", "not_found")
    Image.new("RGB", (30, 30), (pdf_files.shade(9), 0, 0)).save(tmp_path / "late.png")
    again = begin_retry(str(tmp_path / "out"), only=["not_found"])
    continue_run(again, worker_factory=pdf_files.page_worker, loader_factory=loader_of)
    assert outcomes(rows_of(tmp_path)["lost"]) == ["page 1", "page 9", "page 2"]
    assert outcomes(rows_of(tmp_path)["unsafe"]) == ["unsafe_uri", "page 1"]


def test_an_error_of_the_store_that_may_pass_is_tried_again_with_the_whole_document(tmp_path, monkeypatch) -> None:
    paths = [str(tmp_path / picture(tmp_path, number)) for number in (1, 2)]
    found = [storage.stat(path) for path in paths]
    item = MediaItem("a", tuple(paths), "images", tuple(f.size for f in found), tuple(f.etag for f in found))
    with Loader(MediaConfig(), Untouched(), pages_per_request=1) as loader:
        staged = loader._staging.get

        def get(uri, **more):
            if uri == paths[1]:
                raise ItemError("store_error", "503", retryable=True)
            return staged(uri, **more)

        monkeypatch.setattr(loader._staging, "get", get)
        with pytest.raises(ItemError, match="503") as error:
            loader.load(item)
        assert error.value.retryable


def test_of_a_document_that_is_too_long_the_first_pages_are_read(tmp_path) -> None:
    write_pdf(tmp_path / "five.pdf", [page(n) for n in range(5)])
    write_pdf(tmp_path / "three.pdf", [page(n) for n in range(3)])
    write_pdf(tmp_path / "faulty.pdf", [page(0), page(1, box="0 0 9999 9999"), page(2), page(3)])
    pictures = [Image.new("RGB", (20 + n, 10), (pdf_files.shade(n),) * 3) for n in range(4)]
    pictures[0].save(tmp_path / "scan.tiff", save_all=True, append_images=pictures[1:])
    images = [picture(tmp_path, number) for number in range(4)]
    files = {name: [f"{name}"] for name in ("five.pdf", "three.pdf", "faulty.pdf", "scan.tiff")}
    limits = {"max_pages": 3, "page_dpi": 72, "max_pixels_per_frame": 1_000_000}
    rows = read(tmp_path, {**files, "images": images}, **limits)
    first = ["page 0", "page 1", "page 2"]
    for name, num_pages in {"five.pdf": 5, "scan.tiff": 4, "images": 4}.items():
        row = rows[name]
        assert outcomes(row) == first
        assert (row["status"], row["num_pages"]) == ("partial", num_pages)
        told = f"the document has {num_pages} pages, the first 3 were read: media.max_pages is 3"
        assert row["error_message"] == told
    assert (rows["three.pdf"]["status"], rows["three.pdf"]["num_pages"]) == ("ok", 3)
    both = rows["faulty.pdf"]["error_message"]
    assert both.startswith("1 of 3 pages failed; page 2: ")
    assert both.endswith("; the document has 4 pages, the first 3 were read: media.max_pages is 3")
    told = "14 read, 1 failed (1 too_large), 5 over media.max_pages or max_images left out"
    assert f"\n  pages    {told}\n" in render_status(run_status(str(tmp_path / "out")))
    report = storage.read(write_report(str(tmp_path / "out"), leave_out=frozenset({"frames"}))).decode()
    assert f'<div class="card">pages<b>14</b><span class="soft">{told}</span></div>' in report
    stats = RunStats()
    for row in rows.values():
        stats.pages.add(row["pages"], row["num_pages"])
    assert str(stats.pages) == told
    recorded = json.loads((tmp_path / "out" / "_RUN.json").read_text())["totals"]["pages"]
    assert recorded == {"read": 14, "failed": 1, "left_out": 5, "by_error_type": {"too_large": 1}}


def test_a_page_image_over_the_limit_need_not_be_there(tmp_path) -> None:
    first = picture(tmp_path, 0)
    row = read(tmp_path, {"a": [first, first, "missing.png"]}, max_pages=2)["a"]
    assert (row["status"], row["error_type"], row["num_pages"]) == ("partial", None, 3)
    assert outcomes(row) == ["page 0", "page 0"]
    assert "the first 2 were read" in row["error_message"]


@pytest.mark.parametrize("kind", ["document", "images"])
def test_a_job_may_refuse_documents_that_are_too_long(tmp_path, kind) -> None:
    files = {"document": [str(write_pdf(tmp_path / "a.pdf", [page(n) for n in range(3)]))]}
    files["images"] = [str(tmp_path / picture(tmp_path, number)) for number in range(3)]
    item = MediaItem("a", tuple(files[kind]), kind, (-1,) * len(files[kind]), ("",) * len(files[kind]))
    words = {"document": "3 pages; max_pages is 2", "images": "3 pages; max_images is 1"}
    media = MediaConfig(max_pages=2, max_images=1, over_max_pages="fail")
    with (
        Loader(media, Untouched(), pages_per_request=1) as loader,
        pytest.raises(ItemError, match=words[kind]) as error,
    ):
        loader.load(item)
    assert error.value.error_type == "too_large"


def test_a_picture_set_that_is_no_document_fails_as_a_whole(tmp_path) -> None:
    """A caption of three pictures is none of two."""
    item = MediaItem(
        "a", (str(tmp_path / picture(tmp_path, 1)), str(tmp_path / "gone.png")), "images", (-1,) * 2, ("",) * 2
    )
    with Loader(MediaConfig(), Untouched()) as loader, pytest.raises(ItemError, match="gone") as error:
        loader.load(item)
    assert error.value.error_type == "not_found"


def test_a_number_of_pages_that_does_not_fit_is_seen(tmp_path) -> None:
    write_pdf(tmp_path / "a.pdf", [page(n) for n in range(3)])
    row = read(tmp_path, {"a": ["a.pdf"]})["a"] | {"fields": []}
    item = MediaItem("a", (str(tmp_path / "a.pdf"),), "document", (-1,), ("",))
    for num_pages, found in {2: ["bad_pages"], 4: ["bad_pages"], 3: [], None: []}.items():
        assert [one.kind for one in check_row("here", row | {"num_pages": num_pages}, item, {})] == found


def test_a_row_of_a_page_that_is_cut_short_is_partial_and_valid(tmp_path) -> None:
    """No page failed, so that `verify` asked for ok."""
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: int(len(data) * 0.93)])
    row = read(tmp_path, {"a": ["whole.png", "cut.png", "gone.png"], "b": ["cut.png"]})
    assert (row["b"]["status"], [one["status"] for one in row["b"]["pages"]]) == ("partial", ["ok"])
    assert row["a"]["error_message"].startswith("1 of 3 pages failed; page 3: ")
    assert "; page 2: the picture is cut short" in row["a"]["error_message"]
