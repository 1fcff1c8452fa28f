"""Defines what a model family gives the engine: encoded media, prompt ids and positions, borrowed decoder layers.

This module holds what all families share; a family adds its tower, its encoder and its checks. A family knows no
reducer: its tower calls the reduction between attention and MLP of a block, and gets fewer tokens back. Each family is
one file; subclasses are one level deep, but for one that differs from another in its class of transformers alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from illava.checkpoint_check import StoredScheme
from illava.decoder.decoder import Decoder
from illava.decoder.onednn_linears import keep_packed_only
from illava.families.adapters import Adapter
from illava.families.chat_prompt import ChatPrompt, RenderedPrompt
from illava.families.loading import load_config, load_tokenizer, load_weights, stop_token_ids
from illava.families.quantization import describe_weights
from illava.families.side_copies import PixelCopies
from illava.families.tower_graphs import TowerGraphs
from illava.plan import ReductionPlan
from illava.preprocess import Preprocessor, VisualInput
from illava.reduction.probe import AttentionProbe
from illava.requests import Message
from illava.visual_tokens import EncodedVisual
from illava.weight_files import Quantization


class MediaEncoder(Protocol):
    """Encodes media to visual tokens; see the methods of `Family` of the same names.

    Attributes:
        copies: gives the pixels of media on the device.
    """

    copies: PixelCopies

    def num_patches(self, mm_item: VisualInput) -> int: ...

    def num_vision_tokens(self, mm_item: VisualInput) -> int: ...

    def prefetch(self, media: Sequence[VisualInput]) -> None: ...

    def encode(
        self,
        media: Sequence[VisualInput],
        plan: ReductionPlan,
        *,
        trace: bool,
        seeds: Sequence[int] | None = None,
        probe: AttentionProbe | None = None,
    ) -> list[EncodedVisual]: ...


class Family(ABC):
    """Holds one loaded Hugging Face model of a family, and borrows its sub-modules.

    Attributes:
        model_class: the class of transformers.
        media_kinds: the kinds it reads; each has a placeholder token in config.json.
        model_type: as in config.json.
        tower: runs the vision tower's blocks.
        encoder: encodes media to visual tokens.
        has_random_weights: the model's folder declares it.
        stored_as: how the checkpoint's weights are quantised; None where they are plain.
        quantization: of the decoder's linear layers, made while loading.
        adapter: that was added while loading.
        tower_graphs: encodes by replays where it can; None encodes operation by operation.
    """

    model_class: ClassVar[Any]
    media_kinds: ClassVar[tuple[str, ...]] = ("image", "video")
    tower: Any
    encoder: MediaEncoder
    has_random_weights: bool = False
    stored_as: str | None = None
    quantization: Quantization = "none"
    adapter: Adapter | None = None
    tower_graphs: TowerGraphs | None = None

    def __init__(self, model: Any, tokenizer: Any, preprocessor: Preprocessor) -> None:
        """Borrow a loaded model's modules.

        Args:
            model: a `model_class`.
            tokenizer: with the chat template to use.
            preprocessor: of the same model folder; its geometry and normalisation are used.

        Raises:
            ModelLoadError: the configuration asks for a feature that this family does not compute.
        """
        config = model.config
        self.check_config(config)
        self.model_type: str = config.model_type
        self.preprocessor = preprocessor
        self.decoder = Decoder(model.model.language_model, model.lm_head)
        self.stop_token_ids = stop_token_ids(model)
        self._embedding = model.model.get_input_embeddings()
        self._tokenizer = tokenizer
        self._chat = ChatPrompt(tokenizer, self.placeholder_ids(config, tokenizer))
        self.tower, self.encoder = self.build_encoder(model)
        self.num_vision_blocks: int = self.tower.num_blocks

    @classmethod
    def load(
        cls,
        model_id: str,
        preprocessor: Preprocessor,
        *,
        revision: str | None,
        dtype: torch.dtype,
        device: torch.device | str,
        scheme: StoredScheme | None = None,
        quantization: Quantization = "none",
        adapter: Adapter | None = None,
    ) -> Self:
        """Load from a local folder or the hub; an unsupported configuration is refused before the weights are read.

        Raises:
            ModelLoadError: see `illava.families.load_family`.
        """
        cls.check_config(load_config(cls.model_class, model_id, revision=revision))
        tokenizer = load_tokenizer(model_id, revision=revision)
        model = load_weights(
            cls.model_class,
            model_id,
            revision=revision,
            dtype=dtype,
            device=device,
            scheme=scheme,
            quantization=quantization,
            adapter=adapter,
        )
        family = cls(model, tokenizer, preprocessor)
        family.stored_as, family.quantization = None if scheme is None else str(scheme), quantization
        family.adapter = adapter
        linears = [*family.decoder.linears(), *(family.tower.linears() if hasattr(family.tower, "linears") else ())]
        keep_packed_only(*(one for one in linears if one.weight is not family._embedding.weight))
        return family

    @classmethod  # noqa: B027  (most families support every configuration of their class)
    def check_config(cls, config: Any) -> None:
        """Refuse configurations of `model_class` whose features this family does not compute.

        Raises:
            ModelLoadError: names the feature, and says what is supported.
        """

    def placeholder_ids(self, config: Any, tokenizer: Any) -> dict[str, int]:
        """The token that the chat template writes for a medium of each kind."""
        return {kind: getattr(config, f"{kind}_token_id") for kind in self.media_kinds}

    @abstractmethod
    def build_encoder(self, model: Any) -> tuple[Any, MediaEncoder]:
        """Build the tower and the encoder from borrowed modules; decoder and preprocessor are set already."""

    @abstractmethod
    def check_vision(self, plan: ReductionPlan) -> None:
        """Do the part of `check` that concerns the tower and the decoder's input."""

    def check(self, plan: ReductionPlan) -> None:
        """Refuse a plan that makes no sense for this model.

        Raises:
            PlanError: says what is wrong, where, and what would be right.
        """
        self.check_vision(plan)
        self.decoder.check(plan)

    def num_patches(self, mm_item: VisualInput) -> int:
        """Tokens of the visual input that enter the tower, CLS apart; from geometry, for admission."""
        return self.encoder.num_patches(mm_item)

    def num_vision_tokens(self, mm_item: VisualInput) -> int:
        """Visual tokens that the unreduced model gives its LLM for this input; from geometry."""
        return self.encoder.num_vision_tokens(mm_item)

    def prefetch(self, media: Sequence[VisualInput]) -> None:
        """Begin to copy the pixels of media that `encode` will be given next; see `illava.families.side_copies`."""
        self.encoder.prefetch(media)

    @torch.no_grad()
    def encode(
        self,
        media: Sequence[VisualInput],
        plan: ReductionPlan,
        *,
        trace: bool,
        seeds: Sequence[int] | None = None,
        probe: AttentionProbe | None = None,
    ) -> list[EncodedVisual]:
        """Run tower, projector and layout over all media in packed calls.

        Args:
            media: as the family's preprocessor made them.
            plan: a plan that `check` accepted.
            trace: whether mixing matrices are copied to the host.
            seeds: an integer per visual input, the root of what reducers draw in the tower; None is 0 for each.
            probe: is given the tower's attention, block by block.
        """
        if self.tower_graphs is not None and not trace and probe is None:
            encoded = self.tower_graphs.encode(media, plan)
            if encoded is not None:
                return encoded
        return self.encoder.encode(media, plan, trace=trace, seeds=seeds, probe=probe)

    def render(
        self,
        content: Sequence[str | VisualInput],
        num_placeholders: Sequence[int],
        *,
        history: Sequence[Message] = (),
        template_args: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Apply chat template and tokenizer to a user turn and what was said before it.

        ``num_placeholders`` gives the placeholders of each visual input of the conversation, in order.
        """
        return self._chat.render(content, num_placeholders, history=history, template_args=template_args)

    def check_template_args(self, template_args: Mapping[str, Any]) -> None:
        """Refuse names that the chat template does not use. Raises RequestError."""
        self._chat.check_args(template_args)

    def check_conversation(self, history: Sequence[Message], template_args: Mapping[str, Any]) -> None:
        """Refuse a conversation that the chat template cannot render whole, before anything is asked.

        Raises:
            RequestError: says what the template lacks.
        """
        self._chat.template_text(("x",), history=history, template_args=template_args)

    @property
    def weights(self) -> str:
        """What the decoder's linear layers compute with, such as ``bfloat16, dequantized from float8 (fp8)``."""
        layer = next(m for name, m in self.decoder.layers[0].named_modules() if name.endswith("_proj"))
        said = describe_weights(layer, stored_as=self.stored_as, quantization=self.quantization)
        if self.adapter is None:
            return said
        return f"{said}, with an adapter {'merged' if self.adapter.merge else 'beside them'}"

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of Hugging Face."""
        return self._tokenizer

    def position_ids(self, prompt: RenderedPrompt, media: Sequence[VisualInput]) -> Tensor:
        """Rotary positions of every rendered token: int64 [P, S]; P is 1, or 3 for M-RoPE. By default they count up.

        A generated token's position follows from the last column: one more on every axis per token.
        """
        return torch.arange(len(prompt.token_ids), device=self.decoder.device)[None]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Word embeddings: [T] -> [T, D]."""
        return self._embedding(token_ids)

    def first_token(self, text: str) -> int | None:
        """The id of the first token of an answer that begins with this text."""
        return next(iter(self._tokenizer(text, add_special_tokens=False)["input_ids"]), None)

    def decode_text(self, token_ids: Sequence[int]) -> str:
        """Token ids to text without special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
