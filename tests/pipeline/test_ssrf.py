"""Nothing in a manifest and nothing in a media file makes a job connect somewhere or read what it was not given.

A listener on loopback counts connections; a secret file lies beside the media folder and its canary must never show.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import get_args

import pytest

from pipeline.config.schema import MediaConfig
from pipeline.errors import InputError, ItemError, StorageError
from pipeline.execution.runner import run_job
from pipeline.inputs.build_manifest import build_manifest
from pipeline.loading.decoding.pyav_scan import scan
from pipeline.loading.loader import Loader
from pipeline.loading.video_index.container import Container
from pipeline.records import MediaItem
from pipeline.storage import storage
from tests.support.media import adversarial_documents
from tests.support.media.video_writers import altered, clip
from tests.support.models.digest_model import digest_worker
from tests.support.runs import fakes
from tests.support.runs.misbehaving import Untouched
from tests.support.runs.run_folders import make_config
from tests.support.stores.hostile_addresses import hostile_addresses, literal_names

CANARY = "CANARY-of-a-secret-7f3a"


def _bound_to_one_number() -> tuple[socket.socket, socket.socket]:
    """A TCP and a UDP socket; of the numbers that are free for the one, another process may hold some for the other."""
    with ExitStack() as refused:
        while True:
            tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                udp.bind(tcp.getsockname())
                return tcp, udp
            except OSError:
                refused.enter_context(tcp)  # held, so that the next number is another
                udp.close()


class Listener:
    """Counts TCP connections to a loopback port, and datagrams to the same number."""

    def __init__(self) -> None:
        self._tcp, self._udp = _bound_to_one_number()
        self.port = self._tcp.getsockname()[1]
        self._tcp.setblocking(False)
        self._udp.setblocking(False)
        self.url = f"http://127.0.0.1:{self.port}"

    def _take_connection(self) -> None:
        self._tcp.accept()[0].close()

    def _take_datagram(self) -> None:
        self._udp.recv(10)

    @property
    def num_contacts(self) -> int:
        """Connections wait in the backlog, datagrams in the buffer, until they are counted here."""
        count = 0
        for receive in (self._take_connection, self._take_datagram):
            while True:
                try:
                    receive()
                except BlockingIOError:
                    break
                count += 1
        return count

    def close(self) -> None:
        self._tcp.close()
        self._udp.close()


@pytest.fixture
def listener():
    opened = Listener()
    yield opened
    opened.close()


@pytest.fixture
def secret(tmp_path, monkeypatch) -> Path:
    """Outside the media folder; the same canary stands in the environment."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    (tmp_path / "secret.mp4").write_text(CANARY)
    (tmp_path / "media").mkdir()
    return tmp_path / "secret.mp4"


def test_hostile_addresses_are_refused_with_their_lines(model_folder, listener, secret) -> None:
    media = str(secret.parent / "media")
    addresses = hostile_addresses(listener.url, secret, CANARY)
    assert len(addresses) >= 60
    for address in addresses:
        manifest = Path(media, "manifest.jsonl")
        manifest.write_text(
            json.dumps({"uri": "good.mp4"}) + "\n" + json.dumps({"uri": address, "media_kind": "video"})
        )
        with pytest.raises(InputError, match="line 2") as caught:
            build_manifest(make_config(model_folder, input={"manifest": str(manifest)}))
        assert CANARY not in str(caught.value)
        assert str(caught.value).isprintable()
        if not address.startswith(("..", "\\")):  # relative ones are the manifest's to resolve
            with pytest.raises(ItemError) as refused:
                storage.check_uri(address, allowed_roots=[media])
            assert refused.value.error_type == "unsafe_uri", address
    assert listener.num_contacts == 0


def run(folder: Path, rows: list[dict], *, out: str = "out", follow_links: str | None = None, **sections) -> list[dict]:
    """A whole run over a manifest in the media folder; the canary must be in nothing it leaves."""
    manifest = folder / "media" / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    config = fakes.job_config(folder / out, {"manifest": str(manifest), "follow_links": follow_links}, **sections)
    run_job(config, worker_factory=digest_worker)
    made = fakes.read_rows(folder / out)
    assert fakes.violations(folder / out) == []
    assert CANARY not in json.dumps(made)
    for path in (folder / out).rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()
    return sorted(made, key=lambda row: row["item_id"])


def test_odd_names_are_taken_literally(listener, secret) -> None:
    names = literal_names(listener.url)
    rows = [{"item_id": f"{n:02}", "uri": name, "media_kind": "video"} for n, name in enumerate(names)]
    made = run(secret.parent, rows)
    assert {row["error_type"] for row in made} == {"not_found", "unsafe_uri"}
    assert {row["uri"].partition("media/")[2][:5] for row in made if row["error_type"] == "unsafe_uri"} == {
        "cache",
        "async",
    }
    assert listener.num_contacts == 0


def test_links_and_special_files_do_not_lead_out(secret) -> None:
    media = secret.parent / "media"
    outside = secret.parent / "outside"
    outside.mkdir()
    clip()(outside / "other.mp4")
    targets = {"link.mp4": secret, "environ.mp4": Path("/proc/self/environ"), "video.mp4": outside / "other.mp4"}
    for name, target in targets.items():
        (media / name).symlink_to(target)
    (media / "chain.mp4").symlink_to(media / "link.mp4")
    (media / "folder").symlink_to(outside)
    (media / "zero.mp4").symlink_to("/dev/zero")
    (media / "loop.mp4").symlink_to(media / "loop.mp4")
    (media / "directory.mp4").mkdir()
    os.mkfifo(media / "pipe.mp4")
    clip()(media / "good.mp4")
    (media / "inside.mp4").symlink_to(media / "good.mp4")
    expected = {
        **dict.fromkeys([*targets, "chain.mp4", "folder/other.mp4", "zero.mp4"], "unsafe_uri"),
        **dict.fromkeys(["directory.mp4", "pipe.mp4"], "not_found"),
        "loop.mp4": "store_error",
        **dict.fromkeys(["good.mp4", "inside.mp4"], None),
    }
    rows = [{"item_id": name, "uri": name} for name in expected]
    made = run(secret.parent, rows, media={"load_timeout_s": 20})
    assert {row["item_id"]: row["error_type"] for row in made} == expected
    made = run(secret.parent, rows, out="named", follow_links=str(outside), media={"load_timeout_s": 20})
    expected |= dict.fromkeys(["video.mp4", "folder/other.mp4"], None)
    assert {row["item_id"]: row["error_type"] for row in made} == expected


def references(location: bytes):
    """An MP4 whose track says that its data lie in another file: a `url ` entry, and the `alis` that FFmpeg follows."""
    path = location.removeprefix(b"file://")
    body = (
        bytes(4 + 10 + 28 + 12 + 64 + 16 + 2 + 2 + 16)
        + struct.pack(">HH", 2, len(path))
        + path
        + b"\0" * (len(path) % 2)
    )
    alias = struct.pack(">I4s", 8 + len(body) + 4, b"alis") + body + b"\xff\xff\0\0"
    entries = {"url": struct.pack(">I4sI", 12 + len(location) + 1, b"url ", 0) + location + b"\0", "alis": alias}

    def change(data: bytearray, entry: bytes) -> bytearray:
        place = data.index(b"dref") + 12
        (old_size,) = struct.unpack_from(">I", data, place)
        for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
            at = data.index(name) - 4
            struct.pack_into(">I", data, at, struct.unpack_from(">I", data, at)[0] + len(entry) - old_size)
        return data[:place] + entry + data[place + old_size :]

    return {name: altered(clip(), lambda data, entry=entry: change(data, entry)) for name, entry in entries.items()}


def polyglots(listener, secret) -> dict[str, bytes]:
    """Files whose first bytes are a video's, with a text in them that names what to open."""
    texts = adversarial_documents.outward(listener.url, str(secret))
    made = {}
    for name in ("playlist.mp4", "session.mp4", "script.mp4", "manifest.mpd"):
        text = b"\n" + texts[name]
        made[f"brand-and-{name}"] = struct.pack(">I4s4sI", 16, b"ftyp", b"isom", 0) + text
        made[f"skip-and-{name}"] = b"\x01\x01\x01\x10skip" + text
        made[f"avi-and-{name}"] = b"RIFF\xff\xff\xff\x7fAVI " + text
        made[f"ebml-and-{name}"] = b"\x1a\x45\xdf\xa3\x8b\x42\x82\x88matroska" + text
        made[f"transport-and-{name}"] = b"".join(b"\x47\x1f\xff\x10" + text[:184].ljust(184) for _ in range(5)) + text
    return made


@pytest.mark.parametrize(
    "decoder", ["auto", pytest.param("decord", marks=pytest.mark.long), pytest.param("pyav", marks=pytest.mark.long)]
)
def test_media_that_point_outward_reach_nothing(listener, secret, decoder) -> None:
    media = secret.parent / "media"
    files = {**adversarial_documents.outward(listener.url, str(secret)), **polyglots(listener, secret)}
    for name, data in files.items():
        (media / name).write_bytes(data)
    for location in (f"file://{secret}", f"{listener.url}/a"):
        for kind, write in references(location.encode()).items():
            name = f"{kind}-to-{'file' if location.startswith('file') else 'http'}.mp4"
            write(media / name)
            files[name] = b""
    rows = [
        {"item_id": f"{name} as {kind}", "uri": name, "media_kind": kind}
        for name in files
        for kind in ("video", "image")
    ]
    made = run(secret.parent, rows, media={"decoder": decoder, "load_timeout_s": 30})
    assert listener.num_contacts == 0
    outcomes = {row["item_id"]: row["error_type"] for row in made}
    assert len(outcomes) == 2 * len(files) >= 80
    for name, outcome in outcomes.items():
        if name.startswith("url-"):  # a URL entry is not followed by any of FFmpeg's versions: the own data are read
            assert outcome in {None, "unsupported_media", "corrupt_media"}, (name, outcome)
        else:
            assert outcome in {"unsupported_media", "corrupt_media"}, (name, outcome)


@pytest.mark.parametrize("container", get_args(Container))
def test_a_script_that_passed_for_a_video_would_open_no_file_beside_it(tmp_path, container) -> None:
    """Behind the look at the first bytes stands a second door: one demuxer, and bytes instead of a path."""
    clip()(tmp_path / "beside.mp4")
    (tmp_path / "script.mp4").write_text("ffconcat version 1.0\nfile beside.mp4\n")
    with pytest.raises(ItemError) as caught:
        scan(str(tmp_path / "script.mp4"), container, MediaConfig())
    assert caught.value.error_type == "corrupt_media"


def test_a_decoder_left_to_itself_would_connect(listener, secret) -> None:
    """What the listener is for: the same playlist, opened by an FFmpeg that may choose its demuxer and protocols."""
    import av

    path = secret.parent / "media" / "playlist.m3u8"
    path.write_bytes(adversarial_documents.outward(listener.url, str(secret))["playlist.m3u8"])
    options = {"protocol_whitelist": "file,http,tcp", "extension_picky": "0", "allowed_extensions": "ALL"}
    with pytest.raises((av.error.FFmpegError, OSError)):
        av.open(str(path), options=options, timeout=1.0).close()
    assert listener.num_contacts > 0


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_store_that_redirects_elsewhere_is_not_followed(listener, monkeypatch, status) -> None:
    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Location", f"{listener.url}/stolen")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Redirecting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": CANARY,
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        item = MediaItem("a", ("s3://bucket/a.mp4",), "video", (-1,), ("",))
        with Loader(MediaConfig(), Untouched()) as loader, pytest.raises((ItemError, StorageError)) as caught:
            loader.load(item)
        assert CANARY not in str(caught.value)
        assert listener.num_contacts == 0
    finally:
        server.shutdown()
        server.server_close()
