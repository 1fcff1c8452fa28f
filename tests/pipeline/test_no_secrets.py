"""Canary credentials in the environment, in addresses and in a store's answers never reach messages or rows."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from illava.requests import Generation
from pipeline.errors import ItemError, PipelineError
from pipeline.execution.ray.executor import RayExecutor
from pipeline.execution.rows import classify
from pipeline.exit_codes import guarded
from pipeline.loading.load_report import load_reported
from pipeline.records import MediaItem
from pipeline.redaction import redacted, visible
from pipeline.storage import storage
from tests.support.runs.actors_without_ray import Cluster, idle_scheduler
from tests.support.runs.fakes import job_config

CANARY = "CANARY/of+a=secret-7f3a"
NAMES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "OPENAI_API_KEY", "DB_PASSWORD", "MY_CREDENTIALS")
ITEM = MediaItem("a", ("a.mp4",), "video", (-1,), ("",))


@pytest.fixture(params=NAMES)
def secret(request, monkeypatch) -> str:
    """A different one in each variable."""
    value = f"{CANARY}-{request.param}"
    monkeypatch.setenv(request.param, value)
    return value


def test_values_of_the_environment_are_blotted_out_wherever_an_error_is_put_into_words(secret, capsys) -> None:
    error = RuntimeError(f"request with {secret} was refused")

    class Leaky:
        def load(self, item):
            raise error

        def close(self) -> None:
            pass

    report, _ = load_reported(Leaky(), ITEM)
    assert report.error is not None

    def leak() -> int:
        raise error

    assert guarded(leak, debug=False) == 5
    for text in (redacted(str(error)), str(report.error), classify(error)[1], capsys.readouterr().err):
        assert secret not in text
        assert "request with *** was refused" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://user:{CANARY}@host/x", "http://***@host/x"),
        (f"proxy https://{CANARY.replace('/', '')}@host", "proxy https://***@host"),
        (f"https://h/a?X-Amz-Signature={CANARY}&b=1", "https://h/a?X-Amz-Signature=***&b=1"),
        (f"https://h/a?X-Goog-Credential={CANARY}", "https://h/a?X-Goog-Credential=***"),
        (f"https://h/a?b=1&sig={CANARY}'", "https://h/a?b=1&sig=***'"),
        ("s3://bucket/mail@example.org/a.mp4", "s3://bucket/mail@example.org/a.mp4"),
        ("https://h/a?b=1", "https://h/a?b=1"),
    ],
)
def test_addresses_lose_user_info_and_signatures_only(text, shown) -> None:
    if CANARY in text and "/" in CANARY and "@" in text:
        text = text.replace(CANARY, CANARY.replace("/", ""))
    assert redacted(text) == shown


def test_a_secret_that_begins_with_another_is_blotted_out_whole(monkeypatch) -> None:
    monkeypatch.setenv("A_TOKEN", CANARY)
    monkeypatch.setenv("B_TOKEN", f"{CANARY}-and-more")
    assert redacted(f"first {CANARY}-and-more, then {CANARY}") == "first ***, then ***"


def test_the_last_words_of_an_actor_are_redacted_on_their_way_to_a_row_and_to_the_log(caplog, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    scheduler, reasons = idle_scheduler(), []
    monkeypatch.setattr(scheduler, "worker_lost", lambda name, reason, **_: reasons.append(reason))
    config, cluster = job_config("unused", {"uri": "unused"}), Cluster(stderr_tail=f"hub said {CANARY}")
    RayExecutor(cluster, config, scheduler, make_loader=None, make_worker=None).poll()
    assert reasons == ["hub said ***"]
    assert ["was lost (hub said ***)" in line for line in caplog.messages] == [True, True]  # a VLM actor and a reader


def test_short_values_do_not_blot_out_words(monkeypatch) -> None:
    monkeypatch.setenv("USE_TOKEN", "true")
    assert redacted("it is true") == "it is true"


def test_a_terminal_shows_control_characters_and_marks_that_reorder(capsys, caplog) -> None:
    text = "a\x1b[2J\x1b]0;title\x07b\r\x9bc\u202ed\u2028e\ud800\nnext line\tend"
    assert visible(text) == r"a\x1b[2J\x1b]0;title\x07b\x0d\x9bc\x202ed\x2028e\ud800" + "\nnext line\tend"

    def fail() -> int:
        raise PipelineError(text)

    guarded(fail, debug=False)
    assert "\x1b" not in capsys.readouterr().err
    [line] = caplog.messages
    assert line == visible(text), "whatever else handles the line gets no other one"


@pytest.fixture
def talkative_store(monkeypatch):
    """An S3 server that refuses and repeats everything it was sent, as some gateways do."""

    class Talkative(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = f"{self.headers['Authorization']} {self.headers.get('X-Amz-Security-Token')} {CANARY}-key"
            body = f"<Error><Code>{self.server.code}</Code><Message>refused {said}</Message></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Talkative)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "CANARYACCESSKEY",
        "AWS_SECRET_ACCESS_KEY": f"{CANARY}-key",
        "AWS_SESSION_TOKEN": f"{CANARY}-session",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("code", ["SignatureDoesNotMatch", "ExpiredToken", "AccessDenied"])
def test_what_a_store_repeats_is_not_passed_on(talkative_store, code) -> None:
    talkative_store.code = code
    for call in (storage.stat, storage.read, lambda uri: storage.write_atomic(uri, b"x"), storage.list_objects):
        with pytest.raises(PipelineError) as caught:
            call("s3://bucket/a.mp4")
        assert "CANARY" not in str(caught.value), call


def test_an_endpoint_with_a_password_is_not_named(monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:CANARYPASSWORD@127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key-of-the-test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ItemError) as caught:
        storage.stat("s3://bucket/a.mp4")
    assert "CANARY" not in str(caught.value)


def test_a_model_error_of_one_request_is_redacted(secret) -> None:
    generation = Generation.failed("a", OSError(f"hub said {secret}"))
    assert classify(generation.error) == ("internal_error", "OSError: hub said ***")
