"""Fixtures of the pipeline's tests: a real S3 server (moto over HTTP) and a folder or bucket to work in."""

import uuid
from functools import partial

import pytest

from benchmarks.common.moto_server import moto_server
from pipeline.storage import storage
from tests.support.runs.run_folders import make_config
from tests.support.stores.wrong_store import WrongStore

_REGION = "eu-west-1"  # moto refuses a CreateBucket that names us-east-1


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory):
    """URL of a moto_server process of our own, ended by its pid."""
    with moto_server(tmp_path_factory.mktemp("moto") / "log") as url:
        yield url


@pytest.fixture
def s3_environment(s3_endpoint, monkeypatch):
    """The environment a job would have: endpoint, region and credentials for the moto server."""
    values = {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "testing-key-id",
        "AWS_SECRET_ACCESS_KEY": "testing-secret-value",
        "AWS_DEFAULT_REGION": _REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "2",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture
def s3_bucket(s3_environment):
    """``s3://bucket`` of a fresh bucket."""
    import boto3

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    client = boto3.client("s3", endpoint_url=s3_environment["AWS_ENDPOINT_URL"], region_name=_REGION)
    client.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": _REGION})
    return f"s3://{name}"


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A prefix to work in: once a local folder, once a bucket over HTTP."""
    if request.param == "local":
        folder = tmp_path / "root"
        folder.mkdir()
        return str(folder)
    return request.getfixturevalue("s3_bucket") + "/root"


@pytest.fixture
def model_folder(tmp_path):
    """A folder that stands for a local model: what counts here is that its files have hashes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def config(model_folder):
    """A maker of valid configs on that model; keyword sections replace or add keys."""
    return partial(make_config, model_folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Hashes of files are remembered in the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def wrong_server():
    """A store that answers with wrong bytes; see `wrong_store`."""
    with WrongStore().serving() as server:
        yield server


@pytest.fixture
def wrong_store(wrong_server, monkeypatch):
    """The same, as where S3 is, and nobody waits before asking again."""
    for name, value in wrong_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_RETRY_S", 0.0)
    return wrong_server
