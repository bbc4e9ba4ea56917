"""One 2-D view `[out, in]` of every weight that can be sparse.

Whatever a parameter is (Linear, convolution, transposed Conv1D, packed in-projection, bank of
experts), patterns, scores and kernels see a matrix whose rows are outputs and whose columns are
inputs. Parameters that hold several matrices with inputs of their own stack them along the rows:
`groups` of them, each with its own evidence.

| parameter | shape | matrix | groups | run |
| --- | --- | --- | --- | --- |
| Linear | [out, in] | [out, in] | 1 | in |
| HF Conv1D | [in, out] | [out, in] | 1 | in |
| Conv1d/2d/3d | [out, in/g, k...] | [out, k... * in/g] (channels fastest) | g | in/g |
| in-projection | [3 e, e] | [3 e, e] | 3 | e |
| experts | [E, out, in] or [E, in, out] | [E * out, in] | E | in |
| RNN, LSTM, GRU, their cells | [gates * hidden, in] | as it is | 1 | in |

`run` is how many consecutive columns belong together: N:M and blocks may not cross it. A hidden
unit of a recurrent layer is a row in every gate: patterns of rows move all (`View.fitted`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sparseworks.core.budgets import TensorSpec
from sparseworks.core.patterns import Group, Pattern
from sparseworks.models.hooks import refresh, torch_mask
from sparseworks.models.recurrence import gates_of, is_weight

__all__ = ["Layout", "View", "as_matrix", "of_matrix", "parameters_of", "plain_view", "view_of"]

Layout = Literal[
    "linear", "transposed", "conv", "packed", "experts", "experts_transposed", "recurrent"
]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class View:
    """A parameter seen as a matrix `[groups * out, in]`.

    Args:
        name: qualified parameter name ("encoder.layer.0.attention.self.query.weight").
        module: the module that owns the parameter.
        attribute: the parameter's name in it.
        layout: how the parameter's axes map to the matrix.
        groups: matrices stacked along the rows, each with its own inputs.
    """

    name: str
    module: nn.Module
    attribute: str
    layout: Layout
    groups: int = 1

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now (wrappers and `.to()` may have replaced it).

        Of a reparametrized tensor, the one that its parametrization starts from.
        """
        parameter = self.module._parameters.get(self.attribute)
        if parameter is None:
            parameter = self.module.parametrizations[self.attribute].original  # type: ignore[index,union-attr]
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def module_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def torch_mask(self) -> Tensor | None:
        """The bool mask that `torch.nn.utils.prune` keeps beside the parameter, or None."""
        return torch_mask(self.module, self.attribute)

    def within(self, twin: nn.Module) -> View:
        """The same view of a copy of the model."""
        return replace(self, module=twin.get_submodule(self.module_name))

    @property
    def shape(self) -> tuple[int, int]:
        """`(rows, columns)` of the matrix."""
        shape = self.parameter.shape
        if self.layout == "transposed":
            return shape[1], shape[0]
        if self.layout == "experts":
            return shape[0] * shape[1], shape[2]
        if self.layout == "experts_transposed":
            return shape[0] * shape[2], shape[1]
        return shape[0], math.prod(shape[1:])

    @property
    def run(self) -> int:
        """Consecutive columns that a group pattern may not cross."""
        return self.parameter.shape[1] if self.layout == "conv" else self.shape[1]

    def matrix(self, tensor: Tensor | None = None) -> Tensor:
        """The matrix of the parameter, or of another tensor of its shape (a mask, a gradient)."""
        return as_matrix(self.parameter.detach() if tensor is None else tensor, self.layout)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A tensor of the parameter's shape from its matrix; the inverse of `matrix`."""
        return of_matrix(matrix, self.parameter.shape, self.layout)

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Put a matrix into the parameter, in its dtype and in place."""
        self.parameter.copy_(self.from_matrix(matrix))
        refresh(self.module)

    def fitted(self, pattern: Pattern) -> Pattern:
        """The pattern for this matrix: groups of rows are whole units where a unit has several."""
        gates = self.layout == "recurrent" and not self.attribute.startswith("weight_hr")
        if gates and isinstance(pattern, Group) and pattern.axis == "rows":
            return replace(pattern, stride=self.shape[0] // gates_of(self.module))
        return pattern

    def select(self, pattern: Pattern, scores: Tensor, keep: int | None) -> Tensor:
        """The mask, of the parameter's shape, with the `keep` best units of the matrix `scores`."""
        return self.from_matrix(self.fitted(pattern).select(scores, keep)).contiguous()

    def spec(self, pattern: Pattern) -> TensorSpec:
        """What a budget needs to know of this tensor."""
        return TensorSpec(self.name, tuple(self.parameter.shape), self.shape, self.fitted(pattern))


def as_matrix(t: Tensor, layout: Layout) -> Tensor:
    """The matrix of a tensor of a parameter's shape."""
    if layout == "transposed":
        return t.t()
    if layout == "conv":
        return t.movedim(1, -1).reshape(t.shape[0], -1)
    if layout == "experts":
        return t.reshape(-1, t.shape[-1])
    if layout == "experts_transposed":
        return t.transpose(1, 2).reshape(-1, t.shape[1])
    return t


def of_matrix(matrix: Tensor, shape: Sequence[int], layout: Layout) -> Tensor:
    """A tensor of this shape from its matrix; the inverse of `as_matrix`."""
    if layout == "transposed":
        return matrix.t()
    if layout == "conv":
        return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    if layout == "experts":
        return matrix.reshape(tuple(shape))
    if layout == "experts_transposed":
        return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)
    return matrix


def view_of(module: nn.Module, attribute: str, name: str) -> View | None:
    """The 2-D view of one parameter of a module, or None when it has none."""
    parameter = module._parameters.get(attribute)
    if parameter is None:
        return None
    kind = type(module).__name__
    of = attribute if torch_mask(module, attribute) is None else attribute.removesuffix("_orig")
    if of == "weight":
        if isinstance(module, nn.Linear):
            return View(name, module, attribute, "linear")
        if isinstance(module, _CONVOLUTIONS):
            return View(name, module, attribute, "conv", module.groups)
        if kind == "Conv1D" and parameter.ndim == 2 and hasattr(module, "nf"):
            return View(name, module, attribute, "transposed")
    if isinstance(module, nn.MultiheadAttention):
        if of == "in_proj_weight":
            return View(name, module, attribute, "packed", 3)
        if of in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return View(name, module, attribute, "linear")
    if is_weight(module, of):
        return View(name, module, attribute, "recurrent")
    if parameter.ndim == 3 and _is_expert_bank(module):
        layout: Layout = (
            "experts_transposed" if _experts_transposed(module, attribute) else "experts"
        )
        return View(name, module, attribute, layout, parameter.shape[0])
    return None


def plain_view(name: str, module: nn.Module, attribute: str) -> View:
    """Any parameter as a matrix with a row for each entry of its first axis."""
    parameter = module._parameters[attribute]
    assert parameter is not None
    return View(name, module, attribute, "linear" if parameter.ndim < 3 else "conv")


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(full name, module, attribute, parameter), tied ones under every name."""
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield (
                    (f"{prefix}.{attribute}" if prefix else attribute),
                    module,
                    attribute,
                    parameter,
                )


def _is_expert_bank(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower() or hasattr(module, "num_experts")


def _experts_transposed(module: nn.Module, attribute: str) -> bool:
    """True for banks stored [experts, in, out]."""
    known = getattr(module, "is_transposed", None)
    if known is not None:
        return bool(known)
    hidden = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None)
    _, first, last = module._parameters[attribute].shape  # type: ignore[union-attr]
    if hidden is None or first == last:
        return False
    narrows = "down" in attribute or attribute in ("w2", "wo")
    return bool(first != hidden if narrows else first == hidden)
