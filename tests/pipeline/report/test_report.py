"""The report: figures counted by hand, everything escaped, no picture that says nothing, never 10 MB."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

from illava.preprocess import VisualInput
from pipeline.__main__ import main
from pipeline.cost import Spending
from pipeline.errors import RefusedError
from pipeline.evaluation.run_scores import GroupScore
from pipeline.records import FailedPage, LoadedItem, LoadStats, MediaItem
from pipeline.report.course import course_of
from pipeline.report.figures import run_figures
from pipeline.report.page import MAX_BYTES, _usd, render_report
from pipeline.report.picture import Picture, Tile
from pipeline.report.pictures import _seen
from pipeline.report.write import write_report
from pipeline.runs.parquet_sink import ParquetSink
from pipeline.runs.run import finish, open_run, pending_shards
from pipeline.runs.sessions import Session, SessionSpan
from pipeline.storage import storage
from tests.support.runs.fakes import violations
from tests.support.runs.run_folders import complete, make_config, make_row, put_media

HOSTILE = "</p><script>alert(1)</script><img src=http://127.0.0.1:9/x onerror=alert(2)>\x1b[31m\u202e\x00 {{ 7 * 7 }}"


@pytest.fixture
def opened(root, model_folder):
    """A run of 23 items in six shards, nothing published yet."""
    put_media(f"{root}/in", 23)
    return open_run(make_config(model_folder, input={"uri": f"{root}/in"}, output={"uri": f"{root}/out"}))


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))


def words(text: str) -> str:
    """The page as one line of text."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_run_json_is_told_with_what_to_do(opened, content) -> None:
    complete(opened)
    storage.write_atomic(f"{opened.uri}/_RUN.json", content)
    with pytest.raises(RefusedError, match=r"_RUN\.json .* Delete it and run the job's own command again"):
        run_figures(opened.uri, num_samples=1)


def test_a_finished_run_has_its_report_beside_its_data(opened) -> None:
    session = Session(opened)
    session.end(Spending(wall_s=50.0, actor_s=100.0, idle_s=30.0, total_usd=1.0, idle_usd=0.5, load_usd=0.467))
    complete(opened)
    uri = write_report(opened.uri)
    assert uri == f"{opened.uri}/report.html"
    assert violations(opened.uri) == []
    page = words(storage.read(uri).decode())
    assert "21 ok, 0 partial, 2 failed" in page
    assert "0.46 items/s" in page
    assert "latency 1 s 1 s 1 s 1 s 100.0%" in page
    assert "fetch 100 ms 100 ms 100 ms 100 ms 10.0%" in page
    assert "model loading 200 ms 200 ms 200 ms 200 ms 20.0% queue 100 ms 100 ms 100 ms 100 ms 10.0%" in page
    # 21 rows of 1568 -> 800 -> 560, and 0.001 USD a row, failed ones as well.
    assert "into the LLM 16,800 51.0%" in page
    assert "in its last layer 11,760 35.7%" in page
    assert "items $0.0230 2.3%" in page
    assert "lost: work that is in no row $0.0100 1.0%" in page
    assert "run $1.00 100.0%" in page
    assert "$0.0435 an item · $43.48 per 1,000 items · $0.0595 per 1,000 kept tokens" in page
    assert re.search(r"corrupt_media 2 clip-\d+\.mp4 cannot be decoded", page)
    assert "plan none prompt Describe. task kind caption" in page
    assert "Scores" not in page
    assert "preprocessor cannot be loaded here" in page


def test_an_unfinished_run_says_so(opened) -> None:
    Session(opened)
    complete(opened, shards=[0, 3])
    page = words(storage.read(write_report(opened.uri)).decode())
    assert "unfinished: 8 of 23 items have their rows" in page
    assert "1 of them ended, or still run, without saying what they spent" in page
    assert "No prices are set" not in page or "$" not in page.partition("Cost")[0]


def test_a_run_without_rows_has_a_report(opened) -> None:
    assert "0 ok, 0 partial, 0 failed" in words(storage.read(write_report(opened.uri)).decode())


def test_what_came_from_outside_is_text(opened) -> None:
    sink = ParquetSink(opened)
    for index in pending_shards(opened):
        rows = [
            make_row(opened, index, item, text=HOSTILE, prompt=HOSTILE, reference=HOSTILE, score=1.0)
            for item in opened.shard(index).items
        ]
        rows[0] = replace(rows[0], status="failed", error_type="corrupt_media", error_message=HOSTILE)
        sink.publish(index, rows)
    figures = run_figures(opened.uri, num_samples=3)
    hostile = replace(figures.samples[0], uri=HOSTILE, item_id=HOSTILE, error_message=HOSTILE)
    figures = replace(figures, uri=HOSTILE, samples=(hostile,), slowest=(hostile,), most_expensive=(hostile,))
    figures.record["config"]["name"] = HOSTILE
    page = render_report(figures, [[Picture(HOSTILE, reason=HOSTILE)]])
    tags = Tags(page).found
    assert {tag for tag, _ in tags}.isdisjoint({"script", "img", "iframe", "form", "object"})
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    assert {attrs["href"] for tag, attrs in tags if tag == "a"} == {f"#{name}" for name in ids}, "within the page"
    assert not [name for _, attrs in tags for name in attrs if name.startswith("on") or name == "style"]
    assert [attrs for tag, attrs in tags if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 10
    assert r"\x1b[31m\x202e\x00 {{ 7 * 7 }}" in page
    (policy,) = [attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_pictures_that_are_too_many_are_left_out_by_name(opened) -> None:
    complete(opened)
    figures = run_figures(opened.uri, num_samples=6)
    figures = replace(figures, samples=tuple(replace(row, text="x" * 10**6) for row in figures.samples))
    noise = Tile("1", np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8))
    page = render_report(figures, [[Picture("frames", [noise])]] * len(figures.samples))
    assert len(page.encode()) < MAX_BYTES
    assert page.count("data:image/png") == 3
    assert page.count("left out: the page would be larger than 10 MB") == 3


def test_frames_come_through_the_runs_own_loader(opened, monkeypatch) -> None:
    """The items asked for are the manifest's, with the versions that were read; one that fails leaves the others."""
    from pipeline.errors import ItemError
    from pipeline.execution import runner
    from pipeline.report import pictures

    complete(opened)
    asked = []

    class Reader:
        def load(self, item):
            asked.append(item)
            if len(asked) == 2:
                raise ItemError("changed_object", "it is another object now")
            frames = np.zeros((3, 32, 48, 3), np.uint8)
            return LoadedItem(item, (VisualInput("video", frames, (32, 48)),), (0.0, 1.0, 2.0), LoadStats())

        def close(self):
            asked.append("closed")

    monkeypatch.setattr(pictures, "load_preprocessor", lambda *_, **__: None)
    monkeypatch.setattr(runner, "build_loader", lambda config, _: Reader())
    page = storage.read(write_report(opened.uri, num_samples=3)).decode()
    items = {item.item_id: item for item in opened.manifest.items}
    assert asked[-1] == "closed"
    assert [items[item.item_id] for item in asked[:-1]] == asked[:-1]
    assert page.count("data:image/png") == 2 * 3
    assert "the media cannot be read again: it is another object now" in page
    assert page.count("--overlays 3</code> loads the model here") == 1, "said once"


class Tracing:
    """Stands for the model: the second item alone cannot be answered."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, requests, *, plan):
        (request,) = requests
        self.asked.append(request.request_id)
        if len(self.asked) == 2:
            raise ValueError("too long for this machine")
        return [SimpleNamespace(text="")]


def test_an_overlay_that_fails_takes_none_of_the_others_with_it(opened, monkeypatch) -> None:
    from pipeline.execution import worker
    from pipeline.report import pictures

    model, items = Tracing(), opened.manifest.items[:4]
    frames = np.zeros((2, 32, 48, 3), np.uint8)
    loaded = [LoadedItem(item, (VisualInput("video", frames, (32, 48)),), (0.0, 1.0), LoadStats()) for item in items]
    monkeypatch.setattr(worker, "load_vlm", lambda config: model)
    monkeypatch.setattr(pictures, "_drawn", lambda tiles, done, *, text: [Picture(text, [Tile("1", frames[0])])])
    tracer = pictures._Tracer(opened.config, 3)
    found = [tracer.overlays(one, one.item.item_id) for one in loaded]
    assert model.asked == [item.item_id for item in items[:3]]
    assert [[len(picture.tiles) for picture in of_item] for of_item in found] == [[1], [0], [1], []]
    assert found[1][0].reason == "cannot be drawn: ValueError: too long for this machine"


def test_a_model_that_cannot_be_loaded_is_tried_once(opened, monkeypatch) -> None:
    from pipeline.execution import worker
    from pipeline.report import pictures

    tried = []

    def load(config):
        tried.append(config)
        raise OSError("no such model here")

    monkeypatch.setattr(worker, "load_vlm", load)
    tracer = pictures._Tracer(opened.config, 2)
    reasons = [one.reason for _ in range(3) for one in tracer.overlays(None, "")]
    assert reasons == ["the model cannot be run here: OSError: no such model here"], "said once"
    assert len(tried) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0, "$0.00"), (1234.5, "$1,234.50"), (43.478, "$43.48"), (0.0435, "$0.0435"), (0.00999999, "$0.0100")),
        *((1.21e-7, "$0.000000121"), (2.8e-11, "under $0.0000001"), (-0.0123, "$-0.0123")),
    ],
)
def test_money_is_never_shown_with_an_exponent(value, shown) -> None:
    assert _usd(value) == shown


def test_the_command_prints_where_it_is(opened, capsys) -> None:
    complete(opened)
    assert main(["report", opened.uri, "--samples", "1"]) == 0
    assert capsys.readouterr().out == f"{opened.uri}/report.html\n"


def test_a_folder_without_a_run_is_refused(tmp_path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 4
    assert "holds no run" in capsys.readouterr().err


def test_failed_items_are_listed_under_their_type_and_linked(opened) -> None:
    sink = ParquetSink(opened)
    for index in pending_shards(opened):
        rows = [make_row(opened, index, item) for item in opened.shard(index).items]
        failed = {"status": "failed", "error_type": "not_found", "error_message": "gone", "latency_s": 0.5}
        sink.publish(index, [replace(row, **failed) if index < 2 else row for row in rows])
    figures = run_figures(opened.uri, num_samples=1)
    (count, failed), *others = figures.failures.values()
    assert (count, len(failed), others) == (8, 8, [])
    page = render_report(figures, [[]])
    place = page.index('<article id="failed-1">')
    assert page.index('<a href="#failures">8 failed</a>') < page.index('<a href="#failed-1">not_found</a>') < place
    listed = words(page[place : page.index("</article>", place)])
    assert all(f"{row.uri.rpartition('/')[2]} {row.uri} · {row.item_id}" in listed for row in failed), "names first"
    sample = figures.samples[0]
    assert f'<a href="#item-1">{sample.uri.rpartition("/")[2]}</a>' in page, "among the slowest, and shown"


def test_a_finished_run_with_scores_shows_them(opened) -> None:
    sink = ParquetSink(opened)
    for index in pending_shards(opened):
        sink.publish(
            index,
            [
                make_row(opened, index, item, score=float(n % 2), answer="x", category=f"{index}<b>")
                for n, item in enumerate(opened.shard(index).items)
            ],
        )
    assert run_figures(opened.uri, num_samples=1).scores is None, "of an unfinished run there are none yet"
    finish(opened, {})
    figures = run_figures(opened.uri, num_samples=1)
    page = render_report(figures, [[]])
    assert figures.scores.groups[0].interval.mean == pytest.approx(11 / 23)
    assert f"score 0.478 {figures.scores.groups[0].interval.low:.3f} to" in words(page)
    assert "23 answers on 23 media" in words(page)
    assert "0&lt;b&gt; 0.500" in words(page)
    assert figures.scores is not None
    gone = replace(figures.scores, groups=(*figures.scores.groups, GroupScore("gone", None, 2)))
    assert "gone - - 0 0 2" in words(render_report(replace(figures, scores=gone), [[]]))


def test_pages_and_pictures_are_shown_whole_with_their_numbers() -> None:
    item = MediaItem("i", ("a.pdf",), "document", (1,), ("",))
    squeezed = np.zeros((3, 64, 64, 3), np.uint8)  # a base tile and two of detail
    media = (VisualInput("image", squeezed, (200, 100)), VisualInput("image", squeezed[:1], (64, 64)))
    failed = (FailedPage(1, "corrupt_media", "x"),)
    seen = _seen(LoadedItem(item, media, (), LoadStats(), failed_pages=failed))
    assert seen.caption == "2 of 2 pages, at the model's size; could not be shown to it: 2"
    assert [tile.label for tile in seen.tiles] == ["page 1 · 3 tiles", "page 3"]
    assert [tile.pixels_HW3.shape for tile in seen.tiles] == [(176, 88, 3), (64, 64, 3)]
    pictures = LoadedItem(replace(item, media_kind="images"), media, (), LoadStats())
    assert [tile.label for tile in _seen(pictures).tiles] == ["picture 1 · 3 tiles", "picture 2"]
    frames = VisualInput("video", np.zeros((12, 9, 9, 3), np.uint8), (9, 9))
    clip = LoadedItem(replace(item, media_kind="video"), (frames,), tuple(range(12)), LoadStats())
    assert _seen(clip).caption == "8 of 12 frames, as the model got them"
    assert [_seen(clip).tiles[n].label for n in (0, -1)] == ["1 · 0.00 s", "12 · 11.00 s"]


def test_rows_over_time_leave_out_the_pauses_between_sessions() -> None:
    hours = [
        SessionSpan(f"2026-11-30T0{hour}:00:00.000+00:00", f"2026-11-30T0{hour}:01:00.000+00:00") for hour in (1, 3)
    ]
    killed = SessionSpan("2026-11-30T05:00:00.000+00:00", None)
    began_s = datetime(2026, 11, 30, 1, tzinfo=UTC).timestamp()
    finished_s = began_s + np.array([59.0, 7200.0, 7259.9, 14400 + 120.0, np.nan])
    course = course_of(finished_s, np.array([False, True, False, False, True]), [killed, *reversed(hours)])
    assert (course.worked_s, course.session_starts, course.num_untimed) == (240.0, (0.25, 0.5), 1)
    assert (course.began_at, course.ended_at) == ("2026-11-30 01:00:00", "2026-11-30 05:02:00")
    assert {n: count for n, count in enumerate(course.num_rows) if count} == {14: 1, 15: 1, 29: 1, 59: 1}
    assert {n: count for n, count in enumerate(course.num_failed) if count} == {15: 1}
    together = course_of(
        finished_s, np.zeros(5, bool), [hours[0], replace(hours[0], began_at="2026-11-30T01:00:30+00:00")]
    )
    assert together.worked_s == 60.0, "two drivers at once"
    assert course_of(np.full(3, np.nan), np.zeros(3, bool), hours) is None, "rows of an earlier version"
    assert course_of(finished_s, np.zeros(5, bool), []) is None
