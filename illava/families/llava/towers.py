"""Runs the SigLIP and CLIP towers: Hugging Face's own embeddings and layers, with the reduction inside each block.

Both towers have the same layer: attention behind a norm, MLP behind a norm. Sub-modules are borrowed; none is patched
or copied. Tokens of all tiles are packed end to end, and a block may reduce them.

On CPU each result of tens of MiB is fresh memory, which the operating system zeroes page by page (1.5 us each: up to a
tenth of a block's time at four so400m frames). So the widest result is reused there, and the others are kept small.

Shape suffixes: T tokens packed end to end, CLS tokens included; K kept patches, F tiles, D channels, M channels within
the MLP, H heads, d head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from illava.attention.packed import packed_attention_lse
from illava.decoder.onednn_linears import activation_of, is_plain, linear, serves
from illava.errors import ModelLoadError
from illava.reduction.vision import VisionReduction

_CPU_ROWS = 1024  # in which segments attend together
_CPU_ACTIVATION_ROWS = 64  # at so400m's width 1 MiB: half of an L2 cache


class TileTower(ABC):
    """Runs the blocks up to the hidden state that a model reads, which is before the tower's last norm.

    Attributes:
        has_cls: a CLS token precedes the patches of every tile; it is never reduced.
        num_blocks: blocks that are run.
        grid: patches per side of a tile.
    """

    has_cls: bool

    def __init__(self, vision_model: Any, *, feature_layer: int = -1) -> None:
        """Borrow the layers of a loaded tower.

        Args:
            vision_model: the module that holds ``embeddings`` and ``encoder``.
            feature_layer: index into the hidden states, 0 being the embeddings, as ``vision_feature_layer`` counts.

        Raises:
            ModelLoadError: no such hidden state.
        """
        self._embeddings = vision_model.embeddings
        self._blocks = _blocks_up_to(vision_model.encoder.layers, feature_layer)
        self.num_blocks = len(self._blocks)
        self.grid = vision_model.embeddings.image_size // vision_model.embeddings.patch_size

    def linears(self) -> list[Any]:
        """The linear layers that `illava.decoder.onednn_linears` may compute."""
        found = []
        for block in self._blocks:
            own = block.self_attn
            found += [own.q_proj, own.k_proj, own.v_proj, own.out_proj, block.mlp.fc1, block.mlp.fc2]
        return found

    @abstractmethod
    def embed(self, pixels_F3HW: Tensor) -> Tensor:
        """Embed what enters the blocks: [F, 3, H, W] normalised -> [T, D]."""

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> Tensor:
        """Run all blocks: [T, D] -> [K, D], reduced by the plan. With an empty plan they equal Hugging Face's."""
        return run_blocks(self._blocks, hidden_TD, reduction)


class SiglipTower(TileTower):
    """Runs the tower of a `SiglipVisionModel`."""

    has_cls = False

    def embed(self, pixels_F3HW: Tensor) -> Tensor:
        """Embed patches with their positions: [F, 3, H, W] normalised -> [T, D]."""
        return self._embeddings(pixels_F3HW).flatten(0, 1)


class ClipTower(TileTower):
    """Runs the tower of a `CLIPVisionModel`. CLS takes part in all attention.

    `VisionReduction` keeps CLS apart and drops it behind the last block, as ``vision_feature_select_strategy: default``
    does.
    """

    has_cls = True

    def __init__(self, vision_model: Any, *, feature_layer: int = -1) -> None:
        """See `TileTower`; there is a norm behind the embeddings."""
        inner = getattr(vision_model, "vision_model", vision_model)  # older transformers: one module deeper
        super().__init__(inner, feature_layer=feature_layer)
        self._norm = inner.pre_layrnorm

    def embed(self, pixels_F3HW: Tensor) -> Tensor:
        """Embed CLS and patches of every tile with their positions, normed: [F, 3, H, W] normalised -> [T, D]."""
        return self._norm(self._embeddings(pixels_F3HW)).flatten(0, 1)


def check_features(config: Any, *, model: str, tower: str, strategy: str, otherwise: str) -> None:
    """Refuse a LLaVA configuration whose features are not what its tower here gives.

    Args:
        config: of transformers.
        model: the model's name, for messages.
        tower: the ``model_type`` of the tower that is supported.
        strategy: the ``vision_feature_select_strategy`` that is.
        otherwise: what another strategy would do, for messages.

    Raises:
        ModelLoadError: another tower, another strategy, or several hidden states.
    """
    found, given = config.vision_config.model_type, config.vision_feature_select_strategy
    layer = config.vision_feature_layer
    if found != tower:
        raise ModelLoadError(f"this {model} has a {found!r} vision tower; supported is {tower!r}")
    if given != strategy:
        raise ModelLoadError(
            f"vision_feature_select_strategy {given!r} {otherwise} (transformers fails on it, too); set it to "
            f"{strategy!r} in config.json"
        )
    if not isinstance(layer, int):
        raise ModelLoadError(
            f"vision_feature_layer {layer} joins several hidden states, which have different lengths under reduction; "
            "only models that read one are supported"
        )


def _blocks_up_to(layers: Any, feature_layer: int) -> Any:
    """The blocks that lead to the hidden state a model reads."""
    num_blocks = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
    if not 1 <= num_blocks <= len(layers):
        raise ModelLoadError(
            f"vision_feature_layer {feature_layer} asks for hidden state {num_blocks} of a tower of "
            f"{len(layers)} blocks; possible are 1 to {len(layers)} or -{len(layers)} to -1"
        )
    return layers[:num_blocks]


def run_blocks(blocks: Sequence[Any], hidden_TD: Tensor, reduction: VisionReduction) -> Tensor:
    """Run all blocks: [T, D] -> [K, D], reduced by the plan. With an empty plan they equal Hugging Face's."""
    wide_TM = None
    if len(blocks) and not hidden_TD.is_cuda and not _fuses_mlp(blocks[0].mlp):
        wide_TM = hidden_TD.new_empty(len(hidden_TD), blocks[0].mlp.fc1.out_features)
    for index, block in enumerate(blocks):
        if reduction.asks(index):
            hidden_TD, q_THd, k_THd, lse_HT = _attend(block, hidden_TD, reduction.lengths, reduction.key_bias_T)
            hidden_TD = reduction.at(index, hidden_TD, q_THd, k_THd, scale=block.self_attn.scale, lse_HT=lse_HT)
            del q_THd, k_THd, lse_HT
        else:
            hidden_TD = _attend_by_segment(block, hidden_TD, reduction)
        if _fuses_mlp(block.mlp):
            hidden_TD = torch.cat([_fused_mlp(block, rows_XD) for rows_XD in hidden_TD.split(_CPU_ROWS)])
        else:
            hidden_TD = hidden_TD + _mlp(block.mlp, block.layer_norm2(hidden_TD), wide_TM)
    return reduction.after_tower(hidden_TD)


def _attend(
    block: Any, hidden_TD: Tensor, lengths: tuple[int, ...], key_bias_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Run a block up to its MLP: the residual stream with attention added, and what made it.

    That is queries, keys, and log-sum-exps of their scores where the attention gives them.
    """
    attention = block.self_attn
    normed_TD = block.layer_norm1(hidden_TD)
    q_THd, k_THd, v_THd = (
        linear(project, normed_TD).unflatten(1, (attention.num_heads, attention.head_dim))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    attended_THd, lse_HT = packed_attention_lse(
        q_THd, k_THd, v_THd, lengths, causal=False, scale=attention.scale, key_bias_T=key_bias_T
    )
    return hidden_TD + linear(attention.out_proj, attended_THd.flatten(1)), q_THd, k_THd, lse_HT


def _attend_by_segment(block: Any, hidden_TD: Tensor, reduction: VisionReduction) -> Tensor:
    """The same where no queries and keys are needed: on CPU a few segments at a time, in memory that is warm."""
    whole, longest = reduction.lengths, max(reduction.lengths, default=1)
    num_together = len(whole) if hidden_TD.is_cuda else max(1, _CPU_ROWS // max(1, longest))
    lengths = [whole[n : n + num_together] for n in range(0, len(whole), num_together)]
    rows = [sum(part) for part in lengths]
    bias = [None] * len(rows) if reduction.key_bias_T is None else reduction.key_bias_T.split(rows)
    parts = [
        _attend(block, part_TD, part_lengths, part_bias_T)[0]
        for part_TD, part_lengths, part_bias_T in zip(hidden_TD.split(rows), lengths, bias, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fuses_mlp(mlp: Any) -> bool:
    """Whether oneDNN computes an MLP's products, and its activation within the first."""
    return serves(mlp.fc1) and serves(mlp.fc2) and activation_of(mlp.activation_fn) is not None


def _fused_mlp(block: Any, hidden_XD: Tensor) -> Tensor:
    """Norm and MLP of a few rows, added to the residual stream: two products, whose wide result stays in the cache."""
    mlp = block.mlp
    wide_XM = linear(mlp.fc1, block.layer_norm2(hidden_XD), activation=activation_of(mlp.activation_fn) or "none")
    return linear(mlp.fc2, wide_XM, plus_TN=hidden_XD)


def _mlp(mlp: Any, normed_TD: Tensor, wide_TM: Tensor | None) -> Tensor:
    """Run Hugging Face's own forward, with its widest result in ``wide_TM`` if that is given and serves this layer."""
    if wide_TM is None or not is_plain(mlp.fc1) or mlp.fc1.bias is None:
        return mlp(normed_TD)
    wide_TM = wide_TM[: len(normed_TD)]
    torch.addmm(mlp.fc1.bias, normed_TD, mlp.fc1.weight.t(), out=wide_TM)
    for rows_XM in wide_TM.split(_CPU_ACTIVATION_ROWS):
        rows_XM.copy_(mlp.activation_fn(rows_XM))
    return mlp.fc2(wide_TM)
