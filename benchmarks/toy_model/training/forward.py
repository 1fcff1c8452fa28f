"""Runs the training forward: the demo model's own weights, read from the Hugging Face modules, on packed questions.

It equals Hugging Face's forward where every patch is shown and there is one question (tested).

Letters: N frames, P patches a frame, B samples, L tokens, D width, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.toy_model.training.batches import Batch

STATE_LAYERS = (1, 3)
FOREGROUND_BLOCKS = (2, 3, 4, 5)

Weights = tuple[Tensor, ...]


class States(NamedTuple):
    """Visual tokens, then text, [B, V + T, D] each: what enters the decoder, and what leaves `STATE_LAYERS`."""

    start: Tensor
    early: Tensor
    middle: Tensor


def vision_block(x: Tensor, w: Weights, heads: int) -> Tensor:
    """One SigLIP layer: [N, P, D] -> [N, P, D]."""
    n, p, d = x.shape
    y = F.layer_norm(x, (d,), w[0], w[1], 1e-6)
    q, k, v = F.linear(y, w[2], w[3]).view(n, p, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, p, d)
    x = x + F.linear(mixed, w[4], w[5])
    y = F.layer_norm(x, (d,), w[6], w[7], 1e-6)
    return x + F.linear(F.gelu(F.linear(y, w[8], w[9]), approximate="tanh"), w[10], w[11])


def attention_received(x: Tensor, w: Weights, heads: int) -> Tensor:
    """What each patch receives in a `vision_block`, mean over queries and heads: [N, P, D] -> [N, P], sums to 1."""
    n, p, d = x.shape
    y = F.layer_norm(x, (d,), w[0], w[1], 1e-6)
    q, k = F.linear(y, w[2][: 2 * d], w[3][: 2 * d]).view(n, p, 2, heads, d // heads).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-1, -2) * (d // heads) ** -0.5).softmax(-1).mean((1, 2))


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def decoder_block(x: Tensor, w: Weights, rotary: tuple[Tensor, Tensor], mask: Tensor, heads: tuple[int, int]) -> Tensor:
    """One Qwen2 layer: [B, L, D] -> [B, L, D]; rotary [B, 1, L, D / H] each; mask of `question_mask` [B, 1, T, L]."""
    b, length, d = x.shape
    q, k, v = _queries_keys_values(x, w, rotary, heads)
    shared = length - mask.shape[2]
    before = F.scaled_dot_product_attention(q[:, :, :shared], k[:, :, :shared], v[:, :, :shared], is_causal=True)
    own = F.scaled_dot_product_attention(q[:, :, shared:], k, v, attn_mask=mask)
    mixed = torch.cat([before, own], 2).transpose(1, 2).reshape(b, length, d)
    x = x + F.linear(mixed, w[3])
    gate, up = F.linear(_rms(x, w[4]), w[5]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w[6])


def _queries_keys_values(x: Tensor, w: Weights, rotary: tuple[Tensor, Tensor], heads: tuple[int, int]) -> Weights:
    """Of a `decoder_block`: each [B, H, L, D / H]."""
    b, length, d = x.shape
    num_q, num_kv = heads
    qkv = F.linear(_rms(x, w[0]), w[1], w[2]).view(b, length, num_q + 2 * num_kv, d // num_q).transpose(1, 2)
    q, k, v = qkv.split([num_q, num_kv, num_kv], 1)
    q, k = _rotate(q, *rotary), _rotate(k, *rotary)
    return q, k.repeat_interleave(num_q // num_kv, 1), v.repeat_interleave(num_q // num_kv, 1)


class TrainingForward:
    """The model's forward over `Batch`.

    Args:
        model: a LlavaOnevisionForConditionalGeneration, whose parameters stay the trained ones.
        dtype: of activations and of the weights' working copies.
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        tower = model.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        self.decoder = model.model.language_model
        text = model.config.text_config
        self.heads = (text.num_attention_heads, text.num_key_value_heads)
        self.head_size = text.hidden_size // text.num_attention_heads
        self.rope_theta = text.rope_parameters["rope_theta"]

    def _cast(self, *weights: Tensor) -> Weights:
        return tuple(weight.to(self.dtype) for weight in weights)

    def encode(self, batch: Batch, *, train_tower: bool = True) -> Tensor:
        """Tower and projector: [B * F, K, D], before the post-norm, before pooling."""
        with torch.set_grad_enabled(train_tower and torch.is_grad_enabled()):
            x = self._tower(batch)
        projector = self.model.model.multi_modal_projector
        x = F.gelu(F.linear(x, *self._cast(projector.linear_1.weight, projector.linear_1.bias)))
        return F.linear(x, *self._cast(projector.linear_2.weight, projector.linear_2.bias))

    def _tower(self, batch: Batch) -> Tensor:
        embeddings = self.tower.embeddings
        num_frames, keep = batch.pixels.shape[0] * batch.pixels.shape[1], batch.pixels.shape[2]
        pixels = batch.pixels.reshape(num_frames, keep, -1).to(self.dtype).div_(127.5).sub_(1)
        conv = embeddings.patch_embedding
        x = F.linear(pixels, *self._cast(conv.weight.flatten(1), conv.bias))
        x = x + F.embedding(batch.patch.reshape(num_frames, keep), self._cast(embeddings.position_embedding.weight)[0])
        self.received = []
        for number, layer in enumerate(self.tower.encoder.layers):
            a = layer.self_attn
            w = self._cast(
                layer.layer_norm1.weight,
                layer.layer_norm1.bias,
                torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
                torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]),
                a.out_proj.weight,
                a.out_proj.bias,
                layer.layer_norm2.weight,
                layer.layer_norm2.bias,
                layer.mlp.fc1.weight,
                layer.mlp.fc1.bias,
                layer.mlp.fc2.weight,
                layer.mlp.fc2.bias,
            )
            if number in FOREGROUND_BLOCKS:
                self.received.append(attention_received(x, w, a.num_heads))
            x = vision_block(x, w, a.num_heads)
        return x

    def answer_logits(self, batch: Batch, feature: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor, States]:
        """Logits before each answer token [M, vocabulary], those tokens [M], and the states on the way."""
        num_samples, num_visual = batch.source.shape
        if batch.pooled:
            feature = feature.view(num_samples, -1, 4, feature.shape[-1]).mean(2)
        newline = self.model.model.image_newline.to(self.dtype).expand(num_samples, 1, -1)
        rows = torch.cat([feature.reshape(num_samples, -1, feature.shape[-1]), newline], 1)
        visual = rows.gather(1, batch.source[:, :, None].expand(-1, -1, rows.shape[-1]))
        words = self.words()
        x = torch.cat(
            [F.embedding(prefix, words).expand(num_samples, -1, -1), visual, F.embedding(batch.ids, words)], 1
        )
        length = len(prefix)
        rotary = self._rotary(batch, length)
        mask = question_mask(batch.block, length + num_visual)
        states = [x[:, length:]]
        for number in range(len(self.decoder.layers)):
            x = decoder_block(x, self._decoder_weights(number), rotary, mask, self.heads)
            if number in STATE_LAYERS:
                states.append(x[:, length:])
        is_answer = batch.target >= 0
        return self.read(x[:, length + num_visual :][is_answer]), batch.target[is_answer], States(*states)

    def words(self) -> Tensor:
        """The word embeddings [vocabulary, D], which are the output's too."""
        return self._cast(self.model.get_input_embeddings().weight)[0]

    def read(self, state: Tensor, ids: list[int] | slice = slice(None)) -> Tensor:
        """Logits of the words ``ids`` from states of any layer, as the output reads the last: [..., D] -> [..., W]."""
        return (_rms(state, self._cast(self.decoder.norm.weight)[0]) @ self.words()[ids].T).float()

    def queries_keys(self, batch: Batch, state: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Of a layer, from the state that enters it [B, V + T, D]: each [B, V + T, H, D / H]. Places are counted from
        the picture's first token: rotary embedding tells only how far apart two tokens are."""
        q, k, _ = _queries_keys_values(state, self._decoder_weights(number), self._rotary(batch), self.heads)
        return q.transpose(1, 2), k.transpose(1, 2)

    def _decoder_weights(self, number: int) -> Weights:
        layer = self.decoder.layers[number]
        a = layer.self_attn
        return self._cast(
            layer.input_layernorm.weight,
            torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
            torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]),
            a.o_proj.weight,
            layer.post_attention_layernorm.weight,
            torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
            layer.mlp.down_proj.weight,
        )

    def _rotary(self, batch: Batch, length: int = 0) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, L, D / H] of ``length`` tokens before the picture, of the picture and the text."""
        before = torch.arange(length, device=batch.slot.device).expand(len(batch.slot), -1)
        place = torch.cat([before, length + batch.slot, length + batch.num_placeholders + batch.step], 1)
        rate = self.rope_theta ** (-torch.arange(0, self.head_size, 2, device=place.device) / self.head_size)
        angle = (place[:, :, None].float() * rate).repeat(1, 1, 2)[:, None]
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)


def question_mask(block: Tensor, num_shared: int) -> Tensor:
    """What each text token sees: the shared tokens, and its own question so far: bool [B, 1, T, shared + T]."""
    num_text = block.shape[1]
    causal = torch.ones(num_text, num_text, dtype=torch.bool, device=block.device).tril()
    own = causal & (block[:, None, :] == block[:, :, None])
    return torch.cat([own.new_ones(*own.shape[:2], num_shared), own], 2)[:, None]
