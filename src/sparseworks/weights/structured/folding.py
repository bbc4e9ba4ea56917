"""What a cut channel still said, moved into what follows: on average, or from what stays.

A channel that leaves a layer's input takes W[:, c] E[x_c] with it. Added to the layer's bias (or
taken from the running mean of a batch norm that reads its output) this is exact where the channel
is constant (a batch norm with scale 0 emits act(beta)), up to the zero padding of a convolution,
and the best constant otherwise.

Better than a constant is a linear guess from the channels K that stay at the same position,

    x_c ~ E[x_c] + A_c (x_K - E[x_K]),   A_c = Cov[x_c, x_K] (Cov[x_K] + r I)^-1,

which W[:, K] += W[:, c] A_c makes part of the weights (r is a small share of the mean variance).

Source: the constant is that of Ye et al. 2018, Rethinking the Smaller-Norm-Less-Informative
Assumption; the linear guess is the least-squares idea of He et al. 2017, Channel Pruning for
Accelerating Very Deep Neural Networks, per channel instead of per output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparseworks.models.calls import Batch, call, split
from sparseworks.models.coupling import Coupling
from sparseworks.models.modes import evaluating
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.inputs import input_moments, watch_inputs

__all__ = ["fold", "fold_linear"]

RIDGE = 1e-4


@torch.no_grad()
def fold(
    model: nn.Module,
    coupling: Coupling,
    keep: NDArray[np.bool_],
    data: Iterable[Batch],
    backup: Backup,
    exact_only: bool = False,
) -> int:
    """Fold the means of what will be cut, before it is cut; returns how many layers took some.

    Args:
        model: the model of `coupling`, still whole.
        coupling: its groups.
        keep: True for every group that stays.
        data: batches whose mean activations are folded.
        backup: what was replaced is added here.
        exact_only: fold only channels that are constant over the data.
    """
    batches = list(data)
    norms = _following_norms(model, batches[0])
    folded = 0
    for name, (mean, square) in input_moments(model, batches).items():
        labels = coupling.axes.get((name, 1))
        if labels is None or keep[labels].all():
            continue
        gone = torch.as_tensor(~keep[labels], device=mean.device)
        if exact_only:
            spread = (square - mean.square()).clamp_min(0).sqrt()
            gone &= spread <= 1e-5 * mean.abs().clamp_min(1e-6)
        folded += _shift(_layer(model, name, norms), mean * gone, backup)
    return folded


@torch.no_grad()
def fold_linear(
    model: nn.Module,
    coupling: Coupling,
    keep: NDArray[np.bool_],
    data: Iterable[Batch],
    backup: Backup,
) -> int:
    """Fold the linear guess of what will be cut into weights and biases; arguments as in `fold`.

    Zeros stay zeros. A weight that several modules share is left as it is, and its layer takes the
    means alone; a layer without a bias or a batch norm behind it takes no constant.
    """
    batches = list(data)
    norms = _following_norms(model, batches[0])
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    cut = {
        name: torch.as_tensor(keep[labels])
        for (name, axis), labels in coupling.axes.items()
        if axis == 1 and not keep[labels].all()
    }
    sums: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        new = [x.sum(0), x.T @ x, torch.tensor(float(len(x)))]
        old = sums.get(name)
        sums[name] = new if old is None else [a + b for a, b in zip(old, new)]

    watch_inputs(model, batches, see, cut)
    folded = 0
    for name, (total, square, count) in sums.items():
        layer = _layer(model, name, norms)
        mean, stays = total / count, cut[name].to(total.device)
        weight = layer.weight
        centre = mean if layer.constant is not None else torch.zeros_like(mean)
        moments = square / count - torch.outer(centre, centre)
        inner = moments[stays][:, stays]
        inner += (
            RIDGE
            * inner.diagonal().mean().clamp_min(1e-12)
            * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
        )
        guess = torch.linalg.solve(inner, moments[stays][:, ~stays])  # [kept, gone]
        if uses.count(id(weight)) > 1:
            guess.zero_()
        constant = torch.zeros_like(mean)
        constant[~stays] = centre[~stays] - centre[stays] @ guess
        _shift(layer, constant, backup)
        new = weight.detach().double().movedim(1, -1)
        new[..., stays] += new[..., ~stays] @ guess.T
        new = new.movedim(-1, 1).to(weight.dtype) * (weight != 0)  # masks stay true
        _replace(weight, new, backup)
        folded += 1
    return folded


@dataclass(frozen=True)
class _Layer:
    """A weight, and where a constant goes: `sign` times it, added there; nowhere when None."""

    weight: Tensor
    constant: Tensor | None
    sign: int = 1


def _layer(
    model: nn.Module, name: str, norms: Mapping[str, nn.modules.batchnorm._BatchNorm]
) -> _Layer:
    """The bias of a weight's layer takes constants, or the mean of the next batch norm does."""
    path, _, attribute = name.rpartition(".")
    module, norm = model.get_submodule(path), norms.get(path)
    weight: Tensor = getattr(module, attribute)
    bias = getattr(module, attribute.replace("weight", "bias"), None)
    if bias is None and norm is not None:
        return _Layer(weight, norm.running_mean, -1)
    return _Layer(weight, bias)


def _shift(layer: _Layer, constant: Tensor, backup: Backup) -> bool:
    """Add what constant inputs say to where the layer takes it."""
    if layer.constant is None:
        return False
    weight = layer.weight.double()
    columns = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    shift = (columns @ constant).to(layer.weight.dtype)
    _replace(layer.constant, layer.constant + layer.sign * shift, backup)
    return True


def _replace(tensor: Tensor, value: Tensor, backup: Backup) -> None:
    """Write in place; the values before are kept beside it."""
    backup.values.append((tensor, tensor.detach().clone()))
    tensor.copy_(value)


def _following_norms(
    model: nn.Module, batch: Batch
) -> Mapping[str, nn.modules.batchnorm._BatchNorm]:
    """Convolution or Linear -> the batch norm that reads its output, by watching one pass."""
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, nn.modules.batchnorm._BatchNorm] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):

            def after(m: nn.Module, i: object, output: Tensor, name: str = name) -> None:
                made[id(output)] = (name, output)

            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):

            def before(m: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...]) -> None:
                if id(inputs[0]) in made:
                    found[made[id(inputs[0])][0]] = m

            handles.append(module.register_forward_pre_hook(before))
    try:
        with evaluating(model):
            call(model, split(batch)[0])
    finally:
        for handle in handles:
            handle.remove()
    return found
