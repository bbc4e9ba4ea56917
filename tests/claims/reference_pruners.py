"""Wanda and SparseGPT written plainly from their papers, slowly, for comparison.

Nothing of the package's pruning is used: the inputs of a block's linear layers are caught by hooks
in full forward passes (the blocks before it are already pruned, the block itself is dense), then
the block is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Prune = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def prune_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], windows: Sequence[Tensor], prune: Prune
) -> None:
    """Prune every linear layer of the blocks, in place.

    Args:
        model: a causal language model.
        blocks: its decoder blocks, first to last.
        windows: token ids, `[batch, tokens]` each.
        prune: `(weight [out, in], X^T X [in, in]) -> pruned weight`.
    """
    model.eval()
    for block in blocks:
        layers = [m for m in block.modules() if isinstance(m, nn.Linear)]
        grams = {m: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for m in layers}

        def catch(module, args, output, grams=grams):
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            grams[module] += x.t() @ x

        handles = [m.register_forward_hook(catch) for m in layers]
        for ids in windows:
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.weight.copy_(prune(layer.weight.clone(), grams[layer]))


def wanda(sparsity: float | None, nm: tuple[int, int] | None = None) -> Prune:
    """Drop the lowest |w| * ||x||: a fixed count of every row, or the rest of every M inputs."""

    def prune(weight: Tensor, gram: Tensor) -> Tensor:
        score = weight.abs() * gram.diagonal().sqrt().float()
        kept, width = nm or (weight.shape[1] - int(sparsity * weight.shape[1]), weight.shape[1])
        runs = score.view(weight.shape[0], -1, width)
        dropped = runs.argsort(dim=-1, stable=True)[..., : width - kept]
        weight.view(runs.shape).scatter_(-1, dropped, 0.0)
        return weight

    return prune


def sparsegpt(
    sparsity: float | None,
    nm: tuple[int, int] | None = None,
    size: int = 128,
    damping: float = 0.01,
) -> Prune:
    """Optimal brain surgeon, column by column, updates applied at once to all later ones."""

    def prune(weight: Tensor, gram: Tensor) -> Tensor:
        dtype, weight, hessian = weight.dtype, weight.double(), gram.clone()
        rows, columns = weight.shape
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1
        weight[:, dead] = 0
        hessian += damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
        factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).t()
        mask = torch.zeros(rows, columns, dtype=torch.bool)
        for j in range(columns):
            if nm is None and j % size == 0:
                ahead = slice(j, min(j + size, columns))
                score = (weight[:, ahead] / factor.diagonal()[ahead]) ** 2
                order = score.flatten().argsort(stable=True)
                part = torch.zeros(score.numel(), dtype=torch.bool)
                part[order[: int(sparsity * score.numel())]] = True
                mask[:, ahead] = part.view(score.shape)
            if nm is not None and j % nm[1] == 0:
                ahead = slice(j, j + nm[1])
                score = (weight[:, ahead] / factor.diagonal()[ahead]) ** 2
                order = score.argsort(dim=1, stable=True)[:, : nm[1] - nm[0]]
                mask[:, ahead] = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)
            removed = torch.where(mask[:, j], weight[:, j], 0.0) / factor[j, j]
            weight[:, j + 1 :] -= removed[:, None] * factor[j, j + 1 :]
            weight[mask[:, j], j] = 0
        return weight.to(dtype)

    return prune
