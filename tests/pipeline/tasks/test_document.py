"""Documents to rows: every page in order and right side up, long ones by windows, broken ones as what they are."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config.load import load_config
from pipeline.config.schema import JobConfig, MediaConfig
from pipeline.errors import ConfigError, InputError, ItemError
from pipeline.execution.rows import RunInfo
from pipeline.execution.runner import build_loader, run_job
from pipeline.execution.worker import VLMWorker
from pipeline.inputs.build_manifest import build_manifest
from pipeline.inspection.verify_rows import check_row
from pipeline.json_schema import InvalidAnswerError, read_json, schema_problem
from pipeline.loading.loader import Loader
from pipeline.records import MediaItem
from pipeline.storage import storage
from tests.support.media import pdf_files
from tests.support.media.pdf_files import BLUE, GREEN, RED, YELLOW, PageReader, page, write_pdf
from tests.support.runs.fakes import job_config, read_rows, violations
from tests.support.runs.misbehaving import Untouched

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = {"type": "object", "properties": {"page": {"type": "integer", "maximum": 3}}, "required": ["page"]}
MEDIA = {"max_pages": 20, "page_dpi": 72, "max_pixels_per_frame": 200 * 200}


def item_of(*paths, kind="document") -> MediaItem:
    found = [storage.stat(str(path)) for path in paths]
    uris, sizes, etags = zip(*((one.uri, one.size, one.etag) for one in found), strict=True)
    return MediaItem(Path(uris[0]).name, uris, kind, sizes, etags)


@pytest.fixture(scope="module")
def loader():
    with Loader(MediaConfig(**MEDIA), Untouched(), pages_per_request=2) as loader:
        yield loader


def corners(picture: np.ndarray) -> tuple:
    return tuple(tuple(int(part) for part in picture[place]) for place in ((2, 2), (2, -3), (-3, -3), (-3, 2)))


def test_pages_come_in_order_right_side_up(loader, tmp_path) -> None:
    turned = [page(n, rotate=rotate) for n, rotate in enumerate((0, 90, 180, 270, -90))]
    loaded = loader.load(item_of(write_pdf(tmp_path / "turned.pdf", turned)))
    pictures = [mm_item.tiles[0] for mm_item in loaded.media]
    wide, high = (72, 144, 3), (144, 72, 3)
    assert [picture.shape for picture in pictures] == [wide, high, wide, high, high]
    assert [int(p[p.shape[0] // 2, p.shape[1] // 2, 0]) for p in pictures] == [pdf_files.shade(n) for n in range(5)]
    clockwise = (RED, GREEN, BLUE, YELLOW)
    assert corners(pictures[0]) == clockwise
    assert corners(pictures[1]) == (YELLOW, RED, GREEN, BLUE), "/Rotate 90 turns clockwise"
    assert corners(pictures[2]) == (BLUE, YELLOW, RED, GREEN)
    assert corners(pictures[3]) == corners(pictures[4]) == (GREEN, BLUE, YELLOW, RED)
    assert (loaded.stats.decoder, loaded.partial, loaded.failed_pages) == ("pypdfium2", None, ())
    assert min(loaded.stats.load_s, loaded.stats.cpu_s) > 0


def test_a_page_over_the_budget_fails_alone(loader, tmp_path) -> None:
    pages = [page(0), page(1, box="0 0 201 200"), page(2)]
    loaded = loader.load(item_of(write_pdf(tmp_path / "large.pdf", pages)))
    assert [(failed.page, failed.error_type) for failed in loaded.failed_pages] == [(1, "too_large")]
    assert "1 of 3 pages failed; page 2: the page has 201 x 200 px" in loaded.partial
    assert len(loaded.media) == 2


def test_every_picture_of_a_tiff_is_a_page(loader, tmp_path) -> None:
    pictures = [Image.new("RGB", (20 + n, 10), (40 * n, 0, 0)) for n in range(3)]
    pictures[1].getexif()[0x0112] = 6
    pictures[0].save(tmp_path / "scan.tiff", save_all=True, append_images=pictures[1:])
    loaded = loader.load(item_of(tmp_path / "scan.tiff"))
    assert [int(mm_item.tiles[0, 2, 2, 0]) for mm_item in loaded.media] == [0, 40, 80]
    too_long = [Image.new("L", (4, 4))] * 21
    too_long[0].save(tmp_path / "long.tiff", save_all=True, append_images=too_long[1:])
    whole = Loader(MediaConfig(**MEDIA), Untouched())  # of a task that asks about all pages at once
    with whole, pytest.raises(ItemError, match="21 pages; max_pages is 20"):
        whole.load(item_of(tmp_path / "long.tiff"))


def test_page_images_are_a_document_and_a_broken_one_is_a_failed_page(loader, tmp_path) -> None:
    for n in range(3):
        Image.new("RGB", (9, 9), (50 * n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    loaded = loader.load(item_of(*(tmp_path / f"{n}.png" for n in range(3)), kind="images"))
    assert [int(mm_item.tiles[0, 0, 0, 0]) for mm_item in loaded.media] == [0, 100]
    assert [(failed.page, failed.error_type) for failed in loaded.failed_pages] == [(1, "unsupported_media")]


def test_a_preprocessor_sees_as_many_pages_at_once_as_the_model_will(onevision_folder, tmp_path) -> None:
    from illava.families import load_preprocessor

    path = write_pdf(tmp_path / "three.pdf", [page(n) for n in range(3)])
    preprocessor, media = load_preprocessor(str(onevision_folder)), MediaConfig(**MEDIA)
    tiles = {}
    for size in (1, 2, None):
        with Loader(media, preprocessor, pages_per_request=size) as loader:
            tiles[size] = [len(mm_item.tiles) for mm_item in loader.load(item_of(path)).media]
    assert min(tiles[1]) > 1, "a page that is seen alone is tiled"
    assert tiles[2] == [1, 1, tiles[1][2]]
    assert tiles[None] == [1, 1, 1]


def documents(folder: Path) -> dict:
    """Three PDFs, page images and two files that cannot be read, as an ``input`` section."""
    from tests.support.media import adversarial_documents

    write_pdf(folder / "five.pdf", [page(n) for n in range(5)])
    write_pdf(folder / "mixed.pdf", [page(0), page(1, box="0 0 999 999"), page(2)])
    write_pdf(folder / "one.pdf", [page(7)])
    encrypted = next(file for file in adversarial_documents.PDFS if file.name == "encrypted.pdf")
    encrypted.write(folder / "encrypted.pdf")
    (folder / "cut.pdf").write_bytes((folder / "five.pdf").read_bytes()[:40])
    for n in (3, 2):
        Image.new("RGB", (30, 30), (pdf_files.shade(n), 0, 0)).save(folder / f"{n}.png")
    lines = [{"id": name, "uri": f"{name}.pdf"} for name in ("five", "mixed", "one", "encrypted", "cut")]
    uris = [["3.png", "2.png"] if line["id"] == "set" else [line["uri"]] for line in [*lines, {"id": "set"}]]
    ids = [line["id"] for line in lines] + ["set"]
    text = "\n".join(json.dumps({"id": item_id, "uris": uri}) for item_id, uri in zip(ids, uris, strict=True))
    (folder / "items.jsonl").write_text(text)
    return {"manifest": str(folder / "items.jsonl")}


def run(folder: Path, *, task=None, executor="local", **reader) -> dict[str, dict]:
    source = documents(folder)
    config = job_config(
        folder / "out", source, executor=executor, task={"kind": "document", **(task or {})}, media=MEDIA
    )
    run_job(config, worker_factory=partial(pdf_files.page_worker, **reader), loader_factory=untouched_loader)
    # Whether seconds add up is asked of the worker below: here six rows of milliseconds share a busy machine.
    assert violations(folder / "out") == []
    return {row["item_id"]: row for row in read_rows(folder / "out")}


def untouched_loader(config, preprocessor):
    return build_loader(config, Untouched())


def texts(row: dict) -> list[str | None]:
    return [one["text"] for one in row["pages"]]


def check_outcomes(rows: dict[str, dict]) -> None:
    assert texts(rows["five"]) == ["page 0", "page 1", "page 2", "page 3", "page 4"]
    assert rows["five"]["text"] == "page 0\n\npage 1\n\npage 2\n\npage 3\n\npage 4"
    assert (rows["five"]["status"], rows["five"]["num_frames"], rows["five"]["num_vision_tokens"]) == ("ok", 5, 125)
    assert texts(rows["mixed"]) == ["page 0", None, "page 2"]
    assert (rows["mixed"]["status"], rows["mixed"]["pages"][1]["error_type"]) == ("partial", "too_large")
    assert "1 of 3 pages failed; page 2" in rows["mixed"]["error_message"]
    assert texts(rows["set"]) == ["page 3", "page 2"]
    assert (rows["encrypted"]["status"], rows["encrypted"]["error_type"]) == ("failed", "encrypted_document")
    assert (rows["cut"]["status"], rows["cut"]["error_type"]) == ("failed", "corrupt_media")
    assert rows["encrypted"]["pages"] is None


def test_a_document_is_one_row_with_every_page_in_it(tmp_path) -> None:
    check_outcomes(run(tmp_path))


def test_windows_keep_the_order_and_stand_with_their_first_page(tmp_path) -> None:
    rows = run(tmp_path, task={"pages_per_request": 2})
    five = rows["five"]["pages"]
    assert [one["text"] for one in five] == ["page 0, 1", None, "page 2, 3", None, "page 4"]
    assert [one["window"] for one in five] == [0, 0, 1, 1, 2]
    assert [one["num_vision_tokens"] for one in five] == [50, None, 50, None, 25]
    assert texts(rows["mixed"]) == ["page 0, 2", None, None], "the page between them is in no window"
    assert [one["window"] for one in rows["mixed"]["pages"]] == [0, None, 0]
    assert texts(rows["set"]) == ["page 3, 2", None]


def test_answers_are_checked_against_the_schema(tmp_path) -> None:
    task = {"output": "json", "json_schema": SCHEMA}
    rows = run(tmp_path, task=task, answer='```json\n{"page": {pages}}\n```')
    five = rows["five"]["pages"]
    assert [json.loads(one["fields"])["page"] for one in five[:4]] == [0, 1, 2, 3]
    assert (five[4]["status"], five[4]["error_type"], five[4]["fields"]) == ("failed", "invalid_answer", None)
    assert five[4]["error_message"] == "$.page: 4 is greater than the maximum of 3"
    assert '"page": 4' in five[4]["text"], "what the model said is kept"
    assert rows["five"]["status"] == "partial"
    assert (rows["one"]["status"], rows["one"]["error_type"]) == ("failed", "invalid_answer")
    assert json.dumps(SCHEMA) in rows["one"]["prompt"]


def test_an_error_of_one_window_leaves_the_others(tmp_path) -> None:
    five = run(tmp_path, broken=(2,))["five"]
    assert texts(five) == ["page 0", "page 1", None, "page 3", "page 4"]
    assert (five["status"], five["pages"][2]["error_type"]) == ("partial", "internal_error")


def test_windows_of_one_item_run_one_after_the_other_and_their_seconds_sum_up(loader, tmp_path) -> None:
    config = job_config(tmp_path / "out", {"uri": "x/"}, task={"kind": "document"}, media=MEDIA)
    reader = PageReader()
    subject = VLMWorker(config, RunInfo("recipe", "fingerprint"), vlm=reader)
    for name in ("a.pdf", "b.pdf"):
        path = write_pdf(tmp_path / name, [page(n) for n in range(4)])
        subject.add(loader.load(item_of(path)), attempts=1, shard_index=0)
    outcomes = []
    while subject.pending:
        assert len(reader._queue) <= 2, "an item has one request in the model at a time"
        outcomes += subject.step()
    assert [(name, numbers) for name, numbers, _ in reader.shown] == [
        (name, [n]) for n in range(4) for name in ("a.pdf", "b.pdf")
    ]
    assert [seed for name, _, seed in reader.shown if name == "a.pdf"] == [0, 1, 2, 3]
    for outcome in outcomes:
        row = outcome.row
        stages = row.queue_s + row.vision_s + row.prefill_s + row.decode_s
        assert stages == pytest.approx(row.latency_s, rel=0.02, abs=0.005)
        assert row.vision_s >= 4 * 0.02
        assert row.queue_s >= 3 * 0.02, "it waits for its neighbour's windows"
    assert sum(outcome.row.gpu_s for outcome in outcomes) == pytest.approx(reader.device_busy_s)


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row["pages"].reverse(),
        lambda row: row["pages"].pop(),
        lambda row: row["pages"][1].update(status="failed"),
        lambda row: row["pages"][1].update(status="failed", error_type="corrupt_media"),
        lambda row: row["pages"][1].update(num_vision_tokens=1),
    ],
)
def test_damaged_pages_are_seen(loader, tmp_path, damage) -> None:
    path = write_pdf(tmp_path / "a.pdf", [page(n) for n in range(3)])
    config = job_config(tmp_path / "out", {"uri": "x/"}, task={"kind": "document"}, media=MEDIA)
    subject, item = VLMWorker(config, RunInfo("recipe", "fingerprint"), vlm=PageReader()), item_of(path)
    subject.add(loader.load(item), attempts=1, shard_index=0)
    outcomes = []
    while subject.pending:
        outcomes += subject.step()
    row = asdict(outcomes[0].row)
    row |= {"pages": list(row["pages"]), "uris": list(row["uris"])}
    row["fields"] = []
    assert list(check_row("here", row, item, {})) == []
    damage(row)
    assert {found.kind for found in check_row("here", row, item, {})} == {"bad_pages"}


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"output": "json"}, "needs json_schema"),
        ({"json_schema": {}}, "checks output json"),
        ({"output": "json", "json_schema": {"type": "objekt"}}, "not valid"),
        ({"output": "json", "json_schema": {"$ref": "https://example.org/s"}}, "leads out of the schema"),
        ({"output": "json", "json_schema": {"$ref": "#/$defs/x"}}, "names nothing"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(task, words) -> None:
    overrides = [f"task.{key}={json.dumps(value)}" for key, value in task.items()]
    with pytest.raises(ConfigError, match=words):
        load_config(str(ROOT / "configs" / "process_documents.yaml"), overrides)


@pytest.mark.parametrize("text", ["words", '{"page": "1"}', '{"page": 1} and more', "[" * 100_000, '{"page": NaN}', ""])
def test_what_is_not_the_json_that_was_asked_for_is_refused(text) -> None:
    with pytest.raises(InvalidAnswerError):
        read_json(text, SCHEMA)
    assert schema_problem(SCHEMA) is None
    with pytest.raises(InvalidAnswerError, match="surrogate"):
        read_json('"\\ud800"', {})
    with pytest.raises(InvalidAnswerError, match="too large"):
        read_json("1" + "0" * 400, {"multipleOf": 0.5})


def test_videos_among_documents_are_refused(tmp_path) -> None:
    for name in ("a.pdf", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    config = job_config(tmp_path / "out", {"uri": str(tmp_path)}, task={"kind": "document"})
    with pytest.raises(InputError, match=r"1 items are videos: narrow input\.pattern"):
        build_manifest(config)
    narrow = JobConfig.model_validate(config.model_dump() | {"input": {"uri": str(tmp_path), "pattern": "*.pdf"}})
    assert [item.media_kind for item in build_manifest(narrow).items] == ["document"]


@pytest.mark.xdist_group("ray")
@pytest.mark.long
def test_documents_through_ray(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).resolve().parent)]))
    check_outcomes(run(tmp_path, executor="ray"))
