"""The training forward: the toy's own weights, read from the Hugging Face modules, on packed questions.

Two block functions and what surrounds them; equal to Hugging Face's forward where every patch is shown and one
question is asked (tested). Knows nothing of data or optimisers.

Letters: N frames, P patches a frame, B samples, L tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.small_model.batches import Batch
from benchmarks.small_model.samples import GRID
from benchmarks.small_model.vocabulary import COLOUR_LABELS, IGNORE, KIND_LABELS, RELATION_WORDS

_DENSE_SCALE = 4.0
_BACKGROUND_WEIGHT = 0.2
_IDENTITY_WEIGHT = 3.0
_HINT_LAYERS = (1, 3)
_PLACE_SPAN = 4.0
MARKING_BLOCKS = (2, 3, 4, 5)
_MARKING_FACTOR, _MARKING_MASS = 2.0, 0.8

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
        ids: of the words that classify, as `word_ids` gives them.
    """

    def __init__(self, model: nn.Module, ids: WordIds, *, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        tower = model.model.vision_tower
        self.tower = getattr(tower, "vision_model", tower)
        self.decoder = model.model.language_model
        self.ids = ids
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
            if number in MARKING_BLOCKS:
                self.received.append(attention_received(x, w, a.num_heads))
            x = vision_block(x, w, a.num_heads)
        return x

    def marking_loss(self, batch: Batch) -> Tensor:
        """How far foreground patches fall short of the attention they should receive in blocks 2 to 5.

        A foreground patch should receive ``_MARKING_FACTOR`` times what an even spread gives it, or less where the
        foreground is large. Call it behind `encode`, which kept the attention. Pretrained towers attend to what is not
        background by themselves; one this small does so only late, and the benchmark needs a tower that does.
        """
        shown = (batch.label.flatten(0, 1) != 0).any(1)
        num_patches, num_shown = shown.shape[1], shown.sum(1, keepdim=True).clamp(min=1)
        goal = torch.minimum(num_shown.new_tensor(_MARKING_FACTOR).float(), _MARKING_MASS * num_patches / num_shown)
        losses = []
        for received in self.received:
            short = (goal / num_patches).log() - received.float().clamp(min=1e-6).log()
            losses.append((short.clamp(min=0) * shown).sum() / shown.sum().clamp(min=1))
        return torch.stack(losses).mean()

    def dense_loss(self, batch: Batch, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patch classification by word embeddings: (loss, colour accuracy, kind accuracy on foreground)."""
        total, shares = self._place_loss(batch, feature), []
        planes = batch.label.reshape(-1, 2, batch.label.shape[-1])
        for plane, (ids, weight) in enumerate(zip(self.ids.patches, (1.0, _IDENTITY_WEIGHT), strict=True)):
            logits, target = self._words(feature, ids), planes[:, plane].reshape(-1)
            class_weight = torch.ones(len(ids), device=logits.device)
            class_weight[0] = _BACKGROUND_WEIGHT
            total = total + weight * F.cross_entropy(logits, target, class_weight, ignore_index=IGNORE)
            seen = target > 0
            shares.append((logits.argmax(-1)[seen] == target[seen]).float().mean())
        return total, shares[0], shares[1]

    def _words(self, x: Tensor, ids: list[int]) -> Tensor:
        words = self.model.get_input_embeddings().weight
        return (x @ words[ids].to(self.dtype).T).float().flatten(0, 1) * _DENSE_SCALE

    def _place_loss(self, batch: Batch, feature: Tensor) -> Tensor:
        """Where a patch is, finely in the first two channels; where it or its thing is, by the words of the places."""
        place = torch.stack([batch.patch // GRID, batch.patch % GRID], -1).reshape(-1, 2)
        third = ((place.float() + 0.5) / GRID * 3).long()
        owner = batch.place.reshape(-1, 1)
        third = torch.where(owner >= 0, torch.cat([owner // 3, owner % 3], -1), third)
        coarse = sum(
            F.cross_entropy(self._words(feature, ids), third[:, axis]) for axis, ids in enumerate(self.ids.places)
        )
        fine = F.mse_loss(feature[..., :2].flatten(0, 1).float(), _PLACE_SPAN * (place.float() / (GRID - 1) * 2 - 1))
        return coarse + fine / _PLACE_SPAN

    def relation_loss(self, batch: Batch, state: Tensor) -> Tensor:
        """The word each visual token leads to, read from the states behind some layer: the way a moving shape goes, the
        key of a digit's row, the first digit behind a key, the next glyph of a line, the value of a bar."""
        normed = _rms(state[:, : batch.source.shape[1]], self._cast(self.decoder.norm.weight)[0])
        words = self.model.get_input_embeddings().weight[self.ids.relations].to(self.dtype)
        return F.cross_entropy((normed @ words.T).float().flatten(0, 1), batch.relation.flatten(), ignore_index=IGNORE)

    def asked_loss(self, batch: Batch, middle: Tensor) -> Tensor:
        """The answer's first token, read in the middle of the decoder at the word a question turns on: the row of a
        number, the place of a colour are to be found there, by the word itself, before the answer is begun."""
        at = batch.asked >= 0
        normed = _rms(middle[:, batch.source.shape[1] :][at], self._cast(self.decoder.norm.weight)[0])
        words = self.model.get_input_embeddings().weight.to(self.dtype)
        return F.cross_entropy((normed @ words.T).float(), batch.asked[at])

    def answer_logits(self, batch: Batch, feature: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits before each answer token [M, vocabulary], those tokens [M], states early and midway [B, V + T, D]."""
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
        states = []
        for number, layer in enumerate(self.decoder.layers):
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
            if number in _HINT_LAYERS:
                states.append(x[:, length:])
        asked = batch.target >= 0
        answer = _rms(x[:, length + num_visual :][asked], self._cast(self.decoder.norm.weight)[0])
        return (answer @ words.to(self.dtype).T).float(), batch.target[asked], states


def question_mask(block: Tensor, num_shared: int) -> Tensor:
    """What each text token sees: the shared tokens, and its own question so far: bool [B, 1, T, shared + T]."""
    num_text = block.shape[1]
    causal = torch.ones(num_text, num_text, dtype=torch.bool, device=block.device).tril()
    own = causal & (block[:, None, :] == block[:, :, None])
    return torch.cat([own.new_ones(*own.shape[:2], num_shared), own], 2)[:, None]


@dataclass(frozen=True, slots=True)
class WordIds:
    """Token ids whose embeddings classify: the words as answers spell them.

    Attributes:
        patches: colours, kinds; padding means background.
        places: rows (top, center, bottom), columns (left, center, right).
        relations: in the order of `vocabulary.RELATION_WORDS`.
    """

    patches: tuple[list[int], list[int]]
    places: tuple[list[int], list[int]]
    relations: list[int]


def word_ids(tokenizer: object) -> WordIds:
    """The ids of a tokenizer.

    Raises:
        ValueError: two words share their first token.
    """

    def first(words: Iterable[str]) -> list[int]:
        ids = [tokenizer.pad_token_id if word == "none" else tokenizer(word).input_ids[0] for word in words]
        if len(set(ids)) < len(ids):
            raise ValueError(f"of the words {list(words)} two share a first token; train the tokenizer on more text")
        return ids

    places = first(("top", "center", "bottom")), first(("left", "center", "right"))
    return WordIds((first(COLOUR_LABELS), first(KIND_LABELS)), places, first(RELATION_WORDS))
