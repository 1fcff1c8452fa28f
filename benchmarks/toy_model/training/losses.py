"""Computes the auxiliary losses of the demo model's training: of patches, of states midway, of attention.

Targets are the generator's labels.

Letters: as in `forward`; n queries, K keys, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.toy_model.data.samples import GRID
from benchmarks.toy_model.data.vocabulary import COLOUR_LABELS, IGNORE, KIND_LABELS, LINKED_WORDS
from benchmarks.toy_model.training.batches import Batch
from benchmarks.toy_model.training.forward import STATE_LAYERS, States, TrainingForward

_DENSE_SCALE = 4.0
_BACKGROUND_WEIGHT = 0.2
_IDENTITY_WEIGHT = 3.0
_PLACE_SPAN = 4.0
_FOREGROUND_FACTOR, _FOREGROUND_MASS = 2.0, 0.8


@dataclass(frozen=True, slots=True)
class WordIds:
    """Token ids whose embeddings classify: the words as answers spell them.

    Attributes:
        patches: colours, kinds; padding means background.
        places: rows (top, center, bottom), columns (left, center, right).
        linked: in the order of `vocabulary.LINKED_WORDS`.
    """

    patches: tuple[list[int], list[int]]
    places: tuple[list[int], list[int]]
    linked: list[int]


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
    return WordIds((first(COLOUR_LABELS), first(KIND_LABELS)), places, first(LINKED_WORDS))


def _attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Of n queries [n, H, D / H], each to its own keys [n, K, H, D / H]: [n, H, K]."""
    return (torch.einsum("nhd,nkhd->nhk", q, k) * q.shape[-1] ** -0.5).float().softmax(-1)


def _best_head_nll(share: Tensor) -> Tensor:
    """-log of the best head's share of attention [n, H], mean; 0 of none."""
    return -share.amax(1).clamp(min=1e-6).log().sum() / max(len(share), 1)


class Losses:
    """The losses of a forward over `Batch`.

    Args:
        forward: whose features, states and words they read.
        ids: of the words that classify, as `word_ids` gives them.
    """

    def __init__(self, forward: TrainingForward, ids: WordIds) -> None:
        self.forward, self.ids = forward, ids

    def foreground_attention(self, batch: Batch) -> Tensor:
        """How far foreground patches fall short of the attention they should receive in blocks 2 to 5.

        A foreground patch should receive ``_FOREGROUND_FACTOR`` times what an even spread gives it, or less where the
        foreground is large. Call it behind `encode`, which kept the attention. Pretrained towers attend to what is not
        background by themselves; one this small does so only late, and the benchmark needs a tower that does.
        """
        shown = (batch.label.flatten(0, 1) != 0).any(1)
        num_patches, num_shown = shown.shape[1], shown.sum(1, keepdim=True).clamp(min=1)
        goal = torch.minimum(
            num_shown.new_tensor(_FOREGROUND_FACTOR).float(), _FOREGROUND_MASS * num_patches / num_shown
        )
        losses = []
        for received in self.forward.received:
            short = (goal / num_patches).log() - received.float().clamp(min=1e-6).log()
            losses.append((short.clamp(min=0) * shown).sum() / shown.sum().clamp(min=1))
        return torch.stack(losses).mean()

    def dense(self, batch: Batch, feature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patch classification by word embeddings: (loss, colour accuracy, kind accuracy on foreground)."""
        total, shares = self._place_loss(batch, feature), []
        planes = batch.label.reshape(-1, 2, batch.label.shape[-1])
        for plane, (ids, weight) in enumerate(zip(self.ids.patches, (1.0, _IDENTITY_WEIGHT), strict=True)):
            logits, target = self._patch_logits(feature, ids), planes[:, plane].reshape(-1)
            class_weight = torch.ones(len(ids), device=logits.device)
            class_weight[0] = _BACKGROUND_WEIGHT
            total = total + weight * F.cross_entropy(logits, target, class_weight, ignore_index=IGNORE)
            seen = target > 0
            shares.append((logits.argmax(-1)[seen] == target[seen]).float().mean())
        return total, shares[0], shares[1]

    def _patch_logits(self, x: Tensor, ids: list[int]) -> Tensor:
        return (x @ self.forward.words()[ids].T).float().flatten(0, 1) * _DENSE_SCALE

    def _place_loss(self, batch: Batch, feature: Tensor) -> Tensor:
        """Where a patch is, finely in the first two channels; where it or its thing is, by the words of the places."""
        place = torch.stack([batch.patch // GRID, batch.patch % GRID], -1).reshape(-1, 2)
        third = ((place.float() + 0.5) / GRID * 3).long()
        owner = batch.place.reshape(-1, 1)
        third = torch.where(owner >= 0, torch.cat([owner // 3, owner % 3], -1), third)
        coarse = sum(
            F.cross_entropy(self._patch_logits(feature, ids), third[:, axis])
            for axis, ids in enumerate(self.ids.places)
        )
        fine = F.mse_loss(feature[..., :2].flatten(0, 1).float(), _PLACE_SPAN * (place.float() / (GRID - 1) * 2 - 1))
        return coarse + fine / _PLACE_SPAN

    def linked_word(self, batch: Batch, state: Tensor) -> Tensor:
        """The word each visual token leads to, read from the states behind some layer: the way a moving shape goes, the
        key of a digit's row, the first digit behind a key, the next glyph of a line, the value of a bar."""
        logits = self.forward.read(state[:, : batch.source.shape[1]], self.ids.linked)
        return F.cross_entropy(logits.flatten(0, 1), batch.linked_word.flatten(), ignore_index=IGNORE)

    def keyword(self, batch: Batch, middle: Tensor) -> Tensor:
        """The answer's first token, read in the middle of the decoder at the word a question turns on: the row of a
        number, the place of a colour are to be found there, by the word itself, before the answer is begun."""
        at = batch.keyword_answer >= 0
        return F.cross_entropy(self.forward.read(middle[:, batch.source.shape[1] :][at]), batch.keyword_answer[at])

    def matching(self, batch: Batch, states: States) -> Tensor:
        """-log of the attention, in the best head, from the keyword to the patches that answer, in layers 0 and 2.

        It counts attention to visual tokens alone; attention to text is left to the answers. The patches are those
        labelled with the word, or the ones among them that lead to the answer if there are any: the 7 of 47 in the row
        whose key is the answer. Layer 0 sees only the word itself and cannot tell two rows with a 7 apart, so there the
        loss has a floor; layer 2 can.

        Without it the digits of "Which key has the value 47?" never found their row: behind the first layers a digit's
        state no longer told which digit it is, since no loss so far needed that.
        """
        at = batch.keyword_label >= 0
        sample, num_visual = at.nonzero()[:, 0], batch.source.shape[1]
        same = self._answering_patches(batch, sample, batch.keyword_label[at], batch.keyword_answer[at])
        losses = []
        for state, number in ((states.start, 0), (states.early, STATE_LAYERS[0] + 1)):
            q, k = self.forward.queries_keys(batch, state, number)
            attention = _attention_weights(q[:, num_visual:][at], k[:, :num_visual][sample])
            losses.append(_best_head_nll((attention * same[:, None]).sum(-1)[same.any(1)]))
        return sum(losses)

    def copying(self, batch: Batch, middle: Tensor) -> Tensor:
        """-log of the attention, in the best head of layer 4, from the token before the answer to the keyword.

        The keyword's state holds the answer by then (see `keyword`). Attention to text beside it does not count.
        """
        num_visual = batch.source.shape[1]
        sample, keyword = (batch.keyword_answer >= 0).nonzero(as_tuple=True)
        column = torch.arange(batch.target.shape[1], device=keyword.device)
        before = torch.where(batch.target >= 0, column, len(column)).flip(1).cummin(1).values.flip(1)[sample, keyword]
        q, k = self.forward.queries_keys(batch, middle, STATE_LAYERS[1] + 1)
        keys = torch.cat([k[:, :num_visual][sample], k[sample, num_visual + keyword][:, None]], 1)
        return _best_head_nll(_attention_weights(q[sample, num_visual + before], keys)[..., -1])

    def _answering_patches(self, batch: Batch, sample: Tensor, label: Tensor, answer: Tensor) -> Tensor:
        """The visual tokens of a label, those alone that lead to the answer where there are any: bool [n, V]."""
        labels = torch.stack([batch.label[:, :, 0], batch.label[:, :, 1] + len(COLOUR_LABELS)], -1).flatten(1, 2)
        same = (labels[sample] == label[:, None, None]).any(-1)
        if batch.pooled:
            same = same.unflatten(1, (same.shape[1] // 4, 4)).any(-1)
        same = F.pad(same, (0, 1)).gather(1, batch.source[sample])
        words = torch.tensor([*self.ids.linked, IGNORE], device=same.device)
        leads = same & (words[batch.linked_word.clamp(min=-1)][sample] == answer[:, None])
        return torch.where(leads.any(1, keepdim=True), leads, same)
