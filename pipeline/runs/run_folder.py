"""Represents an opened run folder (`Run`), and reads its frozen manifest and ``_RUN.json``.

`pipeline.runs.run` opens, resumes and finishes runs, `pipeline.runs.run_record` reads ``run.json``, and
`pipeline.runs.parquet_sink` reads and writes parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.schema import JobConfig
from pipeline.errors import RefusedError
from pipeline.inputs.manifest import Manifest, read_manifest
from pipeline.inputs.passwords import Passwords
from pipeline.records import Shard
from pipeline.runs.accepted import Difference, DoneItems
from pipeline.runs.config_fingerprint import ConfigFingerprint
from pipeline.runs.run_record import read_run_file
from pipeline.storage import storage

FINISHED_FILE = "_RUN.json"
_WRITE_AGAIN = "Delete it and run the job's own command again, which writes it anew"


@dataclass(frozen=True, slots=True)
class Run:
    """Represents one opened run folder.

    Attributes:
        uri: the folder.
        config: this session's configuration; may differ from the frozen one in keys that only affect execution.
        config_fingerprint: what rows depend on; a resumed run keeps the one it was created with.
        fingerprint: digest of config fingerprint, manifest and shard size at creation; names the run in every row and
            part.
        plan_digest: digest of the reduction plan, as every row has it.
        manifest: frozen when the run was created.
        items_per_shard: fixed for the run.
        attempt: 1, raised by each ``retry``.
        nonce: names the writer of ``run.json``.
        least_attempts: shard -> the attempt in which a retry computes its part again; an older part is pending.
        retry_only: error types that the present attempt computes again; all where empty.
        resumed: whether the run existed before.
        earlier: what the runs in ``input.exclude_runs`` have done, and which of them are passed over.
        accepted: differences that this command goes on with, by ``--accept``.
        passwords: of encrypted PDFs; go with the items of a shard, and into no record.
        replaces: nonce of a run that began here, published nothing and is taken over.
    """

    uri: str
    config: JobConfig
    config_fingerprint: ConfigFingerprint
    fingerprint: str
    plan_digest: str
    manifest: Manifest
    items_per_shard: int
    attempt: int = 1
    nonce: str = ""
    least_attempts: Mapping[int, int] = field(default_factory=dict)
    retry_only: tuple[str, ...] = ()
    resumed: bool = False
    earlier: DoneItems = field(default_factory=DoneItems)
    accepted: tuple[Difference, ...] = ()
    replaces: str = ""
    passwords: Passwords = field(default_factory=Passwords, repr=False)

    @property
    def num_shards(self) -> int:
        return -(-len(self.manifest) // self.items_per_shard)

    def shard(self, index: int) -> Shard:
        """Return the items of one shard, in manifest order."""
        if not 0 <= index < self.num_shards:
            raise IndexError(f"shard {index} of {self.num_shards}")
        items = self.manifest.slice(index * self.items_per_shard, self.items_per_shard)
        return Shard(index, self.passwords.give(items))

    def part_metadata(self, shard_index: int) -> dict[str, str]:
        """Return the metadata that says which run, attempt and shard a part belongs to."""
        return {
            "illava.run_fingerprint": self.fingerprint,
            "illava.recipe_digest": self.config_fingerprint.digest,
            "illava.manifest_digest": self.manifest.digest,
            "illava.attempt": str(self.attempt),
            "illava.shard_index": str(shard_index),
        }

    def check_ownership(self) -> None:
        """Read ``run.json`` again, before a part is published, to check that the folder is still this run's.

        Raises:
            RefusedError: the folder belongs to another run or a later attempt by now.
        """
        found = read_run_file(self.uri)
        now = (found["fingerprint"], found["attempt"], found["nonce"])
        if now != (self.fingerprint, self.attempt, self.nonce):
            raise RefusedError(
                f"{self.uri}: run.json changed while this job ran (fingerprint {now[0]}, attempt {now[1]}); another "
                "job took the folder over. Nothing more is published from here"
            )


def is_finished(run_uri: str) -> bool:
    """Whether the run has its ``_RUN.json``."""
    return storage.exists(storage.join(run_uri, FINISHED_FILE))


def read_finished(run_uri: str) -> dict[str, Any]:
    """Read ``_RUN.json``.

    Raises:
        RefusedError: the file is damaged.
    """
    uri = storage.join(run_uri, FINISHED_FILE)
    try:
        found = json.loads(storage.read(uri))
    except ValueError as error:
        raise RefusedError(f"{uri} is not JSON ({error}): it was damaged. {_WRITE_AGAIN}") from error
    if not isinstance(found, dict):
        raise RefusedError(f"{uri} holds a {type(found).__name__}, not a JSON object: it was damaged. {_WRITE_AGAIN}")
    return found


def read_frozen_manifest(run_uri: str, digest: str) -> Manifest:
    """Read the manifest that was frozen when the run was created.

    Raises:
        RefusedError: the content does not have the digest in the file's name.
    """
    uri = manifest_uri(run_uri, digest)
    manifest = read_manifest(storage.read(uri))
    if manifest.digest != digest:
        raise RefusedError(f"{uri}: the content has digest {manifest.digest}; it was changed after it was frozen")
    return manifest


def manifest_uri(run_uri: str, digest: str) -> str:
    """Return the address of the frozen manifest with that digest."""
    return storage.join(run_uri, f"manifest-{digest}.parquet")
