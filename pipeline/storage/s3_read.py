"""Reads the bytes of one version of an S3 object, and checks them against what the store says of them.

Every answer must carry the requested entity tag and exactly the bytes it announces. A whole body must also have the MD5
that its tag states, where the tag is an MD5, and the ``x-amz-checksum-*`` that the store sent (the client library
compares that one). The s3fs file system is opened by `storage.storage`.

Two libraries were tried in place of s3fs and of this file. obstore 0.12.1 follows redirects to any host, compares no
checksum, shows no response header by which a caller could compare it, and cannot name keys such as ``a//b``. boto3 1.43
passes the tests of `storage.storage`, but listing, writing and naming errors, which s3fs does, would take 85 more lines
here, as ``gs://`` needs the fsspec file system either way.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.storage.errors import BodyMismatchError, ObjectChangedError, http_code

_CHUNK_BYTES = 1 << 20
_REQUESTS_AT_ONCE = 8
_MD5 = re.compile(r"[0-9a-f]{32}")
_PLAIN_ENCRYPTION = ("x-amz-server-side-encryption", "AES256")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class PinnedObject:
    """Pins one version of an object.

    Attributes:
        filesystem: an s3fs file system, which is asynchronous inside.
        uri: ``s3://bucket/key``.
        etag: entity tag of the version, without quotes; "" accepts the version of the first answer.
    """

    filesystem: Any
    uri: str
    etag: str

    def copy(self, target: str, *, verify_md5: bool = True) -> int:
        """Stream the whole object into a local file; return its bytes."""
        return self._wait(self._copy(target, verify_md5=verify_md5))

    def read_ranges(self, ranges: Sequence[tuple[int, int]], *, size: int) -> list[bytes]:
        """Read the bytes of each half-open range, with some requests at a time; ``size`` is the whole object's."""
        return self._wait(self._read_ranges(ranges, size))

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self.filesystem.loop).result()

    async def _copy(self, target: str, *, verify_md5: bool) -> int:
        answer = await self._get()
        num_bytes, md5 = 0, hashlib.md5(usedforsecurity=False)
        async with answer["Body"] as body:
            with open(target, "wb") as file:
                while chunk := await body.read(_CHUNK_BYTES):
                    num_bytes += len(chunk)
                    md5.update(chunk)
                    file.write(chunk)
        self._check_length(num_bytes, answer.get("ContentLength", num_bytes))
        if verify_md5 and _tag_is_md5(answer, self.uri) and md5.hexdigest() != _tag(answer):
            raise BodyMismatchError(
                f"the body has the MD5 {md5.hexdigest()}, its ETag is {_tag(answer)}; should this store's ETags be no "
                "MD5s of whole objects, media.verify_md5=off"
            )
        return num_bytes

    async def _read_ranges(self, ranges: Sequence[tuple[int, int]], size: int) -> list[bytes]:
        free = asyncio.Semaphore(_REQUESTS_AT_ONCE)

        async def read(start: int, end: int) -> bytes:
            async with free:
                answer = await self._get(Range=f"bytes={start}-{end - 1}")
                async with answer["Body"] as body:
                    data = await body.read()
            sent = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
            if not sent or tuple(map(int, sent.groups())) != (start, end - 1, size):
                found = answer.get("ContentRange", "no range")
                raise ObjectChangedError(f"asked for bytes {start}-{end - 1} of {size}, the store sent {found}")
            self._check_length(len(data), end - start)
            return data

        tasks = [asyncio.ensure_future(read(start, end)) for start, end in ranges]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _get(self, **options: str) -> dict[str, Any]:
        bucket, _, key = self.uri.partition("://")[2].partition("/")
        condition = {"IfMatch": f'"{self.etag}"'} if self.etag else {}
        asked = {"Bucket": bucket, "Key": key, "ChecksumMode": "ENABLED", **condition, **options}
        try:
            answer = await self.filesystem._call_s3("get_object", **asked)
        except Exception as error:
            if http_code(error) in {"PreconditionFailed", "412"}:
                raise ObjectChangedError(f"expected etag {self.etag}, the object has another one") from error
            raise
        if self.etag and _tag(answer) != self.etag:
            answer["Body"].close()
            raise ObjectChangedError(f"expected etag {self.etag}, the store sent {_tag(answer) or 'none'}")
        return answer

    @staticmethod
    def _check_length(num_bytes: int, num_expected: int) -> None:
        if num_bytes != num_expected:
            raise BodyMismatchError(f"{num_bytes} bytes came of {num_expected}")


def _tag(answer: dict[str, Any]) -> str:
    return str(answer.get("ETag") or "").strip('"')


def _tag_is_md5(answer: dict[str, Any], uri: str) -> bool:
    """Whether the tag is the MD5 of the whole object, by S3's rule.

    The tag is no MD5 where the object was uploaded in parts ("-" in the tag), in directory buckets, and under any
    encryption but the store's own plain one; other stores report theirs in headers of other names.
    Source: docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html, ETag.
    """
    headers = answer["ResponseMetadata"]["HTTPHeaders"].items()
    about_keys = [(name, value) for name, value in headers if "encryption" in name or "-sse-" in name]
    in_directory = uri.partition("://")[2].partition("/")[0].endswith("--x-s3")
    return bool(_MD5.fullmatch(_tag(answer))) and set(about_keys) <= {_PLAIN_ENCRYPTION} and not in_directory
