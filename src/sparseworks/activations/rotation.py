"""Inputs turned so that a matrix has orthogonal columns: x W^T = (x Q) (W Q)^T, Q orthogonal.

Q holds all right singular vectors of the matrix that leads those which read the same inputs (keys
in attention, gates in an MLP), so that the columns of W Q are orthogonal with norms the singular
values. What is dropped is dropped from x Q: y = (x Q * m) (W Q)^T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.activations.calibrating import Job
from sparseworks.core.errors import ModelError
from sparseworks.models.active import ActiveInputs, RuledGate

__all__ = ["RotatedGate", "Turn", "rotations"]

# the last parts of the names of what leads, as the families of transformers write them
_LEADERS = ("k_proj", "gate_proj", "qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "key",
            "fc1", "c_fc", "dense_h_to_4h", "up_proj")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Turn:
    """Of some inputs: Q `[in, in]` fp32, and the layer whose columns it makes orthogonal."""

    matrix: Tensor
    leader: str


def rotations(job: Job) -> dict[str, Turn]:
    """By the name of each layer that reads turned inputs.

    Raises:
        ModelError: no layer of the model is known to lead others.
    """
    weights = {v.module_name: v for v in job.views}
    found: dict[str, Turn] = {}
    for names in job.shared():
        leader = next((n for end in _LEADERS for n in names if n.rpartition(".")[2] == end), None)
        if leader is None:
            continue
        _, _, right = torch.linalg.svd(weights[leader].matrix().double(), full_matrices=True)
        found |= dict.fromkeys(names, Turn(right.T.float().contiguous(), leader))
    if not found:
        raise ModelError(
            f"rotate: no layer named as one of {', '.join(_LEADERS)} reads inputs here"
        )
    return found


class RotatedGate(RuledGate):
    """Drops entries of turned inputs and turns them back, so that the layer stays as it is."""

    def __init__(self, rule: ActiveInputs, turn: Tensor) -> None:
        super().__init__(rule)
        self.turn = turn

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        turn = self.turn.to(args[0])
        turned = args[0] @ turn
        mask = self.rule.mask(turned)
        self.count(mask)
        return ((turned * mask) @ turn.T, *args[1:])
