"""Keeps special tokens that a user's text spells as text: only the chat template writes turns and placeholders.

Before the template is rendered, each special token in a user's text is hidden behind a mark that nobody can guess.
Afterwards a copy of the tokenizer, which knows the template's special tokens by other names, tokenizes the whole turn
at once, so that the text around is cut as ever. A turn without such text goes to the tokenizer itself.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from illava.errors import RequestError


class SpecialTokens:
    """Hides the special tokens in users' texts, and tokenizes turns that hold such texts, for one tokenizer."""

    def __init__(self, tokenizer: Any, placeholder_ids: Collection[int]) -> None:
        """Take a tokenizer.

        Args:
            tokenizer: of Hugging Face.
            placeholder_ids: tokens that count as special, whatever the tokenizer's files say of them.
        """
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._ids = {str(token): token_id for token_id, token in added if token.special or token_id in placeholder_ids}
        named = zip(tokenizer.convert_ids_to_tokens(list(placeholder_ids)), placeholder_ids, strict=True)
        self._ids |= {name: token_id for name, token_id in named if name is not None}
        self._contents = sorted(self._ids, key=len, reverse=True)  # of two that begin alike the longer one is meant
        self._pattern = re.compile("|".join(map(re.escape, self._contents)))
        self._nonce = secrets.token_hex(8)
        self._mark = re.compile(rf"q{self._nonce}x(\d+)q")

    def hide(self, text: str) -> str:
        """Put a mark in place of each special token in a user's text."""
        return self._pattern.sub(lambda found: f"q{self._nonce}x{self._contents.index(found[0])}q", text)

    def count(self, text: str) -> int:
        """Count the special tokens that a text spells."""
        return len(self._pattern.findall(text))

    def tokenize(self, turn: str) -> tuple[int, ...]:
        """Tokenize a rendered turn; what is hidden in it becomes the tokens of its text.

        Raises:
            RequestError: this tokenizer cannot tell the two apart.
        """
        # A template may write the first token itself; processors do the same (processing_utils.py:apply_chat_template)
        begun = self._tokenizer.bos_token is not None and turn.startswith(self._tokenizer.bos_token)
        if self._nonce not in turn:
            return tuple(self._tokenizer(turn, add_special_tokens=not begun)["input_ids"])
        renamed = self._pattern.sub(lambda found: self._name(self._contents.index(found[0])), turn)
        text = self._mark.sub(lambda found: self._contents[int(found[1])], renamed)
        copy, original_ids = self._copy
        ids = copy.encode(text, add_special_tokens=not begun).ids
        special = set(self._ids.values()) - {self._tokenizer.unk_token_id}  # which a rare character may become
        found = sum(original_ids.get(token_id, token_id) in special for token_id in ids)
        if found != self.count(turn) + (0 if begun else copy.num_special_tokens_to_add(False)):
            raise self._refusal(self._mark.search(turn))
        return tuple(original_ids.get(token_id, token_id) for token_id in ids)

    def _name(self, index: int) -> str:
        return f"<{self._nonce}:{index}>"

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with its special tokens renamed, and the copy's ids of added tokens -> the tokenizer's own."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise self._refusal(None)
        content = json.loads(backend.to_str())
        names = {}
        for token in content["added_tokens"]:
            if token["content"] in self._ids:
                token["content"] = self._name(self._contents.index(token["content"]))
            names[token["content"]] = token["id"]
        copy = Tokenizer.from_str(json.dumps(content))
        copy.no_padding()
        copy.no_truncation()
        numbered = ((copy.token_to_id(name), token_id) for name, token_id in names.items())
        return copy, {own: token_id for own, token_id in numbered if own is not None}

    def _refusal(self, mark: re.Match[str] | None) -> RequestError:
        what = repr(self._contents[int(mark[1])]) if mark else "a special token"
        return RequestError(
            f"the text spells {what}, and this model's tokenizer cannot keep it as text; remove it. Media are given as "
            "items of the request's content"
        )
