"""An Adam step with a place to enter: what moves the weights, and what the second moment sees.

    m <- b1 m + (1 - b1) g
    u  = direction(m)                                 m itself: plain momentum
    v <- b2 v + (1 - b2) u^2                          of u, not of g
    W <- W - lr u / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

It reads its settings from a parameter group of `torch.optim.Adam` or `AdamW` and keeps its state
where these do, so that their `state_dict` saves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparseworks.core.errors import InvalidArgument

__all__ = ["adam_step", "check_adam"]


def check_adam(method: str, optimizers: Iterable[Optimizer]) -> None:
    """Raise unless every optimizer is Adam or AdamW.

    Raises:
        InvalidArgument: another optimizer, or one with `amsgrad` or `maximize`.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise InvalidArgument(
                f"{method}: its rule is a variant of Adam, and {type(optimizer).__name__} is none; "
                "use torch.optim.AdamW"
            )
        for group in optimizer.param_groups:
            if group.get("amsgrad") or group.get("maximize"):
                raise InvalidArgument(f"{method}: its rule knows no amsgrad and no maximize")


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    group: Mapping[str, Any],
    direction: Callable[[Tensor], Tensor],
) -> None:
    """Step a weight in place.

    Args:
        weight: W.
        gradient: g, of W's shape.
        state: of this parameter: `step`, `exp_avg` and `exp_avg_sq`, made where they are missing.
        group: `lr`, `betas`, `eps`, `weight_decay` (decoupled as in AdamW, else added to g).
        direction: u from m; may return m itself, and must not change it.
    """
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(weight)
        state["exp_avg_sq"] = torch.zeros_like(weight)
    state["step"] += 1
    step, (beta1, beta2) = float(state["step"]), group["betas"]
    lr, decay = float(group["lr"]), group["weight_decay"]
    if decay and group.get("decoupled_weight_decay"):
        weight.mul_(1 - lr * decay)
    elif decay:
        gradient = gradient.add(weight, alpha=decay)
    momentum, square = state["exp_avg"], state["exp_avg_sq"]
    momentum.lerp_(gradient, 1 - beta1)
    moved = direction(momentum)
    square.mul_(beta2).addcmul_(moved, moved, value=1 - beta2)
    size = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    weight.addcdiv_(moved, size, value=-lr / (1 - beta1**step))
