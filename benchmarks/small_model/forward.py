"""The training forward: the toy's own weights, read from the Hugging Face modules, on packed questions.

Two block functions and what surrounds them; equal to Hugging Face's forward where every patch is shown and one
question is asked (tested). Knows nothing of data or optimisers.

Letters: N frames, P patches a frame, B samples, L tokens, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.small_model.batches import Batch
from benchmarks.small_model.vocabulary import COLOUR_LABELS, IGNORE, KIND_LABELS

_DENSE_SCALE = 4.0
_BACKGROUND_WEIGHT = 0.2
_IDENTITY_WEIGHT = 3.0

Weights = tuple[Tensor, ...]


def vision_block(x: Tensor, w: Weights, heads: int) -> Tensor:
    """One SigLIP layer: [N, P, D] -> [N, P, D]."""
    n, p, d = x.shape
    y = F.layer_norm(x, (d,), w[0], w[1], 1e-6)
    q, k, v = F.linear(y, w[2], w[3]).view(n, p, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, p, d)
    x = x + F.linear(mixed, w[4], w[5])
    y = F.layer_norm(x, (d,), w[6], w[7], 1e-6)
    return x + F.linear(F.gelu(F.linear(y, w[8], w[9]), approximate="tanh"), w[10], w[11])


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def decoder_block(x: Tensor, w: Weights, rotary: tuple[Tensor, Tensor], mask: Tensor, heads: tuple[int, int]) -> Tensor:
    """One Qwen2 layer: [B, L, D] -> [B, L, D]; rotary [B, 1, L, D / H] each; mask of `question_mask` [B, 1, T, L]."""
    b, length, d = x.shape
    num_q, num_kv = heads
    size = d // num_q
    qkv = F.linear(_rms(x, w[0]), w[1], w[2]).view(b, length, num_q + 2 * num_kv, size).transpose(1, 2)
    q, k, v = qkv.split([num_q, num_kv, num_kv], 1)
    q, k = _rotate(q, *rotary), _rotate(k, *rotary)
    k, v = k.repeat_interleave(num_q // num_kv, 1), v.repeat_interleave(num_q // num_kv, 1)
    shared = length - mask.shape[2]
    before = F.scaled_dot_product_attention(q[:, :, :shared], k[:, :, :shared], v[:, :, :shared], is_causal=True)
    asked = F.scaled_dot_product_attention(q[:, :, shared:], k, v, attn_mask=mask)
    mixed = torch.cat([before, asked], 2).transpose(1, 2).reshape(b, length, d)
    x = x + F.linear(mixed, w[3])
    gate, up = F.linear(_rms(x, w[4]), w[5]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w[6])


class TrainingForward:
    """The model's forward and losses over `Batch`.

    Args:
        model: a LlavaOnevisionForConditionalGeneration, whose parameters stay the trained ones.
        dtype: of activations and of the weights' working copies.
        dense_ids: token ids that name colours and kinds, as `dense_token_ids` gives them.
    """

    def __init__(self, model: nn.Module, dense_ids: tuple[list[int], list[int]], *, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        tower = model.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        self.decoder = model.model.language_model
        self.dense_ids = dense_ids
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
        for layer in self.tower.encoder.layers:
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
            x = vision_block(x, w, a.num_heads)
        return x

    def dense_loss(self, feature: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patch classification by word embeddings: (loss, colour accuracy, kind accuracy on foreground)."""
        words = self.model.get_input_embeddings().weight
        total, shares = feature.new_zeros((), dtype=torch.float32), []
        planes = label.reshape(-1, 2, label.shape[-1])
        for plane, (ids, weight) in enumerate(zip(self.dense_ids, (1.0, _IDENTITY_WEIGHT), strict=True)):
            logits = (feature @ words[ids].to(self.dtype).T).float().flatten(0, 1) * _DENSE_SCALE
            target = planes[:, plane].reshape(-1)
            class_weight = torch.ones(len(ids), device=logits.device)
            class_weight[0] = _BACKGROUND_WEIGHT
            total = total + weight * F.cross_entropy(logits, target, class_weight, ignore_index=IGNORE)
            seen = target > 0
            shares.append((logits.argmax(-1)[seen] == target[seen]).float().mean())
        return total, shares[0], shares[1]

    def answer_logits(self, batch: Batch, feature: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at the tokens before each answer token, and those answer tokens: ([M, vocabulary], [M])."""
        num_samples, num_visual = batch.source.shape
        words = self.model.get_input_embeddings().weight
        if batch.pooled:
            feature = feature.view(num_samples, -1, 4, feature.shape[-1]).mean(2)
        newline = self.model.model.image_newline.to(self.dtype).expand(num_samples, 1, -1)
        rows = torch.cat([feature.reshape(num_samples, -1, feature.shape[-1]), newline], 1)
        visual = rows.gather(1, batch.source[:, :, None].expand(-1, -1, rows.shape[-1]))
        start = F.embedding(prefix, words).to(self.dtype).expand(num_samples, -1, -1)
        x = torch.cat([start, visual, F.embedding(batch.ids, words).to(self.dtype)], 1)
        length = len(prefix)
        place = torch.cat(
            [
                torch.arange(length, device=x.device).expand(num_samples, -1),
                length + batch.slot,
                length + batch.num_slots + batch.step,
            ],
            1,
        )
        rate = self.rope_theta ** (-torch.arange(0, self.head_size, 2, device=x.device) / self.head_size)
        angle = (place[:, :, None].float() * rate).repeat(1, 1, 2)[:, None]
        rotary = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        mask = question_mask(batch.block, length + num_visual)
        for layer in self.decoder.layers:
            a = layer.self_attn
            w = self._cast(
                layer.input_layernorm.weight,
                torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
                torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]),
                a.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                layer.mlp.down_proj.weight,
            )
            x = decoder_block(x, w, rotary, mask, self.heads)
        asked = batch.target >= 0
        answer = _rms(x[:, length + num_visual :][asked], self._cast(self.decoder.norm.weight)[0])
        return (answer @ words.to(self.dtype).T).float(), batch.target[asked]


def question_mask(block: Tensor, num_shared: int) -> Tensor:
    """What each text token sees: the shared tokens, and its own question so far: bool [B, 1, T, shared + T]."""
    num_text = block.shape[1]
    causal = torch.ones(num_text, num_text, dtype=torch.bool, device=block.device).tril()
    own = causal & (block[:, None, :] == block[:, :, None])
    return torch.cat([own.new_ones(*own.shape[:2], num_shared), own], 2)[:, None]


def dense_token_ids(tokenizer: object) -> tuple[list[int], list[int]]:
    """Token ids whose embeddings classify patches: the words as answers spell them; padding means background."""

    def first(word: str) -> int:
        return tokenizer.pad_token_id if word == "none" else tokenizer(word).input_ids[0]

    colours, kinds = [first(word) for word in COLOUR_LABELS], [first(word) for word in KIND_LABELS]
    if len(set(colours)) < len(colours) or len(set(kinds)) < len(kinds):
        raise ValueError("two dense labels share their first token; train the tokenizer on more text")
    return colours, kinds
