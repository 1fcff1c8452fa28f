"""Tests a store that sends wrong bytes: short, long, of another version, or of two. None of them is returned.

Seeded, over HTTP from a server of our own (`wrong_store`). `tests/pipeline/loading/test_wrong_captions.py` tests such
answers in whole runs.
"""

from collections import Counter

import numpy as np
import pytest

from pipeline.errors import ItemError
from pipeline.storage import storage
from tests.support.stores.wrong_store import WRONG_BODIES, WRONG_RANGES, WRONG_VERSIONS, Served

SIZE = 20_000
OLD, NEW = (np.random.default_rng(seed).bytes(SIZE) for seed in (1, 2))
URI = "s3://bucket/object"
NO_MD5 = "0123456789abcdef" * 2


@pytest.fixture
def serve(wrong_store):
    """Serve ``s3://bucket/object``."""

    def put(**options):
        served = Served(OLD, NEW, **options)
        wrong_store.put(URI, served)
        return served

    return put


def read_whole(served, path, **options):
    fetched = storage.fetch(URI, str(path), etag=served.etag, **options)
    return fetched.num_bytes == SIZE and path.read_bytes() == OLD


def read_parts(served, _path):
    ranges = [(0, 5000), (7000, 7100), (12_000, 19_000)]
    found = storage.read_ranges(URI, ranges, size=SIZE, etag=served.etag)
    return found == [OLD[start:end] for start, end in ranges]


@pytest.mark.parametrize("is_multipart", [False, True], ids=["MD5", "CRC-32"])
@pytest.mark.parametrize("read", [read_whole, read_parts])
def test_right_answers_are_read(serve, tmp_path, read, is_multipart):
    assert read(serve(is_multipart=is_multipart), tmp_path / "copy")


def wrong_answers():
    """(how it is read, what is wrong, whether the MD5 is hidden) of every kind a client can tell from what it gets.

    In S3's protocol ranges carry no checksum: bytes that a store swaps under the right tag cannot be told.
    """
    for is_multipart in (False, True):
        for fault in (*WRONG_BODIES, *WRONG_VERSIONS):
            yield read_whole, fault, is_multipart
        for fault in ("cut off", "short", "long", *WRONG_VERSIONS, *WRONG_RANGES):
            yield read_parts, fault, is_multipart


def error_of(read, served, path):
    """Return the error; None where the read succeeded."""
    try:
        read(served, path)
    except ItemError as error:
        return error
    return None


def test_wrong_answers_give_no_byte(serve, tmp_path):
    kinds, num_refused = list(wrong_answers()), Counter()
    for seed in range(2 * len(kinds)):
        read, fault, is_multipart = kinds[seed % len(kinds)]
        served = serve(fault=fault, is_multipart=is_multipart, seed=seed)
        expected = "changed_object" if fault in {*WRONG_VERSIONS, *WRONG_RANGES} else "store_error"
        error = error_of(read, served, tmp_path / "copy")
        assert error, (seed, read.__name__, fault, is_multipart)
        assert error.error_type == expected, (seed, read.__name__, fault, is_multipart)
        num_refused[fault] += 1
    assert set(num_refused) == {*WRONG_BODIES, *WRONG_VERSIONS, *WRONG_RANGES}


# ---- tags that are no MD5 ----

TAGS_THAT_ARE_NO_MD5 = {
    "SSE-KMS": {"x-amz-server-side-encryption": "aws:kms"},
    "DSSE-KMS": {"x-amz-server-side-encryption": "aws:kms:dsse"},
    "SSE-KMS, its key": {"x-amz-server-side-encryption-aws-kms-key-id": "arn:aws:kms:key"},
    "SSE-C": {"x-amz-server-side-encryption-customer-algorithm": "AES256"},
    "Huawei OBS": {"x-obs-server-side-encryption": "kms"},
    "Google, by its S3 interface": {"x-goog-encryption-kms-key-name": "projects/p/key"},
    "IBM": {"ibm-sse-kp-enabled": "true"},
}


@pytest.mark.parametrize("store", TAGS_THAT_ARE_NO_MD5)
def test_a_tag_under_keys_is_not_taken_for_an_md5(serve, tmp_path, store):
    assert read_whole(serve(tag=NO_MD5, headers=TAGS_THAT_ARE_NO_MD5[store]), tmp_path / "copy")


@pytest.mark.parametrize("tag", [NO_MD5 + "-1", NO_MD5.upper(), "CKicn4fknegCEAE=", NO_MD5[:31]])
def test_a_tag_of_another_form_is_not_taken_for_an_md5(serve, tmp_path, tag):
    assert read_whole(serve(tag=tag), tmp_path / "copy")


@pytest.mark.parametrize("headers", [{}, {"x-amz-server-side-encryption": "AES256"}], ids=["plain", "SSE-S3"])
def test_where_s3_s_rule_makes_it_an_md5_it_is_compared_unless_it_is_switched_off(serve, tmp_path, headers):
    served = serve(tag=NO_MD5, headers=headers)
    error = error_of(read_whole, served, tmp_path / "copy")
    assert error.error_type == "store_error"
    assert "media.verify_md5=off" in str(error)
    assert read_whole(served, tmp_path / "copy", verify_md5=False)
    with pytest.raises(ItemError, match=r"bytes came of|Payload"):
        read_whole(serve(tag=NO_MD5, headers=headers, fault="cut off"), tmp_path / "copy", verify_md5=False)
