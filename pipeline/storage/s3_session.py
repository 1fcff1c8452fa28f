"""Opens HTTP sessions to S3 that follow no redirect. Loaded only where S3 is used.

aiobotocore lets aiohttp follow redirects, which botocore itself never does. A store, or whoever answers in its name,
could then send a reader to any address of the reader's network. Region redirects still work: botocore reads them from
the answer.
"""

from __future__ import annotations

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession


class NoRedirectSession(AIOHTTPSession):
    """Is aiobotocore's session, except that it returns a redirect as an answer like any other."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        return _WithoutRedirects(await super()._get_session(proxy_url))


class _WithoutRedirects:
    """Offers the one method of an aiohttp session that aiobotocore calls."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def request(self, *args: Any, **options: Any) -> Any:
        return self._session.request(*args, **options, allow_redirects=False)
