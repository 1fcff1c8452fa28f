"""Translates a store's exceptions into the pipeline's own errors, by class names and error codes.

No client library is imported. Messages carry the address and the store's reason, never a secret.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from pipeline.errors import CredentialsError, ItemError, PipelineError, StorageError
from pipeline.records import RowErrorType
from pipeline.redaction import redacted
from pipeline.storage.uris import printable

_CREDENTIAL_CODES = frozenset(
    {
        "AuthFailure",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidToken",
        "RequestExpired",
        "RequestTimeTooSkewed",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "401",
    }
)
_CREDENTIAL_CLASSES = frozenset(
    {
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "RefreshError",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    }
)
_BODY_CLASSES = frozenset(
    {
        "BodyMismatchError",
        "ChecksumError",
        "ClientPayloadError",
        "FlexibleChecksumError",
        "IncompleteRead",
        "IncompleteReadError",
        "ServerDisconnectedError",
    }
)


class BodyMismatchError(Exception):
    """A body differs from what its header announced: it is too short, too long, or has another checksum."""


class ObjectChangedError(Exception):
    """The store answered for another version of the object than the requested one."""


def item_error(verb: str, uri: str, error: Exception) -> PipelineError:
    """Return the error of one object that could not be read; an error of the pipeline stays as it is."""
    if isinstance(error, PipelineError):
        return error
    if _about_credentials(error):
        return _credentials_error(verb, uri, error)
    code, kind = http_code(error), _row_error_type(error)
    retryable = kind == "store_error" and (is_asked_to_wait(error) or not code.startswith("4"))
    return ItemError(kind, f"{verb} {printable(uri)}: {_reason(error)}", retryable=retryable)


def storage_error(verb: str, uri: str, error: Exception) -> Exception:
    """Return the error of a listing or a write; an error of the pipeline stays as it is."""
    if isinstance(error, PipelineError):
        return error
    if _about_credentials(error):
        return _credentials_error(verb, uri, error)
    message, hint = f"cannot {verb} {printable(uri)}: {_reason(error)}", ""
    if is_disk_full(error):
        hint = "; free some space, then run the same command again: it resumes"
    elif isinstance(error, FileNotFoundError):
        hint = "; check the address and that the bucket or folder exists"
    elif isinstance(error, PermissionError):
        hint = "; the credentials in use may not do this here"
    return StorageError(message + hint)


def is_disk_full(error: BaseException) -> bool:
    """Whether a local disk, or this user's quota on it, is full."""
    return any(isinstance(e, OSError) and e.errno in {errno.ENOSPC, errno.EDQUOT} for e in _chain(error))


def http_code(error: BaseException) -> str:
    """Return the store's error code, such as ``NoSuchKey`` or ``503``; "" where there is none."""
    for e in _chain(error):
        response = getattr(e, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", ""))
        code = getattr(e, "code", None)
        if type(e).__name__ == "HttpError" and code is not None:
            return str(code)
    return ""


def is_created_by_another(error: BaseException) -> bool:
    """Whether a conditional PUT was refused because the object exists, or another writer is creating it."""
    codes = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
    return isinstance(error, FileExistsError) or http_code(error) in codes


def is_asked_to_wait(error: BaseException) -> bool:
    """Whether the store had too many requests. botocore does not recognise that in the answer to a HEAD."""
    return http_code(error) in {"429", "TooManyRequests"}


def body_ended_early(error: BaseException) -> bool:
    """Whether the body differs from what the answer announced, so that reading again may succeed."""
    return any(type(e).__name__ in _BODY_CLASSES or isinstance(e, ConnectionResetError) for e in _chain(error))


def _row_error_type(error: Exception) -> RowErrorType:
    if isinstance(error, ObjectChangedError):
        return "changed_object"
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return "not_found"
    return "access_denied" if isinstance(error, PermissionError) else "store_error"


def _about_credentials(error: BaseException) -> bool:
    return http_code(error) in _CREDENTIAL_CODES or any(type(e).__name__ in _CREDENTIAL_CLASSES for e in _chain(error))


def _credentials_error(verb: str, uri: str, error: Exception) -> CredentialsError:
    return CredentialsError(
        f"cannot {verb} {printable(uri)}: {_reason(error)}; the credentials are missing, wrong or expired. "
        "Renew them in the environment of the job, then run the same command again: it resumes"
    )


def _reason(error: BaseException) -> str:
    return printable(redacted(f"{http_code(error) or type(error).__name__}: {error}"))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
