"""Renders a user turn as token ids, with every visual input's placeholder repeated for its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from illava.errors import ModelLoadError, RequestError
from illava.families.special_tokens import SpecialTokens
from illava.preprocess import VisualInput

_KNOWN = 256  # turns whose text and ids are remembered


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """Token ids of a chat turn with the placeholders of every visual input in place.

    Attributes:
        token_ids: host integers, placeholders repeated ``num_placeholders`` times.
        spans: (first index, number) of each visual input's placeholders, in the order of the media.
        starts: for each visual input whose frames have text between them, the first index of each frame.
    """

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    starts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


class ChatPrompt:
    """Renders user turns for one tokenizer."""

    def __init__(self, tokenizer: Any, placeholder_ids: Mapping[str, int]) -> None:
        """Take a tokenizer with a chat template.

        Args:
            tokenizer: of Hugging Face.
            placeholder_ids: placeholder token id of each kind, ``image`` and ``video``.
        """
        self._tokenizer = tokenizer
        self._kind_of_id = {token_id: kind for kind, token_id in placeholder_ids.items()}
        self._special = SpecialTokens(tokenizer, placeholder_ids.values())
        # Most items of a job have the same text, and a template costs as much as a decode step of a small model.
        self._templated, self.tokenize = lru_cache(_KNOWN)(self._apply), lru_cache(_KNOWN)(self._special.tokenize)

    def render(self, content: Sequence[str | VisualInput], num_placeholders: Sequence[int]) -> RenderedPrompt:
        """Render one user turn and the opening of the answer.

        A template may put media before text, or images before videos: the n-th placeholder of a kind belongs to the
        n-th visual input of that kind, and ``spans`` follows the given order of the media.

        Args:
            content: text and media in the order they are given.
            num_placeholders: placeholders of each visual input, in order.

        Raises:
            RequestError: there is nothing to answer, or the text cannot be told from special tokens.
            ModelLoadError: the chat template cannot be rendered, or leaves out a visual input.
        """
        media = [part for part in content if not isinstance(part, str)]
        if len(media) != len(num_placeholders):
            raise RequestError(f"{len(media)} media in the request, but {len(num_placeholders)} counts of placeholders")
        waiting = {kind: [n for n, m in enumerate(media) if m.kind == kind] for kind in self._kind_of_id.values()}
        token_ids: list[int] = []
        spans: list[tuple[int, int]] = [(-1, 0)] * len(media)
        for token_id in self.tokenize(self.template_text(content)):
            kind = self._kind_of_id.get(token_id)
            if kind is None:
                token_ids.append(token_id)
            elif waiting[kind]:
                index = waiting[kind].pop(0)
                spans[index] = (len(token_ids), num_placeholders[index])
                token_ids += [token_id] * num_placeholders[index]
            else:
                raise ModelLoadError(f"the model's chat template writes more {kind} placeholders than there are media")
        if any(waiting.values()):
            raise ModelLoadError("the model's chat template leaves out some of the media; it is made for text alone")
        return RenderedPrompt(tuple(token_ids), tuple(spans))

    def template_text(self, content: Sequence[str | VisualInput]) -> str:
        """Render the turn with one placeholder for each visual input, for `tokenize` alone.

        Special tokens that the text spells are hidden (`SpecialTokens`), so all in the turn are the template's.

        Raises:
            RequestError: there is nothing to answer, or texts that stand side by side spell a special token.
            ModelLoadError: the chat template cannot be rendered.
        """
        if not content:
            raise RequestError("the request is empty; give some text or media")
        parts = tuple(
            ("text", self._special.hide(part)) if isinstance(part, str) else (part.kind, "") for part in content
        )
        turn = self._templated(parts)
        if sum(kind == "text" for kind, _ in parts) > 1:
            innocent = self._templated(tuple((kind, text and "x") for kind, text in parts))
            if self._special.count(turn) != self._special.count(innocent):
                raise RequestError("two texts side by side spell a special token; join them into one")
        return turn

    def _apply(self, parts: tuple[tuple[str, str], ...]) -> str:
        turn = [{"type": kind, "text": text} if kind == "text" else {"type": kind} for kind, text in parts]
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
            )
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # a template is a program of the model's folder: it may raise anything
            raise ModelLoadError(
                f"the model's chat template cannot be rendered: {type(error).__name__}: {error}; compare it with the "
                "published one, or download the model again"
            ) from error
