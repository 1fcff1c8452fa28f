"""The wheel in an empty environment, made by the Dockerfile's own steps, and its command away from the repository.

Installs every dependency from the package index, as CI's own environment is made: about 60 s in `make test-long`, and
10 s for one job.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

import illava
from tests.support.dockerfile import Image, steps_of

ROOT = Path(__file__).resolve().parents[2]
STEPS = steps_of((ROOT / "Dockerfile").read_text())
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Image:
    made = Image(tmp_path_factory.mktemp("image"), ROOT)
    for step in STEPS:
        made.take(step)
    return made


@pytest.fixture(scope="module")
def wheel(image) -> zipfile.ZipFile:
    [path] = (image.folder / "dist").glob("*.whl")
    assert path.name == f"illava-{illava.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def sources(*patterns: str) -> set[str]:
    """Tracked and new files of the two packages, relative to the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {name for name in listed if (ROOT / name).is_file()}


def test_the_wheel_holds_the_two_packages_with_their_data_and_nothing_else(wheel) -> None:
    inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert inside == sources("illava", "pipeline")
    assert {"illava/py.typed", "pipeline/py.typed", "pipeline/report/page.css"} <= inside


def test_the_wheel_says_its_version_licences_and_command(wheel) -> None:
    folder = f"illava-{illava.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert f"\nVersion: {illava.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/THIRD_PARTY_LICENSES.md"} <= set(wheel.namelist())
    assert "illava = pipeline.__main__:main" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_command_answers_away_from_the_repository(image, tmp_path) -> None:
    told = image.run("--version", folder=tmp_path)
    assert (told.returncode, told.stdout, told.stderr) == (0, f"illava {illava.__version__}\n", "")
    told = image.run("--help", folder=tmp_path)
    assert (told.returncode, told.stderr) == (0, "")
    assert re.search(r"usage: illava .*\bverify\b", told.stdout, flags=re.DOTALL)


@pytest.fixture(scope="module")
def job(image, tmp_path_factory) -> Path:
    """The demo's job over its own clips, in a folder with nothing but this file."""
    config = yaml.safe_load((image.folder / "configs" / "demo.yaml").read_text())
    config["input"]["uri"] = str(image.folder / "configs" / "demo" / "clips")
    config["model"]["model_id"] = str(image.folder / "configs" / "demo" / "model")
    config["media"]["decoder"] = "auto"  # where there is no decord: PyAV
    config["runtime"]["executor"] = "local"
    config["output"]["uri"] = "out"
    folder = tmp_path_factory.mktemp("job")
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_a_dry_run_and_a_job_of_one_clip(image, job) -> None:
    dry = image.run("caption", "--config", "job.yaml", "--limit", "1", "--dry-run", folder=job)
    assert dry.returncode == 0, dry.stderr
    assert not (job / "out").exists()
    done = image.run("caption", "--config", "job.yaml", "--limit", "1", folder=job)
    assert done.returncode == 0, done.stderr
    [row] = pq.read_table(job / "out" / "data").to_pylist()
    assert (row["status"], row["decoder"]) == ("ok", "pyav")
    assert row["text"]
    for command in ("verify", "report"):  # the report's templates and style come from the wheel
        told = image.run(command, "out", folder=job)
        assert told.returncode == 0, told.stderr
    assert "<style>" in (job / "out" / "report.html").read_text()


def test_decord_is_left_out_and_nothing_else_is(image, tmp_path) -> None:
    code = "import illava, pipeline; print(illava.__file__, pipeline.__file__)"
    found = subprocess.run(
        [image.program / "python", "-c", code],
        cwd=tmp_path,
        env=image.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ["/site-packages/" in path for path in found.stdout.split()] == [True, True]
    check = subprocess.run(
        [image.program / "pip", "check"], env=image.environment, capture_output=True, text=True, check=False
    )
    assert re.findall(r"^illava \S+ requires (\S+),", check.stdout, flags=re.M) == ["decord"], check.stdout


def test_dockerignore_lets_through_what_is_copied() -> None:
    let_through = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), flags=re.M))
    copied = {source.rstrip("/") for step in STEPS if step.word == "COPY" for source in step.rest.split()[:-1]}
    assert copied == let_through


def test_the_base_image_is_what_runs_here() -> None:
    """What CI executes is what the image would: the same Python, and Debian's release where this is Debian."""
    [base] = [step.rest for step in STEPS if step.word == "FROM"]
    assert base == f"python:{sys.version_info.major}.{sys.version_info.minor}-bookworm"


def test_an_instruction_that_cannot_be_carried_out_is_refused(tmp_path) -> None:
    assert [step.word for step in steps_of("# a\nRUN a \\\n  b\n\nUSER 1\n")] == ["RUN", "USER"]
    image = Image.__new__(Image)
    with pytest.raises(ValueError, match="USER cannot be carried out"):
        image.take(steps_of("USER 1")[0])
