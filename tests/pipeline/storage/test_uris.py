"""Tests addresses: a positive list, refused with the reason; local ones stay below their roots."""

import pytest

from pipeline.errors import ItemError
from pipeline.storage import storage


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("", "empty"),
        ("http://host/x.mp4", "scheme 'http'"),
        ("memory://x/y", "scheme 'memory'"),
        ("simplecache::s3://bucket/x", "chains"),
        ("s3://bucket/zip::x", "chains"),
        ("s3://user:pw@bucket/x", "user info"),
        ("s3://bucket/a\nb", "control characters"),
        ("s3://bucket/a\u2028b", "control characters"),
        ("s3://bucket\\x", "backslashes"),
        ("s3://b", "scheme://bucket/key"),
        ("s3:///key", "scheme://bucket/key"),
        ("s3:/bucket/key", "scheme://bucket/key"),
        ("S3://bucket/key", "scheme://bucket/key"),
        ("s3://bucket/key?versionId=1", "versions"),
        ("/data/../etc/passwd", "segments"),
        ("s3://bucket/../other", "segments"),
        ("file://host/etc/passwd", "file:///path"),
        ("concat:/a|/b", "scheme 'concat'"),
        ("/data/\udcff.mp4", "Unicode"),
    ],
)
def test_unsafe_addresses_are_refused_with_the_reason(uri, reason):
    with pytest.raises(ItemError, match=reason) as caught:
        storage.check_uri(uri)
    assert caught.value.error_type == "unsafe_uri"
    str(caught.value).encode()


def test_local_addresses_stay_below_their_roots_after_links_are_resolved(tmp_path):
    inside, outside = tmp_path / "media", tmp_path / "secret"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "link.mp4").symlink_to(outside)
    (inside / "ok.mp4").touch()
    (tmp_path / "media-other").touch()
    roots = [str(inside)]
    assert storage.check_uri(f"file://{inside}/ok.mp4", allowed_roots=roots) == str(inside / "ok.mp4")
    assert storage.check_uri("s3://bucket/x", allowed_roots=roots) == "s3://bucket/x"
    for path in (inside / "link.mp4", outside, tmp_path / "media-other"):
        with pytest.raises(ItemError, match="outside the allowed folders"):
            storage.check_uri(str(path), allowed_roots=roots)
    with pytest.raises(ItemError):
        storage.check_uri(str(inside / "ok.mp4"), allowed_roots=[])
