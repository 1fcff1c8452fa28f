"""Lists addresses that lead out of the media folder or onto a network, and odd names that only look so."""

from __future__ import annotations

from pathlib import Path


def hostile_addresses(url: str, secret: Path, canary: str) -> list[str]:
    """Each must be refused when the manifest is read, and again by whoever opens it."""
    port = url.rpartition(":")[2]
    schemes = (
        "https",
        "ftp",
        "sftp",
        "rtsp",
        "rtmp",
        "gopher",
        "dict",
        "ws",
        "smb",
        "hdfs",
        "memory",
        "s3a",
        "S3",
        "FILE",
    )
    hosts = ("localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0")
    return [
        f"{url}/a.mp4",
        *(f"{scheme}://127.0.0.1:{port}/a.mp4" for scheme in schemes),
        *(f"http://{host}:{port}/a.mp4" for host in hosts),
        f"http://user:{canary}@127.0.0.1:{port}/a.mp4",
        f"https://127.0.0.1:{port}/a.mp4?X-Amz-Signature={canary}",
        "http://169.254.169.254/latest/meta-data/a.mp4",
        *(f"{chain}::{url}/a.mp4" for chain in ("simplecache", "filecache", "blockcache", "zip://a.mp4")),
        "simplecache::s3://bucket/a.mp4",
        f"tar://a.mp4::file://{secret}",
        f"concat:{secret}|{url}/a.mp4",
        f"s3://user:{canary}@bucket/a.mp4",
        f"s3://127.0.0.1:{port}/a.mp4",
        "s3://127.0.0.1/a.mp4",
        "gs://169.254.169.254/latest/a.mp4",
        "s3://[::1]/a.mp4",
        "s3:///a.mp4",
        "s3://b/a.mp4",
        "s3://bucket/../other/a.mp4",
        "s3://bucket/a.mp4?versionId=1",
        "s3://bucket\\@127.0.0.1/a.mp4",
        "s3://bucket/a\n.mp4",
        f"file://localhost{secret}",
        f"file://127.0.0.1{secret}",
        f"file:{secret}",
        f"file://{secret}",
        str(secret),
        f"/{secret}",
        "../secret.mp4",
        "media/../../secret.mp4",
        f"{secret.parent}/media/../secret.mp4",
        "..\\secret.mp4",
        "\\\\127.0.0.1\\share\\a.mp4",
        "a\0.mp4",
        "a\x1b[2J.mp4",
        "a\r.mp4",
        "a\u2028.mp4",
        "a\x85.mp4",
        "/proc/self/environ.mp4",
        "/dev/stdin.mp4",
    ]


def literal_names(url: str) -> list[str]:
    """Odd names of files that do not exist: taken as they stand, so they are not found."""
    port = url.rpartition(":")[2]
    return [
        "%2e%2e/secret.mp4",
        "..%2fsecret.mp4",
        "%00.mp4",
        "~/secret.mp4",
        "$HOME/secret.mp4",
        "$(cat ..%2fsecret.mp4).mp4",
        "`id`.mp4",
        "|cat secret.mp4",
        "*.mp4",
        "pipe:0.mp4",
        f"cache:{url}/a.mp4",
        f"async:{url}/a.mp4",
        "s3:bucket//a.mp4",
        "subfile,,start,0,end,0,,:secret.mp4",
        f"data:video/mp4;base64,AAAA.mp4?{port}",
    ]
