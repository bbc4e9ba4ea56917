"""The experts of a mixture, whose weights lie in one bank: each skips the zeros of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.engine.products import SparseLinear
from sparseworks.engine.steps import Call, Ref

__all__ = ["Experts", "with_experts"]

_GROUPED = "aten._grouped_mm.default"
_SPARSE = 0.6  # zeros of a bank, from which on skipping them pays
_ROWS = 16  # that are multiplied at once: few different numbers of rows, few programs


class Experts(Call):
    """y[i] = x[i] W_e^T for the rows i of every expert e, which follow each other.

    The operator of torch that it stands for is what is saved; it runs where a bank has few zeros.

    Args:
        call: of that operator.
        bank: `[experts, outputs, inputs]`.
        name: of the bank.
        sparsity: of the bank.
        threads: of the native kernels.
    """

    def __init__(self, call: Call, bank: Tensor, name: str, sparsity: float, threads: int) -> None:
        super().__init__(call.name, call.target, call.args, call.kwargs)
        self.bank, self.shape = name, tuple(bank.shape)
        self.sparsity = sparsity
        self.experts = [SparseLinear(weight, None, threads) for weight in bank]

    def __call__(self, values: Mapping[str, Any]) -> Tensor:
        x, ends = (values[ref.name] for ref in _operands(self)[::2])
        made: Tensor = x.new_zeros(x.shape[0], self.shape[1])
        start = 0
        for expert, end in zip(self.experts, ends.tolist(), strict=True):
            if end > start:
                own = F.pad(x[start:end], (0, 0, 0, -(end - start) % _ROWS))
                made[start:end] = expert(own)[: end - start]
            start = max(start, end)
        return made

    def line(self) -> str:
        """Of text."""
        shape = "x".join(map(str, self.shape))
        return f"experts {self.bank}: {shape}, each skips its zeros, sparsity {self.sparsity:.3f}"


def with_experts(steps: Sequence[Any], constants: Mapping[str, Tensor], threads: int) -> list[Any]:
    """Steps where banks with enough zeros are run by `Experts`."""
    turned = {
        s.name: s.args[0].name
        for s in steps
        if isinstance(s, Call) and s.target == "aten.transpose.int" and isinstance(s.args[0], Ref)
        and sorted(a % 3 for a in s.args[1:]) == [1, 2]
    }  # fmt: skip
    found = []
    for step in steps:
        grouped = type(step) is Call and step.target == _GROUPED and len(_operands(step)) == 3
        read = _operands(step)[1].name if grouped else ""
        name = turned.get(read, read)
        bank = constants.get(name)
        plain = bank is not None and bank.ndim == 3 and bank.dtype == torch.float32
        sparsity = _zeros(bank) if bank is not None and plain and grouped else 0.0
        if bank is None or sparsity < _SPARSE:
            found.append(step)
            continue
        bank = bank if read in turned else bank.transpose(1, 2).contiguous()
        found.append(Experts(step, bank, name, sparsity, threads))
    return found


def _zeros(bank: Tensor) -> float:
    """Their share."""
    return 1 - int(torch.count_nonzero(bank)) / max(1, bank.numel())


def _operands(call: Call) -> list[Ref]:
    """Rows, bank, and where the rows of each expert end."""
    return [*call.args, *call.kwargs.values()]
