"""Tests that a listing becomes one frozen, validated manifest, and that only allowed addresses are read."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.schema import MediaConfig
from pipeline.errors import ConfigError, InputError, ItemError, RefusedError
from pipeline.execution.reporting.summary import RunStats, RunSummary, render_summary
from pipeline.inputs.build_manifest import build_manifest, media_roots, readable_roots
from pipeline.inputs.columns import (
    DOCUMENT_EXTENSIONS,
    IMAGE_EXTENSIONS,
    LATER_IMAGE_EXTENSIONS,
    LATER_VIDEO_EXTENSIONS,
    VIDEO_EXTENSIONS,
)
from pipeline.inputs.input_counts import say_left_out
from pipeline.inputs.manifest import manifest_bytes, read_manifest
from pipeline.inspection.status import render_status, run_status
from pipeline.loading.decoding.media import load_video
from pipeline.loading.decoding.pictures import IMAGE_FORMATS, load_images
from pipeline.planning.dry_run import _link_lines
from pipeline.report.write import write_report
from pipeline.runs.run import create_or_resume, open_run, plan_run
from pipeline.runs.run_record import fingerprint_of
from pipeline.storage import storage
from tests.support.runs.run_folders import complete, put_manifest, put_media

REPOSITORY = Path(__file__).parents[3]


def test_a_listing_keeps_known_media_in_order_and_counts_the_rest(config, root):
    media = storage.join(root, "media")
    put_media(media, 3)
    for name in ("a.JPG", "notes.txt", "anim.gif", "deep/z.webm"):
        storage.write_atomic(storage.join(media, name), b"?")
    manifest = build_manifest(config(input={"uri": media}))
    assert [item.uris[0].removeprefix(media) for item in manifest.items] == [
        "/a.JPG",
        "/clip-000.mp4",
        "/clip-001.mp4",
        "/clip-002.mp4",
        "/deep/z.webm",
    ]
    assert [item.media_kind for item in manifest.items] == ["image", "video", "video", "video", "video"]
    assert manifest.left_out == {".gif": 1, ".txt": 1}
    assert manifest.num_bytes == 1 + 100 + 101 + 102 + 1
    assert all(item.etags[0] for item in manifest.items)
    assert len(set(manifest.item_ids())) == 5


def test_the_same_objects_give_the_same_digest_and_a_changed_one_another(config, root):
    media = storage.join(root, "media")
    put_media(media, 3)
    first = build_manifest(config(input={"uri": media}))
    assert build_manifest(config(input={"uri": media + "/"})).digest == first.digest
    storage.write_atomic(storage.join(media, "clip-001.mp4"), b"other content")
    changed = build_manifest(config(input={"uri": media}))
    assert changed.digest != first.digest
    assert [a == b for a, b in zip(first.item_ids(), changed.item_ids(), strict=True)] == [True, False, True]


def test_pattern_and_limit(config, root):
    put_media(storage.join(root, "in"), 4)
    manifest = build_manifest(config(input={"uri": storage.join(root, "in"), "pattern": "clip-00[13].mp4"}))
    assert len(manifest) == 2
    assert len(build_manifest(config(input={"uri": storage.join(root, "in"), "limit": 3}))) == 3


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"input": {}}, ConfigError, "input.uri"),
        ({"input": {"uri": "in", "pattern": "*.avi"}}, InputError, "no objects"),
        ({"input": {"uri": "text"}}, InputError, r"none of 1 file \(1 \.txt\) has a known media extension"),
    ],
)
def test_an_empty_input_is_refused(config, root, sections, error, message):
    put_media(storage.join(root, "in"), 1)
    storage.write_atomic(storage.join(root, "text/a.txt"), b"x")
    if "uri" in sections["input"]:
        sections = {"input": sections["input"] | {"uri": storage.join(root, sections["input"]["uri"])}}
    with pytest.raises(error, match=message):
        build_manifest(config(**sections))


def test_local_media_must_lie_below_the_prefix_or_the_manifest(config, tmp_path):
    uri = put_manifest(
        str(tmp_path / "lists"), "m.csv", f"uri\n{tmp_path}/media/a.mp4\nfile://{tmp_path}/media/b.mp4\n"
    )
    with pytest.raises(InputError, match="lines 2, 3"):
        build_manifest(config(input={"manifest": uri}))
    allowed = config(input={"manifest": uri, "uri": str(tmp_path / "media")})
    assert [item.uris[0] for item in build_manifest(allowed).items] == [f"{tmp_path}/media/{n}.mp4" for n in "ab"]
    assert media_roots(allowed) == (str(tmp_path / "media"), str(tmp_path / "lists"))
    assert media_roots(config(input={"uri": "s3://bucket/x"})) == ()


def test_what_is_left_out_is_counted_by_extension_and_told(config, tmp_path):
    names = ["a.mp4", "b.HEIC", "c.heic", "d.gif", "README", "notes.txt", ".hidden", "deep/e.avif"]
    for name in names:
        storage.write_atomic(str(tmp_path / "in" / name), b"x")
    job = config(input={"uri": str(tmp_path / "in")}, output={"uri": str(tmp_path / "out")})
    manifest = build_manifest(job)
    assert manifest.left_out == {".heic": 2, "no extension": 2, ".avif": 1, ".gif": 1, ".txt": 1}
    assert read_manifest(manifest_bytes(manifest)).left_out == manifest.left_out
    open_run(job)
    words = (
        "8 in the input = 1 items + 7 of no known media extension (2 .heic, 2 no extension, 1 .avif, 1 .gif, 1 .txt)"
    )
    assert f"  input    {words}" in render_status(run_status(job.output.uri)).splitlines()
    assert plan_run(job).manifest.counts == manifest.counts
    summary = RunSummary(0, "job", job.output.uri, 1, 0, RunStats(), 1.0, None, counts=manifest.counts)
    assert f"  input          {words}" in render_summary(summary).splitlines()
    page = storage.read(write_report(job.output.uri, num_samples=0)).decode()
    assert "names no known medium: 7 files (2 .heic, 2 no extension, 1 .avif, 1 .gif, 1 .txt)." in page
    many = {f".{n}": 10 - n for n in range(10)}
    assert say_left_out(many, limit=2) == "55 files (10 .0, 9 .1, 36 others)"


def _written(path):
    """A picture or a clip under this name, in the format that the name is usual for."""
    extension = os.path.splitext(path)[1][1:]
    if extension in IMAGE_EXTENSIONS + LATER_IMAGE_EXTENSIONS:
        formats = {"jpg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "dib": "BMP"}
        Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(path, formats.get(extension, extension))
        return
    import av

    formats = {"qt": "mov", "m4v": "ipod", "mkv": "matroska"} | dict.fromkeys(("ts", "mts", "m2ts", "m2t"), "mpegts")
    with av.open(path, "w", format=formats.get(extension, extension)) as out:
        stream = out.add_stream(
            "libx264" if extension == "f4v" else "libvpx" if extension == "webm" else "mpeg4", rate=5
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), "rgb24")))
        out.mux(stream.encode())


@pytest.mark.parametrize("extension", VIDEO_EXTENSIONS + LATER_VIDEO_EXTENSIONS)
def test_every_listed_video_extension_is_one_that_the_decoders_read(tmp_path, extension):
    path = str(tmp_path / f"clip.{extension}")
    _written(path)
    assert len(load_video(path, MediaConfig(num_frames=3), decoder="pyav").frames) == 3


def test_every_listed_picture_extension_is_one_that_the_decoders_read(tmp_path):
    """Of the formats that are read only gif has no extension in the list; TIFFs are documents."""
    paths = [str(tmp_path / f"picture.{extension}") for extension in IMAGE_EXTENSIONS + LATER_IMAGE_EXTENSIONS]
    for path in paths:
        _written(path)
    assert len(load_images(paths, MediaConfig()).frames) == len(paths)
    Image.init()
    read = {name[1:] for name, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS}
    listed = {*IMAGE_EXTENSIONS, *LATER_IMAGE_EXTENSIONS, *DOCUMENT_EXTENSIONS}
    assert read - listed == {"gif", "apng"}  # which may move, or always do


def _as_frozen_before(manifest):
    """Without the metadata that came with the later extensions."""
    table = pq.read_table(pa.BufferReader(manifest_bytes(manifest)))
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"illava.num_unknown": "2", "illava.num_done": "0"}), sink)
    return sink.getvalue().to_pybytes()


def test_a_run_from_before_an_extension_was_known_resumes(config, tmp_path, monkeypatch):
    for name in ("a.mp4", "b.3gp", "c.jfif", "d.mp4"):
        storage.write_atomic(str(tmp_path / "in" / name), b"x")
    job = config(input={"uri": str(tmp_path / "in")}, output={"uri": str(tmp_path / "out")})
    now = plan_run(job)
    then = now.manifest.without(LATER_VIDEO_EXTENSIONS + LATER_IMAGE_EXTENSIONS)
    assert (len(now.manifest), len(then)) == (4, 2)
    with monkeypatch.context() as earlier:
        earlier.setattr("pipeline.runs.run.manifest_bytes", _as_frozen_before)
        name = fingerprint_of(now.config_fingerprint.digest, then.digest, now.items_per_shard)
        begun = create_or_resume(replace(now, manifest=then, fingerprint=name))
    assert len(plan_run(job).manifest) == 2
    complete(begun, shards=[0])
    storage.write_atomic(str(tmp_path / "in" / "e.mp4"), b"x")
    with pytest.raises(RefusedError, match="holds another run"):
        plan_run(job)


def _checked(manifest, job):
    """Addresses that the loader would open, and (error type, words) of the others."""
    found, refused = [], []
    for item in manifest.items:
        try:
            found.append(storage.check_uri(item.uris[0], allowed_roots=readable_roots(job)))
        except ItemError as error:
            refused.append((error.error_type, str(error)))
    return found, refused


ODD_NAMES = [b"bad\xff.mp4", b"new\nline.mp4", b"back\\slash.mp4", b"a::b.mp4", b"\xe2\x80\xa8.mp4", b"deep\xfe/c.mp4"]


def test_a_name_that_cannot_be_an_address_is_one_failed_row(config, tmp_path):
    folder = tmp_path / "in"
    put_media(str(folder), 1)
    for name in ODD_NAMES:
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")
    job = config(input={"uri": str(folder)})
    items = read_manifest(manifest_bytes(build_manifest(job))).items
    assert len({item.item_id for item in items}) == len(items) == 1 + len(ODD_NAMES)
    _, refused = _checked(build_manifest(job), job)
    assert [kind for kind, _ in refused] == ["unsafe_uri"] * len(ODD_NAMES)
    assert any(r"bad\xff.mp4: backslashes; rename the file" in message for _, message in refused)


@pytest.fixture
def hub_cache(tmp_path):
    """A Hugging Face cache of a data set: every file is a link to a blob."""
    cache = tmp_path / "hub" / "datasets--org--clips"
    listed = cache / "snapshots" / "0123"
    put_media(str(cache / "blobs"), 3)
    (listed / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.mp4", "b.mp4", "deep/c.mp4"]):
        target = os.path.relpath(cache / "blobs" / f"clip-{number:03d}.mp4", (listed / name).parent)
        (listed / name).symlink_to(target)
    return cache, listed


def test_links_may_lead_into_a_folder_that_the_user_names(config, hub_cache, tmp_path):
    cache, listed = hub_cache
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (listed / "escape.mp4").symlink_to(tmp_path / "secret.mp4")
    (listed / "within.mp4").symlink_to(listed / "a.mp4")
    for inputs, readable in (
        ({}, 0),
        ({"follow_links": str(cache)}, 4),
        ({"follow_links": f"file://{cache}/blobs/"}, 4),
    ):
        job = config(input={"uri": str(listed), **inputs})
        found, refused = _checked(build_manifest(job), job)
        assert {kind for kind, _ in refused} == {"unsafe_uri"}
        assert all("leads by a link to" in said and "set input.follow_links" in said for _, said in refused)
        assert len(found) == readable
        assert str(listed / "escape.mp4") not in found


def test_a_manifest_may_not_name_what_links_may_lead_to(config, hub_cache):
    cache, listed = hub_cache
    uri = put_manifest(str(listed), "m.csv", f"uri\n{cache}/blobs/clip-000.mp4\n")
    with pytest.raises(InputError, match="outside the allowed folders"):
        build_manifest(config(input={"manifest": uri, "follow_links": str(cache)}))


def test_a_dry_run_counts_links(config, hub_cache, tmp_path):
    cache, listed = hub_cache
    (listed / "folder").symlink_to(cache / "blobs")
    (listed / "broken.mp4").symlink_to(tmp_path / "nowhere.mp4")
    output = {"uri": str(tmp_path / "out")}
    lines = _link_lines(plan_run(config(input={"uri": str(listed)}, output=output)))
    assert [" ".join(line.split()) for line in lines] == [
        "links 3 objects are links",
        f"3 objects lie outside the allowed folders ({listed})",
        f"and will be failed rows unsafe_uri; --set input.follow_links={cache / 'blobs'} allows them",
        "2 links to folders or to nothing are left out",
    ]
    named = config(input={"uri": str(listed), "follow_links": str(cache)}, output=output)
    assert len(_link_lines(plan_run(named))) == 2


def test_follow_links_names_a_local_folder(config, tmp_path):
    with pytest.raises(ValueError, match="object stores have no links"):
        config(input={"uri": str(tmp_path), "follow_links": "s3://bucket/x"})
    put_media(str(tmp_path / "in"), 1)
    with pytest.raises(ConfigError, match=r"input\.follow_links: there is no folder .*nowhere"):
        build_manifest(config(input={"uri": str(tmp_path / "in"), "follow_links": str(tmp_path / "nowhere")}))


def test_the_page_on_listings_names_every_extension():
    rows = [
        line.split("|") for line in (REPOSITORY / "docs/manifests.md").read_text().splitlines() if line.startswith("| ")
    ]
    named = {row[1].strip(): re.findall(r"`([a-z0-9]+)`", row[2]) for row in rows}
    assert sorted(named["video"]) == sorted(VIDEO_EXTENSIONS + LATER_VIDEO_EXTENSIONS)
    assert sorted(named["image"]) == sorted(IMAGE_EXTENSIONS + LATER_IMAGE_EXTENSIONS)
    assert sorted(named["document"]) == sorted(DOCUMENT_EXTENSIONS)
