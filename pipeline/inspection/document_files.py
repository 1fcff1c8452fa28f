"""Renders one document's row as a Markdown file with front matter, and names such files. Pure functions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

_UNSAFE = re.compile(r"[^\w.-]+")
# Characters that JSON leaves as they are and YAML does not take, or takes for the end of a line.
_NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
# Of a row, what front matter says of it.
_FRONT = ("item_id", "uri", "status", "error_message", "num_pages", "model_id", "model_revision", "run_fingerprint")


def document_text(row: Mapping[str, Any]) -> str:
    """Render a document: front matter, then each window's answer where its first page stands.

    A failed page is a comment that names its error.

    Args:
        row: as plain values; columns that it lacks are left out.
    """
    failed = [page["page"] + 1 for page in row["pages"] if page["status"] == "failed"]
    front = {name: row[name] for name in _FRONT if row.get(name) is not None}
    front |= {"pages_read": len(row["pages"]) - len(failed), "pages_failed": failed}
    front |= {"fields": row["fields"]} if row.get("fields") else {}
    head = "\n".join(["---", *(f"{name}: {_yaml(value)}" for name, value in front.items()), "---"])
    return "\n\n".join([head, *_page_texts(row["pages"])]) + "\n"


def document_names(documents: Sequence[tuple[str, str]], *, by_id: bool = False) -> list[str]:
    """Name a file for each document: its own name; where several share one, a digest of the item behind it.

    Args:
        documents: item id and address of each.
        by_id: name all of them by the digest, so that the addresses stay unsaid.
    """
    digests = [sha256(item_id.encode()).hexdigest()[:12] for item_id, _ in documents]
    if by_id:
        return [f"document-{digest}.md" for digest in digests]
    stems = [_UNSAFE.sub("_", uri.rsplit("/", 1)[-1].rpartition(".")[0] or item_id) for item_id, uri in documents]
    stems = [stem.lstrip(".") or "_" for stem in stems]
    shared = Counter(stem.casefold() for stem in stems)
    return [
        f"{stem}.md" if shared[stem.casefold()] == 1 else f"{stem}-{digest}.md"
        for stem, digest in zip(stems, digests, strict=True)
    ]


def _yaml(value: Any) -> str:
    """A value on one line, in the JSON that is YAML too: no text can end the front matter."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_IN_YAML.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


def _page_texts(pages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for page in pages:
        if page["status"] == "failed":
            yield f"<!-- page {page['page'] + 1}: {page['error_type']} -->"
        elif page["text"] is not None:
            yield page["text"]
