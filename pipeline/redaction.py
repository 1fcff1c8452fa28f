"""Redacts a text for messages, rows and terminals: no secrets, no control characters.

Secrets are the values of environment variables whose names say so, user info in addresses, and signatures in their
queries.
"""

from __future__ import annotations

import os
import re

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY", re.IGNORECASE)
_LEAST_CHARACTERS = 8  # a shorter value, such as "true", is too common in texts to be redacted
_USER_INFO = re.compile(r"(?<=://)[^/@\s\"']+@")
_SIGNATURE = re.compile(
    r"(?i)([?&](?:x-(?:amz|goog)-[a-z-]+|signature|sig|token|access_token|key|password)=)[^&\s\"'<>]+"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def redacted(text: str) -> str:
    """Return the text without secrets."""
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _LEAST_CHARACTERS:
            text = text.replace(value, "***")
    return _SIGNATURE.sub(r"\1***", _USER_INFO.sub("***@", text))


def visible(text: str) -> str:
    """Make a text safe for a terminal.

    Control characters but line feeds, and marks that reorder text, are spelled out; secrets are redacted.
    """
    text = _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", redacted(text))
    return text.encode("utf-8", "backslashreplace").decode()
