"""What a cut channel still said on average, moved into what follows.

A channel that leaves a layer's input takes W[:, c] E[x_c] with it. Added to the layer's bias (or
taken from the running mean of a batch norm that reads its output) this is exact where the channel
is constant (a batch norm with scale 0 emits act(beta)), up to the zero padding of a convolution,
and the best constant otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparseworks.models.calls import Batch, call, split
from sparseworks.models.coupling import Coupling
from sparseworks.weights.structured.cutting import Backup
from sparseworks.weights.structured.scores import input_moments

__all__ = ["fold"]


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
        labels = coupling.axes.get((f"{name}.weight", 1))
        if labels is None or keep[labels].all():
            continue
        module = model.get_submodule(name)
        gone = torch.as_tensor(~keep[labels], device=mean.device)
        if exact_only:
            spread = (square - mean.square()).clamp_min(0).sqrt()
            gone &= spread <= 1e-5 * mean.abs().clamp_min(1e-6)
        weight: Tensor = module.weight  # type: ignore[assignment]
        columns = weight.double().flatten(2).sum(2) if weight.ndim > 2 else weight.double()
        shift = columns @ (mean * gone)
        if module.bias is not None:
            _replace(module, "bias", module.bias + shift.to(weight.dtype), backup, True)  # type: ignore[operator]
        elif (norm := norms.get(name)) is not None and norm.running_mean is not None:
            _replace(norm, "running_mean", norm.running_mean - shift.to(weight.dtype), backup)
        else:
            continue
        folded += 1
    return folded


def _replace(
    module: nn.Module, name: str, value: Tensor, backup: Backup, parameter: bool = False
) -> None:
    """Write in place; the values before are kept beside it."""
    tensor: Tensor = getattr(module, name)
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
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        call(model, split(batch)[0])
    finally:
        for handle in handles:
            handle.remove()
        for m, was in training.items():
            m.training = was
    return found
