"""Says what a command is at while nothing else is seen of it: listing, hashing, reaching a cluster, loading a model."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)
SAY_AFTER_S = 3.0
SAY_EVERY_S = 30.0


@contextmanager
def phase(what: str, *, after_s: float = SAY_AFTER_S, every_s: float = SAY_EVERY_S) -> Iterator[None]:
    """Log what the command is at, and again and again while it goes on; nothing more once it has ended.

    Args:
        what: such as ``listing s3://bucket/videos/``.
        after_s: a phase that ends earlier is not said; 0 says it at once.
        every_s: seconds between two lines.
    """
    ended, began_s = threading.Event(), time.monotonic()
    if not after_s:
        logger.info("%s", what)

    def tell() -> None:
        if after_s and not ended.wait(after_s):
            logger.info("%s", what)
        while not ended.wait(every_s):
            logger.info("still %s, for %.0f s", what, time.monotonic() - began_s)

    telling = threading.Thread(target=tell, name="phase", daemon=True)
    telling.start()
    try:
        yield
    finally:
        ended.set()
        telling.join()
