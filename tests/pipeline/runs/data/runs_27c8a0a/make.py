"""Makes this folder, with the code of commit 27c8a0a and no other: see README.txt.

Every run is ended as the name says; media lie in a bucket of a moto server, whose entity tags are MD5 sums.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
from clips import barcode_frame, write_barcode_video, write_truncated, write_video
from models import make_onevision
from pdf_files import page, write_pdf
from PIL import Image

BUCKET, REGION = "illava-27c8a0a", "eu-west-1"
FLAKY = "d_flaky.mp4"  # the store fails while it is read, and later does not
MERGED = {"steps": [{"stage": "vision_block", "layers": [1], "reducer": {"kind": "tome", "num_merged": 6}}]}


def job(name: str, *, source: str, task: dict, **sections) -> dict:
    """A configuration of the fixture, as a job's YAML would have it."""
    return {
        "name": name,
        "input": {"uri": f"s3://{BUCKET}/{source}/"},
        "media": {"num_frames": 4, "page_dpi": 36, "max_pixels_per_frame": 40_000},
        "model": {"model_id": "model", "device": "cpu", "kv_cache_bytes": 20_000_000},
        "task": task,
        "sampling": {"max_new_tokens": 4},
        "runtime": {"executor": "local", "gpus_per_actor": 0, "max_attempts": 1, "cache_bytes": 50_000_000},
        "prices": {"gpu_hour_usd": 2.0, "cpu_hour_usd": 0.05},
        "output": {"uri": name, "items_per_shard": 3},
        **sections,
    }


CAPTION = {"kind": "caption", "prompt": "Describe the clip."}
QUESTION = {"kind": "question", "choice_template": "{question}\n{options}\nAnswer with a letter."}
JOBS = {
    **{name: job(name, source="clips", task=CAPTION) for name in ("finished", "interrupted")},
    **{
        name: job(name, source="clips", task=CAPTION, input={"uri": f"s3://{BUCKET}/clips/", "pattern": "[abd]*"})
        for name in ("retried", "retrying")
    },
    "documents": job("documents", source="documents", task={"kind": "document", "prompt": "Read the page."}),
    "questions": job(
        "questions",
        source="clips",
        task=QUESTION,
        input={"uri": f"s3://{BUCKET}/clips/", "manifest": f"s3://{BUCKET}/questions.jsonl"},
    ),
    "questions_merged": job(
        "questions_merged",
        source="clips",
        task=QUESTION,
        reduction=MERGED,
        input={"uri": f"s3://{BUCKET}/clips/", "manifest": f"s3://{BUCKET}/questions.jsonl"},
    ),
}


def make_media(folder: Path) -> None:
    """Six clips and pictures of which two fail, questions about two of them, one PDF with a page that is too large."""
    clips = folder / "clips"
    clips.mkdir(parents=True)
    small = {"width": 64, "height": 64, "num_frames": 6}
    write_barcode_video(clips / "a.mp4", 101, **small)
    (clips / "b_broken.mp4").write_bytes(b"no video " * 20)
    Image.fromarray(barcode_frame(102, width=64, height=64)).save(clips / "c.png")
    write_barcode_video(clips / FLAKY, 103, **small)
    noise = np.random.default_rng(0).integers(-20, 20, (12, 64, 64, 3))
    frames = (np.clip(barcode_frame(104, n, width=64, height=64) + noise[n], 0, 255) for n in range(12))
    whole = write_video(
        folder / "whole.mp4",
        (f.astype(np.uint8) for f in frames),
        options={"crf": "30", "preset": "ultrafast", "threads": "1"},
        container_options={"movflags": "+faststart"},
    )
    write_truncated(clips / "e_torn.mp4", whole, keep_ratio=0.75)
    whole.unlink()
    write_barcode_video(clips / "f.mp4", 105, **small)
    questions = [
        {"id": "q1", "uri": "a.mp4", "question": "Which?", "options": ["red", "blue"], "reference": "A", "shelf": "1"},
        {"id": "q2", "uri": "c.png", "question": "Which?", "options": ["red", "blue"], "reference": "B", "shelf": "2"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    documents = folder / "documents"
    documents.mkdir()
    write_pdf(documents / "three.pdf", [page(0), page(1, box="0 0 1440 720"), page(2)])


def serve() -> tuple[subprocess.Popen, str]:
    """A moto server of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [os.path.join(os.path.dirname(sys.executable), "moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
            return server, url
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def upload(url: str, media: Path) -> None:
    """All media under their own names."""
    import boto3

    client = boto3.client("s3", endpoint_url=url, region_name=REGION)
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    for path in sorted(media.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=path.relative_to(media).as_posix(), Body=path.read_bytes())


def run(
    name: str, *, store_fails: bool = False, killed_at: tuple[str, str] | None = None, retried: bool = False
) -> None:
    """One job in a process of its own; ``killed_at`` names the fault point at which SIGKILL ends it."""
    if (child := os.fork()) == 0:
        from pipeline.retry import begin_retry
        from pipeline.runner import continue_run, run_job

        from pipeline.config import JobConfig
        from pipeline.errors import ItemError
        from pipeline.faults import injected

        def hook(point: str, subject: str) -> None:
            if (point, subject) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if store_fails and point == "read" and subject.endswith(FLAKY):
                raise ItemError("store_error", "503 Slow Down", retryable=False)

        with injected(hook):
            if retried:
                continue_run(begin_retry(name))
            else:
                run_job(JobConfig.model_validate(JOBS[name]))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert (os.WTERMSIG(status) == signal.SIGKILL) if killed_at else status == 0, (name, status)


def main() -> None:
    """All of it, below the working folder."""
    make_media(Path("media"))
    make_onevision(
        "model",
        vision={"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8},
        text={"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 8, "tie_word_embeddings": True},
        max_tiles=1,
    )
    server, url = serve()
    os.environ |= {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing-key-id",
        "AWS_SECRET_ACCESS_KEY": "testing-secret-value",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        upload(url, Path("media"))
        run("finished", store_fails=True)
        run("interrupted", store_fails=True, killed_at=("publish_after", "0"))
        run("retried", store_fails=True)
        run("retried", retried=True)
        run("retrying", store_fails=True)
        run("retrying", retried=True, killed_at=("publish_before", "0"))
        run("documents")
        run("questions")
        run("questions_merged")
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
