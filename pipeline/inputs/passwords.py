"""Gives encrypted PDFs their passwords: the manifest's column ``password``, and ``ILLAVA_PDF_PASSWORD`` for all others.

A password travels with its item to the reader, and to nobody else. It is in no frozen manifest, row, fingerprint or
message, and no record's ``repr`` shows it: `pipeline.records.MediaItem.passwords`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pipeline.config.schema import JobConfig
from pipeline.errors import ItemError, PipelineError
from pipeline.inputs.columns import join_relative
from pipeline.inputs.manifest_columns import PASSWORD_COLUMN, ManifestColumns
from pipeline.inputs.manifest_file import parse_manifest_file
from pipeline.records import MediaItem
from pipeline.storage import storage

PASSWORD_VARIABLE = "ILLAVA_PDF_PASSWORD"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Passwords:
    """Knows the passwords of a job's PDFs.

    Attributes:
        of_uri: those that the manifest gives for an address; any row's holds for all rows of the same file.
        of_all: is tried on every other PDF; "" for none.
    """

    of_uri: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    of_all: str = field(default="", repr=False)

    def give(self, items: Iterable[MediaItem]) -> tuple[MediaItem, ...]:
        """Return the items, the documents among them with the passwords to try."""
        return tuple(map(self._with, items)) if self.of_uri or self.of_all else tuple(items)

    def _with(self, item: MediaItem) -> MediaItem:
        if item.media_kind != "document":
            return item
        return replace(item, passwords=(*self.of_uri.get(item.uris[0], ()), *filter(None, [self.of_all])))


def read_passwords(config: JobConfig) -> Passwords:
    """Read the passwords of a job, as they are now: a retry finds those that were mended since."""
    of_all = os.environ.get(PASSWORD_VARIABLE, "")
    if not config.input.manifest:
        return Passwords(of_all=of_all)
    try:
        return Passwords(_of_column(config, config.input.manifest), of_all)
    except PipelineError as error:  # of a run that goes on after its manifest is gone; the items are frozen
        logger.warning("the column `%s` of the manifest cannot be read: %s", PASSWORD_COLUMN, error)
        return Passwords(of_all=of_all)


def has_password_for_all() -> bool:
    """Whether the environment has one."""
    return bool(os.environ.get(PASSWORD_VARIABLE))


def _of_column(config: JobConfig, manifest: str) -> dict[str, tuple[str, ...]]:
    uri = storage.check_uri(manifest)
    try:
        columns = ManifestColumns(uri, parse_manifest_file(uri, storage.read(uri)))
    except ItemError as error:
        raise PipelineError(str(error)) from error
    given = columns.take_passwords()
    if given is None:
        return {}
    flat, counts = columns.uris()
    base = config.input.uri or uri.rpartition("/")[0] or "."
    found: dict[str, tuple[str, ...]] = {}
    addresses = iter(join_relative(flat, storage.check_uri(base)).to_pylist())
    for password, count in zip(given.to_pylist(), counts, strict=True):
        first, *_ = [next(addresses) for _ in range(count)]
        if password and password not in found.get(first, ()):
            found[first] = (*found.get(first, ()), password)
    return found
