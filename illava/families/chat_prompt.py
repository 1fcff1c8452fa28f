"""Renders a conversation as token ids, with every visual input's placeholder repeated for its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from illava.errors import ModelLoadError, RequestError
from illava.families.chat_template import unused_args
from illava.families.special_tokens import SpecialTokens
from illava.preprocess import VisualInput
from illava.requests import Message

_KNOWN = 256  # conversations whose text and ids are remembered
_Turns = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # role, and (kind, text) of each part


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
    """Renders conversations for one tokenizer."""

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

    def render(
        self,
        content: Sequence[str | VisualInput],
        num_placeholders: Sequence[int],
        *,
        history: Sequence[Message] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Render one user turn and the opening of the answer, behind what was said before.

        A template may put media before text, or images before videos: the n-th placeholder of a kind belongs to the
        n-th visual input of that kind, and ``spans`` follows the given order of the media.

        Args:
            content: text and media in the order they are given.
            num_placeholders: placeholders of each visual input of the conversation, in order.
            history: the messages before the turn.
            template_args: values of the template's variables.

        Raises:
            RequestError: there is nothing to answer, the text cannot be told from special tokens, or the template has
                no place for a message or no such variable.
            ModelLoadError: the chat template cannot be rendered, or leaves out a visual input.
        """
        media = media_of(content, history)
        if len(media) != len(num_placeholders):
            raise RequestError(f"{len(media)} media in the request, but {len(num_placeholders)} counts of placeholders")
        waiting = {kind: [n for n, m in enumerate(media) if m.kind == kind] for kind in self._kind_of_id.values()}
        token_ids: list[int] = []
        spans: list[tuple[int, int]] = [(-1, 0)] * len(media)
        for token_id in self.tokenize(self.template_text(content, history=history, template_args=template_args)):
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

    def template_text(
        self,
        content: Sequence[str | VisualInput],
        *,
        history: Sequence[Message] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """Render the conversation with one placeholder for each visual input, for `tokenize` alone.

        Special tokens that a text spells are hidden (`SpecialTokens`), so all in the result are the template's.

        Raises:
            RequestError: there is nothing to answer, texts that stand side by side spell a special token, or the
                template has no place for a message or no such variable.
            ModelLoadError: the chat template cannot be rendered.
        """
        if not content:
            raise RequestError("the request is empty; give some text or media")
        self.check_args(template_args or {})
        args = json.dumps(dict(template_args or {}))
        turns = tuple((one.role, self._parts(one.content)) for one in (*history, Message("user", tuple(content))))
        if history:
            self._check_places(turns, args)
        text = self._templated(turns, args)
        if sum(kind == "text" for _, parts in turns for kind, _ in parts) > 1:
            innocent = self._templated(_with_texts(turns, lambda _, text: text and "x"), args)
            if self._special.count(text) != self._special.count(innocent):
                raise RequestError("two texts side by side spell a special token; join them into one")
        return text

    def check_args(self, template_args: Mapping[str, Any]) -> None:
        """Refuse arguments that the chat template does not use, or that spell a special token.

        Raises:
            RequestError: names them, and the variables that the template has.
        """
        if not template_args:
            return
        if problem := unused_args(self._tokenizer.get_chat_template(), template_args):
            raise RequestError(f"template_args: {problem}")
        try:
            spelled = self._special.count(json.dumps(dict(template_args), ensure_ascii=False))
        except (TypeError, ValueError) as error:
            raise RequestError(f"template_args: {error}; give values of JSON types") from error
        if spelled:
            raise RequestError("template_args spell a special token, and only the template writes these; remove it")

    def _parts(self, content: Sequence[str | VisualInput]) -> tuple[tuple[str, str], ...]:
        return tuple(
            ("text", self._special.hide(part)) if isinstance(part, str) else (part.kind, "") for part in content
        )

    def _check_places(self, turns: _Turns, args: str) -> None:
        """Refuse a conversation of which the template leaves something out, or which it refuses."""
        probe = _with_texts(turns, lambda place, _: f"text{place}x")
        try:
            rendered = self._templated(probe, args)
        except ModelLoadError as error:
            self._templated(probe[-1:], args)  # raises where the template is at fault, whatever the conversation
            roles = ", ".join(role for role, _ in turns)
            raise RequestError(
                f"the model's chat template takes no such conversation ({roles}): {error.__cause__}; leave out the "
                "system prompt or the earlier turns, or take another model"
            ) from error
        for role, parts in probe:
            if any(kind == "text" and text not in rendered for kind, text in parts):
                what = "the system prompt" if role == "system" else f"a text of the {role}"
                raise RequestError(
                    f"the model's chat template leaves out {what}; write it into the prompt, or take another model"
                )

    def _apply(self, turns: _Turns, args: str) -> str:
        messages = [
            {
                "role": role,
                "content": [{"type": kind, "text": text} if kind == "text" else {"type": kind} for kind, text in parts],
            }
            for role, parts in turns
        ]
        try:
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **json.loads(args)
            )
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # a template is a program of the model's folder: it may raise anything
            raise ModelLoadError(
                f"the model's chat template cannot be rendered: {type(error).__name__}: {error}; compare it with the "
                "published one, or download the model again"
            ) from error


def media_of(content: Sequence[str | VisualInput], history: Sequence[Message]) -> list[VisualInput]:
    """The images and videos of a conversation, in the order they are read."""
    contents = (*(one.content for one in history), content)
    return [part for own in contents for part in own if not isinstance(part, str)]


def _with_texts(turns: _Turns, text_of: Callable[[int, str], str]) -> _Turns:
    """The same conversation in other words; ``text_of`` is given each message's place and a text of it."""
    return tuple(
        (role, tuple((kind, text_of(place, text) if kind == "text" else "") for kind, text in parts))
        for place, (role, parts) in enumerate(turns)
    )
