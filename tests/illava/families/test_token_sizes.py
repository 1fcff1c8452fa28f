"""How many of the unreduced model's visual tokens each token of a tiled picture or a video stands for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from illava.families.llava.layout import TileLayout
from illava.families.llava.packing import KeptTokens, lay_out, patch_coords
from tests.illava.families.test_anyres import GEOMETRIES

SIZES = ((64, 64), (50, 160), (168, 60), (33, 150))


def merged(num_tiles, grid, *, seed, num_groups=5):
    """Random groups within each tile, as kept tokens: one member of each stands for it."""
    gen = torch.Generator().manual_seed(seed)
    group_FP = torch.randint(0, num_groups, (num_tiles, grid**2), generator=gen)
    group_P = (group_FP + num_groups * torch.arange(num_tiles)[:, None]).flatten()
    cells = {int(g): (group_P == g).nonzero().flatten() for g in group_P.unique()}
    own = sorted(int(own[torch.randint(0, len(own), (1,), generator=gen)]) for own in cells.values())
    token_of = {int(group_P[cell]): n for n, cell in enumerate(own)}
    merged_FRC = torch.tensor([token_of[int(g)] for g in group_P]).view(num_tiles, grid, grid)
    coord_K3 = patch_coords(num_tiles, grid)[own]
    return KeptTokens(
        torch.randn(len(own), 4, generator=gen), None, coord_K3, merged_FRC, None, tuple(range(num_tiles)),
        merged_FRC=merged_FRC,
    )  # fmt: skip


def encoded(kind, model, size, num_tiles, kept):
    mm_item = SimpleNamespace(kind=kind, tiles=torch.zeros(num_tiles), original_size=size, num_left_out=0)
    return lay_out(kept, mm_item, model, torch.zeros(4))


@pytest.mark.parametrize("name", ["odd", "even", "tight"])
@pytest.mark.parametrize("size", SIZES)
def test_a_tiled_picture_counts_the_tokens_whose_cells_were_merged(name, size):
    model = GEOMETRIES[name]
    joined = model.image_layout(*size, side=model.grid)
    num_tiles = 1 + (joined.rows // model.grid) * (joined.cols // model.grid)
    layout = TileLayout.of("image", max(num_tiles, 2), size, model, model.grid)
    kept = merged(layout.num_tiles, model.grid, seed=sum(size))
    found = encoded("image", model, size, layout.num_tiles, kept)
    matrix = layout.matrix().to_dense()
    if layout.joined.resized is None:
        at_cell = {int(row.argmax()): n for n, row in enumerate(matrix) if row.sum() > 0}
        own_cell = (kept.coord_K3 * torch.tensor([model.grid**2, model.grid, 1])).sum(1).tolist()
        taken = found.placeholder_K.tolist()
        count = dict.fromkeys(taken, 1)
        for cell, placeholder in at_cell.items():
            target = at_cell.get(own_cell[int(kept.merged_FRC.flatten()[cell])])
            if placeholder not in count and target is not None:
                count[target] += 1
        assert found.size_K.tolist() == [count[n] for n in taken]
    cell_O, _ = layout.centres()
    for cell, row in zip(cell_O.tolist(), matrix, strict=True):
        assert (row[cell] >= row.max() - 1e-6) if cell >= 0 else row.sum() == 0
    assert found.size_K.min() == 1
    assert found.size_K.max() > 2
    assert len(cell_O) / 2 < found.size_K.sum() <= len(cell_O)  # of groups whose own cell is padding nothing is read


def test_a_pooled_frame_stands_for_the_frames_that_were_merged_into_it():
    """Frames 0 and 1 became frame 0, frames 2 and 3 frame 3 but for a cell that was dropped; each cell was merged."""
    model, num_frames = GEOMETRIES["odd"], 4
    grid, pooled = model.grid, model.pooled
    kept = merged(2, grid, seed=1)
    of_frames = torch.stack([kept.merged_FRC[0], kept.merged_FRC[0], kept.merged_FRC[1], kept.merged_FRC[1]])
    of_frames[2, 1, 1] = -1
    coord_K3 = kept.coord_K3.clone()
    coord_K3[:, 0] *= 3
    kept = KeptTokens(kept.feature_KD, None, coord_K3, kept.merged_FRC, None, (0, 3), (), of_frames)
    found = encoded("video", model, (56, 56), num_frames, kept)
    expected = torch.full((2, pooled, pooled), 2.0)
    centre = [(2 * n + 1) * grid // (2 * pooled) for n in range(pooled)]
    if 1 in centre:
        expected[1, centre.index(1), centre.index(1)] = 1
    assert torch.equal(found.size_K[:-1].view_as(expected), expected)
    assert found.size_K[-1] == 1
    whole = encoded("video", model, (56, 56), 2, merged(2, grid, seed=2))
    assert (whole.size_K == 1).all()
