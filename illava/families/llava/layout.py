"""Lays out tile tokens as the LLM of a LLaVA reads them: pools, joins and unpads tiles, and adds newlines.

A `TileLayout` is the unreduced model's own arithmetic over full grids of any side and any channels. The released layout
applies it to the pseudo-grid. The geometric layout applies it to the restored grid, and then selects the placeholders
of the kept tokens.

Source: transformers 5.23, models/llava_onevision/modeling_llava_onevision.py: apply_pooling, pack_image_features;
models/llava_next/modeling_llava_next.py: pack_image_features, the same without pooling and without a budget.

Shape suffixes: F tiles, R rows, C columns, D channels, O placeholder tokens, P cells of all tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from illava.families.llava.geometry import AnyresGeometry, ImageLayout
from illava.host_copies import to_device


@dataclass(frozen=True, slots=True)
class TileLayout:
    """Maps full grids of tile cells to placeholder tokens.

    Attributes:
        kind: ``video`` (every tile a frame, pooled), ``image`` (base tile and joined tiles) or ``single`` (one of
            several images: its base tile alone).
        num_tiles: F.
        side: cells per side of a tile.
        joined: the layout of the tiles behind the base tile, for ``image``.
    """

    kind: Literal["video", "image", "single"]
    num_tiles: int
    side: int
    joined: ImageLayout | None = None

    @classmethod
    def of(
        cls, kind: Literal["video", "image"], num_tiles: int, size: tuple[int, int], geometry: AnyresGeometry, side: int
    ) -> TileLayout:
        """The layout of one visual input of ``size`` (height, width) px; an image in one tile is one of several."""
        if kind == "video":
            return cls("video", num_tiles, side)
        if num_tiles == 1:
            return cls("single", 1, side)
        return cls("image", num_tiles, side, geometry.image_layout(*size, side=side))

    @property
    def pooled(self) -> int:
        """Cells per side of a pooled frame."""
        return -(-self.side // 2)

    def pool_centres(self) -> Tensor:
        """The row or column of cells at the centre of each pooled one: int64 [pooled]; on the host."""
        return _centres(self.side, self.pooled)

    def apply(self, grid_FRCD: Tensor, newline_D: Tensor) -> Tensor:
        """Compute every placeholder's value: [F, side, side, D] -> [O, D]; separators are ``newline_D``.

        Memory formats are those of the source, so that interpolation rounds the same way.
        """
        if self.kind == "video":
            pooled_FDRC = interpolate(
                grid_FRCD.permute(0, 3, 1, 2).contiguous(), size=(self.pooled, self.pooled), mode="bilinear"
            )
            return torch.cat([pooled_FDRC.permute(0, 2, 3, 1).flatten(0, 2), newline_D[None]])
        base_PD = grid_FRCD[0].flatten(0, 1)
        if self.joined is None:
            return torch.cat([base_PD, newline_D[None]])
        joined_DRC = self._crop(self._join(grid_FRCD).permute(2, 0, 1).contiguous())
        if self.joined.resized is not None:
            joined_DRC = interpolate(joined_DRC[None], size=self.joined.resized, mode="bilinear")[0]
        newline_DRC = newline_D[:, None, None].expand(-1, joined_DRC.shape[1], 1)
        rows_PD = torch.cat([joined_DRC, newline_DRC], dim=2).flatten(1).T
        return torch.cat([base_PD, rows_PD])

    def occupied(self, kept_FRC: Tensor) -> Tensor:
        """The placeholders that kept tokens take, from their cells: bool [F, side, side] -> bool [O].

        Pooled frames mix every cell, so they keep all their placeholders; every separator is kept, too. An image's
        placeholder is kept if its cell holds a kept token; over the tile budget, if its resized cell holds one.
        """
        keep_1 = kept_FRC.new_ones(1)
        if self.kind == "video":
            return keep_1.expand(self.num_tiles * self.pooled**2 + 1)
        base_P = kept_FRC[0].flatten()
        if self.joined is None:
            return torch.cat([base_P, keep_1])
        joined_RC = self._crop(self._join(kept_FRC[..., None]).permute(2, 0, 1))[0]
        if self.joined.resized is not None:
            rows, cols = self.joined.resized
            joined_RC = _into_cells(_into_cells(joined_RC, rows).T, cols).T
        rows_RC = torch.cat([joined_RC, keep_1.expand(joined_RC.shape[0], 1)], dim=1)
        return torch.cat([base_P, rows_RC.flatten()])

    def centres(self) -> tuple[Tensor, Tensor]:
        """The cell at each placeholder's centre: int64 [O]; the placeholder that each cell lies in: [F, side, side].

        For images. Cells are counted through all tiles; separators have none, and the canvas's padding is in no
        placeholder (-1). On the host.
        """
        cells_FRC = torch.arange(self.num_tiles * self.side**2).view(self.num_tiles, self.side, self.side)
        base_P = cells_FRC[0].flatten()
        if self.joined is None:
            return torch.cat([base_P, base_P.new_tensor([-1])]), cells_FRC
        inside_RC = self._crop(self._join(cells_FRC[..., None]).permute(2, 0, 1))[0]
        rows, cols = self.joined.shape
        fine_R, fine_C = _centres(inside_RC.shape[0], rows), _centres(inside_RC.shape[1], cols)
        centre_RC = inside_RC[fine_R][:, fine_C]
        centre_RC = torch.cat([centre_RC, centre_RC.new_full((rows, 1), -1)], 1)  # newlines
        coarse_R, coarse_C = _centres(rows, inside_RC.shape[0]), _centres(cols, inside_RC.shape[1])
        placeholder_FRC = torch.full_like(cells_FRC, -1)
        placeholder_FRC[0] = cells_FRC[0]
        placeholder_FRC.view(-1)[inside_RC] = self.side**2 + coarse_R[:, None] * (cols + 1) + coarse_C
        return torch.cat([base_P, centre_RC.flatten()]), placeholder_FRC

    def coords(self) -> Tensor:
        """(frame or part, row, col) of every placeholder: int64 [O, 3] on the host; separators have row = col = -1.

        A video's frames count from 0 on the pooled grid. An image's base tile is part 0, the joined, unpadded and, if
        so, resized grid of its other tiles is part 1.
        """
        if self.kind == "video":
            return torch.cat([_grid_coords(range(self.num_tiles), self.pooled, self.pooled), _separators(-1, 1)])
        base_P3 = _grid_coords(range(1), self.side, self.side)
        if self.joined is None:
            return torch.cat([base_P3, _separators(-1, 1)])
        rows, cols = self.joined.shape
        grid_RC3 = _grid_coords(range(1, 2), rows, cols).view(rows, cols, 3)
        rows_RC3 = torch.cat([grid_RC3, _separators(1, rows).view(rows, 1, 3)], dim=1)
        return torch.cat([base_P3, rows_RC3.flatten(0, 1)])

    def matrix(self) -> Tensor:
        """The cells that each placeholder is made of: sparse float32 [O, P] on the host, for traces.

        Rows of separators are empty. Bilinear interpolation is separable: a weight is its row's times its column's.
        """
        cells_FRC = torch.arange(self.num_tiles * self.side**2).view(self.num_tiles, self.side, self.side)
        if self.kind == "video":
            pool_OR = _weights(self.side, self.pooled)
            placeholder_FOO = torch.arange(self.num_tiles * self.pooled**2).view(-1, self.pooled, self.pooled)
            blocks = [_outer(placeholder_FOO, cells_FRC, pool_OR, pool_OR)]
        else:
            blocks = [(cells_FRC[0].flatten(), cells_FRC[0].flatten(), torch.ones(self.side**2))]
        num_placeholders = self.coords().shape[0]
        if self.joined is not None:
            cropped_1RC = self._crop(self._join(cells_FRC[..., None]).permute(2, 0, 1))
            rows, cols = self.joined.shape
            row_OR, col_OC = _weights(cropped_1RC.shape[1], rows), _weights(cropped_1RC.shape[2], cols)
            placeholder_1OO = torch.arange(self.side**2, num_placeholders).view(1, rows, cols + 1)[:, :, :-1]
            blocks.append(_outer(placeholder_1OO, cropped_1RC, row_OR, col_OC))
        placeholder, cell, weight = (torch.cat(column) for column in zip(*blocks, strict=True))
        size = (num_placeholders, cells_FRC.numel())
        return torch.sparse_coo_tensor(
            torch.stack([placeholder, cell]), weight, size, check_invariants=False
        ).coalesce()

    def _join(self, grid_FRCD: Tensor) -> Tensor:
        """Join all tiles but the base tile to one grid: [rows, cols, D]."""
        assert self.joined is not None
        tile_rows, tile_cols = self.joined.rows // self.side, self.joined.cols // self.side
        tiles = grid_FRCD[1:].unflatten(0, (tile_rows, tile_cols))
        return tiles.permute(0, 2, 1, 3, 4).reshape(self.joined.rows, self.joined.cols, -1)

    def _crop(self, joined_DRC: Tensor) -> Tensor:
        """Cut the canvas's padding off the joined grid."""
        assert self.joined is not None
        return joined_DRC[:, self.joined.top : self.joined.bottom, self.joined.left : self.joined.right]


def _grid_coords(parts: range, rows: int, cols: int) -> Tensor:
    return torch.cartesian_prod(torch.tensor(list(parts)), torch.arange(rows), torch.arange(cols))


def _separators(part: int, count: int) -> Tensor:
    return torch.tensor([[part, -1, -1]]).expand(count, 3)


def _into_cells(kept_RC: Tensor, num_rows: int) -> Tensor:
    """Whether each of ``num_rows`` coarser rows holds a kept token, column by column; a row's centre decides."""
    coarse_R = to_device(_centres(num_rows, kept_RC.shape[0]), kept_RC.device)
    out = torch.zeros(num_rows, kept_RC.shape[1], device=kept_RC.device)
    return out.index_add_(0, coarse_R, kept_RC.float()) > 0


def _centres(num_in: int, num_out: int) -> Tensor:
    """Of ``num_in`` rows the one in which the centre of each of ``num_out`` equally high rows lies: int64 [num_out]."""
    return ((torch.arange(num_out) * 2 + 1) * num_in) // (2 * num_out)


def _weights(num_in: int, num_out: int) -> Tensor:
    """The weights [num_out, num_in] of linear interpolation; the identity where nothing is resized."""
    if num_in == num_out:
        return torch.eye(num_in)
    return interpolate(torch.eye(num_in)[None], size=num_out, mode="linear")[0].T


def _outer(placeholder_FOO: Tensor, cells_FRC: Tensor, row_OR: Tensor, col_OC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(placeholder, cell, weight) of every non-zero product of a row weight and a column weight, on every tile."""
    row_out, row_in = row_OR.nonzero().T
    col_out, col_in = col_OC.nonzero().T
    placeholder = placeholder_FOO[:, row_out[:, None], col_out[None]]
    cell = cells_FRC[:, row_in[:, None], col_in[None]]
    weight = row_OR[row_out, row_in][:, None] * col_OC[col_out, col_in][None]
    return placeholder.flatten(), cell.flatten(), weight.expand(placeholder.shape).flatten()
