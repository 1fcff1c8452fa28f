"""Tests that a listing becomes one frozen, validated manifest, and that only allowed addresses are read."""

import pytest

from pipeline.errors import ConfigError, InputError
from pipeline.inputs.build_manifest import build_manifest, media_roots
from pipeline.storage import storage
from tests.support.runs.run_folders import put_manifest, put_media


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
    assert manifest.num_unknown == 2
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
        ({"input": {"uri": "text"}}, InputError, "none with a known media extension"),
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
