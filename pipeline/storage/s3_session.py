"""HTTP sessions to S3 that stay where they were sent. Loaded only where S3 is used.

aiobotocore lets aiohttp follow redirects, which botocore itself never does: a store, or whoever answers in its name,
could send a reader to any address of the network it stands in. Region redirects need none of it; botocore reads those
from the answer.
"""

from __future__ import annotations

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession


class NoRedirectSession(AIOHTTPSession):
    """aiobotocore's own, but a redirect is an answer like any other."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        return _WithoutRedirects(await super()._get_session(proxy_url))


class _WithoutRedirects:
    """The one method of an aiohttp session that aiobotocore calls."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def request(self, *args: Any, **options: Any) -> Any:
        return self._session.request(*args, **options, allow_redirects=False)
