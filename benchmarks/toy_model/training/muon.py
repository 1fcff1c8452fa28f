"""Muon: momentum whose matrix update is orthogonalised, all matrices of one shape in one batched product.

Source: K. Jordan et al., "Muon", github.com/KellerJordan/Muon (Newton-Schulz coefficients of the quintic).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: [n, rows, cols] -> same."""
    a, b, c = _COEFFICIENTS
    x = update.to(torch.bfloat16) if update.is_cuda else update
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for 2-D parameters only."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update; the processes of a training share the orthogonalising."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_shape.setdefault(param.shape, []).append(param)
            updates = [self._directions(group, params) for params in by_shape.values()]
            if dist.is_initialized() and updates:
                flat = torch.cat([update.flatten() for update in updates])
                dist.all_reduce(flat)
                parts = flat.split([update.numel() for update in updates])
                updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
            for (shape, params), update in zip(by_shape.items(), updates, strict=True):
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for param, direction in zip(params, update, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-scale)

    def _directions(self, group: dict, params: list[Tensor]) -> Tensor:
        """Orthogonalised momentum of matrices of one shape: [n, rows, cols]; zero where another process does it."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        momenta = []
        for param in params:
            state = self.state[param]
            if "buffer" not in state:
                state["buffer"] = torch.zeros_like(param)
            buffer = state["buffer"].lerp_(param.grad, 1 - group["momentum"])
            momenta.append(param.grad.lerp(buffer, group["momentum"]))
        whole = torch.stack(momenta)
        directions = torch.zeros_like(whole)
        if len(params) > rank:
            directions[rank::world] = orthogonalise(whole[rank::world])
        return directions
