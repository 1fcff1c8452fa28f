"""Checks by a positive list which addresses may be read or written, and joins addresses; no storage is accessed.

A local address is a plain path, or ``file://`` and a path (taken literally: nothing is percent-decoded). Its normal
form is the absolute plain path. An object address is ``s3://bucket/key`` or ``gs://bucket/key``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from pipeline.errors import ItemError

OBJECT_SCHEMES = ("s3", "gs")

# RE2 runs the same patterns over whole columns (see `pipeline.inputs.columns`): no look-around, no back-references.
_BUCKET = r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]"
OBJECT_URI_PATTERN = rf"^(?:s3|gs)://{_BUCKET}(?:/.*)?$"
_ADDRESS_BUCKET = r"^(?:s3|gs)://[0-9]+(?:\.[0-9]+){3}(?:/|$)"
FORBIDDEN_PATTERN = _ADDRESS_BUCKET + r"|[\x00-\x1f\x7f-\x9f\x{2028}\x{2029}\\]|::|\?versionId=|(?:^|/)\.\.(?:/|$)"

_OBJECT_URI = re.compile(OBJECT_URI_PATTERN)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/")
_PARENT = re.compile(r"(?:^|/)\.\.(?:/|$)")


def scheme(uri: str) -> str:
    """Return ``s3``, ``gs``, ...; ``file`` for a plain path."""
    match = _SCHEME.match(uri)
    return match.group(1).lower() if match else "file"


def is_local(uri: str) -> bool:
    """Whether the address is a path of this machine."""
    return scheme(uri) == "file"


def local_path(uri: str) -> str:
    """Return the absolute path of a local address; links are not resolved."""
    return os.path.abspath(uri.removeprefix("file://"))


def join(base: str, *parts: str) -> str:
    """Append path segments to a prefix, with one slash between each."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def without_extra_slashes(uri: str) -> str:
    """Return a folder's address without a slash at its end, empty or ``.`` segments, or ``file://``.

    Nothing is checked, and a relative path stays one.
    """
    head, separator, rest = (uri[len("file://") :] if uri.startswith("file:///") else uri).rpartition("://")
    segments = [one for one in rest.split("/") if one not in {"", "."}]
    absolute = not separator and rest.startswith("/")
    return f"{head}{separator}{'/' * absolute}{'/'.join(segments)}" or uri


def folder_uri(uri: str) -> str:
    """Return the normal form of a folder's address, such as ``output.uri``: the same for every way to write it.

    Raises:
        ItemError: as `check_uri`.
    """
    return check_uri(without_extra_slashes(check_uri(uri)))


def check_uri(uri: str, *, allowed_roots: Sequence[str] | None = None) -> str:
    """Return the normal form of an address that may be used.

    Args:
        uri: address as the user or a manifest gave it.
        allowed_roots: local folders below which a local address must lie after its links are resolved; None where the
            operator's own configuration names the address.

    Raises:
        ItemError: ``unsafe_uri``; the message gives the reason.
    """
    problem = _problem(uri)
    if problem:
        raise ItemError("unsafe_uri", f"refused address {printable(_without_secrets(uri))}: {problem}")
    if not is_local(uri):
        return uri
    path = local_path(uri)
    if allowed_roots is not None and not is_below(path, allowed_roots):
        roots = ", ".join(allowed_roots) or "none"
        reason = f"outside the allowed folders ({roots})"
        if (real := os.path.realpath(path)) != path:
            reason = (
                f"it leads by a link to {printable(real)}, {reason}; set input.follow_links to a folder that holds it"
            )
        raise ItemError("unsafe_uri", f"refused address {printable(uri)}: {reason}")
    return path


def is_below(path: str, roots: Sequence[str]) -> bool:
    """Whether a path, its links resolved, is one of the folders or lies below one."""
    real = os.path.realpath(path)
    return any(
        real == root or real.startswith(root.rstrip("/") + "/")
        for root in (os.path.realpath(local_path(r)) for r in roots)
    )


def printable(text: str, limit: int = 300) -> str:
    """Make text fit for a message: show control characters and lone surrogates as escapes, and cut at ``limit``."""
    visible = _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
    visible = visible.encode("utf-8", "backslashreplace").decode()
    return visible if len(visible) <= limit else visible[: limit - 3] + "..."


def _without_secrets(uri: str) -> str:
    """Remove the password, or the signature in the query, that a refused address may carry."""
    uri = re.sub(r"(?<=://)[^/]*@", "***@", uri)
    return uri if scheme(uri) in {"file", *OBJECT_SCHEMES} else re.sub(r"(?s)\?.*", "?***", uri)


def _problem(uri: str) -> str | None:
    if not uri:
        return "it is empty"
    if _CONTROL.search(uri):
        return "control characters"
    if "\\" in uri:
        return "backslashes; rename the file (in a listing, the bytes of a name that is not UTF-8 are written so)"
    if "::" in uri:
        return "'::' chains"
    if _PARENT.search(uri):
        return "'..' segments; name it by its full path, below input.uri or the manifest's folder"
    try:
        uri.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    return _scheme_problem(uri)


def _scheme_problem(uri: str) -> str | None:
    kind = scheme(uri)
    if kind == "file":
        return None if "://" not in uri or uri.startswith("file:///") else "write file:///path or a plain path"
    if kind not in OBJECT_SCHEMES:
        return f"scheme {kind!r} is not allowed; allowed are s3://, gs://, file:/// and plain paths"
    if "@" in uri.partition("://")[2].partition("/")[0]:
        return "user info"
    if "?versionId=" in uri:
        return "object versions cannot be addressed"
    if re.match(_ADDRESS_BUCKET, uri):
        return "a network address instead of a bucket"
    return None if _OBJECT_URI.match(uri) else "not of the form scheme://bucket/key"
