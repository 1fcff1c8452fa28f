"""Shares the tower's first blocks between plans: until a plan first acts, they compute the same for a tile.

Beside the family's own `TileEncoder`: equal tiles (a small picture's two, the same picture under another plan) share
the blocks before the first that reduces or is measured. Those of one call share the others, too, if every reduction
leaves bit by bit the same of them. Knows plans by their stages; no reducer, no question.

Shape suffixes: T tokens packed end to end, F tiles, N patches of a tile, K kept tokens, D channels.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from illava.families.llava.encoder import TileEncoder
from illava.families.llava.onevision import LlavaOnevision
from illava.families.llava.towers import SiglipTower, run_blocks
from illava.plan import EMPTY_PLAN, ReductionPlan
from illava.preprocess import VisualInput
from illava.reduction.probe import AttentionProbe
from illava.reduction.vision import VisionReduction
from illava.visual_tokens import EncodedVisual


class SharedTower:
    """Stands before a tower without CLS token and remembers, by the bytes of a tile, the states plans start from.

    Attributes:
        has_cls: of the tower.
        num_blocks: of the tower.
        depth: blocks that the plan at hand leaves alone; see `untouched_blocks`.
        shares_later: whether equal tiles of one call go through the other blocks once.
        num_run: tiles that went through those first blocks on their own account, for tests.
        num_later: tiles that went through the others, for tests.
    """

    has_cls = False

    def __init__(self, tower: SiglipTower) -> None:
        self._tower, self._blocks = tower, tower._blocks
        self.num_blocks, self.depth, self.shares_later = tower.num_blocks, 0, True
        self.num_run = self.num_later = 0
        self._embedded_TD: Tensor | None = None
        self._keys: list[bytes] = []
        self._states_ND: dict[int, dict[bytes, Tensor]] = defaultdict(dict)  # by depth, by tile

    def forget(self) -> None:
        """Drop all states."""
        self._states_ND.clear()

    def embed(self, pixels_F3HW: Tensor) -> Tensor:
        """See `SiglipTower.embed`."""
        self._keys = [hashlib.sha256(tile.numpy().data).digest() for tile in pixels_F3HW]
        self._embedded_TD = self._tower.embed(pixels_F3HW)
        return self._embedded_TD

    def run(self, hidden_TD: Tensor, reduction: VisionReduction) -> Tensor:
        """See `SiglipTower.run`; where stage ``media`` took patches away, nothing is shared."""
        if hidden_TD is not self._embedded_TD:
            return self._tower.run(hidden_TD, reduction)
        known_ND = self._states_ND[self.depth]
        tiles_FND = hidden_TD.view(len(self._keys), -1, hidden_TD.shape[-1])
        fresh = {key: place for place, key in enumerate(self._keys) if key not in known_ND}
        if fresh:
            begun_FND = self._begin(tiles_FND[list(fresh.values())])
            known_ND.update(zip(fresh, begun_FND, strict=True))
        places = range(len(self._keys))
        later = _Later(
            reduction, self.depth, [self._keys.index(self._keys[n]) if self.shares_later else n for n in places]
        )
        self.num_later += len(later.run)
        begun_TD = torch.cat([known_ND[self._keys[tile]] for tile in later.run])
        return run_blocks(self._blocks[self.depth :], begun_TD, later)  # type: ignore[arg-type]

    def _begin(self, tiles_FND: Tensor) -> Tensor:
        """The blocks that no plan at hand acts in."""
        num_tiles, num_patches, _ = tiles_FND.shape
        self.num_run += num_tiles
        coord_T3 = torch.zeros(num_tiles * num_patches, 3, dtype=torch.long)
        nothing = VisionReduction(EMPTY_PLAN, (num_patches,) * num_tiles, coord_T3, num_blocks=self.depth)
        return run_blocks(self._blocks[: self.depth], tiles_FND.flatten(0, 1), nothing).view_as(tiles_FND)


class _TilesDifferError(Exception):
    """A reduction left different tokens of equal tiles."""


class _Later:
    """A reduction whose blocks are counted from ``depth``, and which sees all tiles where equal ones were run once.

    Attributes:
        run: the tiles that the blocks see.
    """

    def __init__(self, reduction: VisionReduction, depth: int, first_like: list[int]) -> None:
        """Begin behind the first blocks.

        Args:
            reduction: over all tiles.
            depth: blocks that were run already.
            first_like: of each tile, the first that stands for it.
        """
        self._reduction, self._depth = reduction, depth
        self._first_like, self.run = first_like, list(dict.fromkeys(first_like))
        self._all_run = len(self.run) == len(first_like)

    @property
    def lengths(self) -> tuple[int, ...]:
        lengths = self._reduction.lengths
        return lengths if self._all_run else tuple(lengths[tile] for tile in self.run)

    @property
    def key_bias_T(self) -> Tensor | None:
        bias_T = self._reduction.key_bias_T
        return None if bias_T is None else self._of_run(bias_T)

    def asks(self, block: int) -> bool:
        """See `VisionReduction.asks`."""
        return self._reduction.asks(block + self._depth)

    def at(self, block: int, *given: Tensor, scale: float, lse_HT: Tensor | None = None) -> Tensor:
        """See `VisionReduction.at`.

        Raises:
            _TilesDifferError: one tile cannot stand for another any more.
        """
        return self._of_run(self._reduction.at(block + self._depth, *map(self._of_all, given), scale=scale))

    def after_tower(self, hidden_TD: Tensor) -> Tensor:
        """See `VisionReduction.after_tower`."""
        return self._reduction.after_tower(self._of_all(hidden_TD))

    def _of_all(self, value_TX: Tensor) -> Tensor:
        """From the tiles that were run to all tiles."""
        if self._all_run:
            return value_TX
        own = dict(zip(self.run, value_TX.split(self.lengths), strict=True))
        return torch.cat([own[tile] for tile in self._first_like])

    def _of_run(self, value_TX: Tensor) -> Tensor:
        """From all tiles to those that are run, which must be all there is to know."""
        if self._all_run:
            return value_TX
        own = value_TX.split(self._reduction.lengths)
        if len(own) != len(self._first_like):
            raise _TilesDifferError
        if not all(torch.equal(tile_KX, own[first]) for tile_KX, first in zip(own, self._first_like, strict=True)):
            raise _TilesDifferError
        return torch.cat([own[tile] for tile in self.run])


class SharedTiles(TileEncoder):
    """The family's encoder over a `SharedTower`."""

    def __init__(self, family: LlavaOnevision, tower: SharedTower) -> None:
        super().__init__(tower, family.encoder._projector, family.encoder._newline_D, family.preprocessor)
        self._shared = tower

    def encode(
        self,
        media: Sequence[VisualInput],
        plan: ReductionPlan,
        *,
        trace: bool,
        seeds: Sequence[int] | None = None,
        probe: AttentionProbe | None = None,
    ) -> list[EncodedVisual]:
        """See `Family.encode`."""
        if probe is not None:
            raise ValueError("blocks that plans share are not run for each: a probe would not be told of them")
        self._shared.depth = untouched_blocks(plan, self._shared.num_blocks)
        self._shared.shares_later = not any("seed" in step.reducer.evidence(step.stage) for step in plan.steps)
        try:
            return super().encode(media, plan, trace=trace, seeds=seeds)
        except _TilesDifferError:
            self._shared.shares_later = False
            return super().encode(media, plan, trace=trace, seeds=seeds)


def untouched_blocks(plan: ReductionPlan, num_blocks: int) -> int:
    """Leading blocks of the tower that a plan neither reduces in nor measures; the last serves stages behind it."""
    later = plan.at("vision_output") is not None or plan.at("decoder_input") is not None
    return min([*plan.layers("vision_block"), num_blocks - later])
