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

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sparseworks.core.budgets import TensorSpec
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.patterns import Group, Pattern
from sparseworks.models.recurrence import RECURRENT, gates_of

__all__ = ["Prunable", "Skipped", "View", "find_prunable", "view_of"]

Layout = Literal[
    "linear", "transposed", "conv", "packed", "experts", "experts_transposed", "recurrent"
]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, *RECURRENT)


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
        t = self.parameter.detach() if tensor is None else tensor
        if self.layout == "transposed":
            return t.t()
        if self.layout == "conv":
            return t.movedim(1, -1).reshape(t.shape[0], -1)
        if self.layout == "experts":
            return t.reshape(-1, t.shape[-1])
        if self.layout == "experts_transposed":
            return t.transpose(1, 2).reshape(-1, t.shape[1])
        return t

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A tensor of the parameter's shape from its matrix; the inverse of `matrix`."""
        shape = self.parameter.shape
        if self.layout == "transposed":
            return matrix.t()
        if self.layout == "conv":
            return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        if self.layout == "experts":
            return matrix.reshape(shape)
        if self.layout == "experts_transposed":
            return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)
        return matrix

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Put a matrix into the parameter, in its dtype and in place."""
        self.parameter.copy_(self.from_matrix(matrix))

    def fitted(self, pattern: Pattern) -> Pattern:
        """The pattern for this matrix: groups of rows are whole units where a unit has several."""
        gates = self.layout == "recurrent" and not self.attribute.startswith("weight_hr")
        if gates and isinstance(pattern, Group) and pattern.axis == "rows":
            return replace(pattern, stride=self.shape[0] // gates_of(self.module))
        return pattern

    def select(self, pattern: Pattern, scores: Tensor, keep: int) -> Tensor:
        """The mask, of the parameter's shape, with the `keep` best units of the matrix `scores`."""
        return self.from_matrix(self.fitted(pattern).select(scores, keep)).contiguous()

    def spec(self, pattern: Pattern) -> TensorSpec:
        """What a budget needs to know of this tensor."""
        return TensorSpec(self.name, tuple(self.parameter.shape), self.shape, self.fitted(pattern))


@dataclass(frozen=True)
class Skipped:
    """A weight that is left dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Prunable(Sequence[View]):
    """The prunable weights of a model in module order, and those left out with the reason."""

    views: tuple[View, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> View:  # type: ignore[override]
        return self.views[index]

    def __iter__(self) -> Iterator[View]:
        return iter(self.views)

    def by_name(self) -> dict[str, View]:
        return {v.name: v for v in self.views}


def view_of(module: nn.Module, attribute: str, name: str) -> View | None:
    """The 2-D view of one parameter of a module, or None when it has none."""
    parameter = module._parameters.get(attribute)
    if parameter is None:
        return None
    kind = type(module).__name__
    if attribute == "weight":
        if isinstance(module, nn.Linear):
            return View(name, module, attribute, "linear")
        if isinstance(module, _CONVOLUTIONS):
            return View(name, module, attribute, "conv", module.groups)
        if kind == "Conv1D" and parameter.ndim == 2 and hasattr(module, "nf"):
            return View(name, module, attribute, "transposed")
    if isinstance(module, nn.MultiheadAttention):
        if attribute == "in_proj_weight":
            return View(name, module, attribute, "packed", 3)
        if attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            return View(name, module, attribute, "linear")
    if isinstance(module, RECURRENT) and attribute.startswith("weight_"):
        return View(name, module, attribute, "recurrent")
    if parameter.ndim == 3 and _is_expert_bank(module):
        layout: Layout = (
            "experts_transposed" if _experts_transposed(module, attribute) else "experts"
        )
        return View(name, module, attribute, layout, parameter.shape[0])
    return None


def find_prunable(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    embeddings: bool = False,
) -> Prunable:
    """The weights a method may make sparse, each parameter once.

    By default every Linear, Conv1d/2d/3d, HF Conv1D, RNN, LSTM, GRU (and cells), attention
    in-projection and expert bank; not embeddings (nor what is tied to them), not the output head,
    not MoE routers, norms or biases.

    Args:
        model: any module.
        include: name patterns (shell style, on parameter or module names); only these, and these
            even where the default leaves them out.
        exclude: name patterns to leave out.
        embeddings: embedding tables count as well, `[entries, width]`.

    Raises:
        InvalidArgument: a name pattern matches no weight.
        ModelError: nothing is left to prune.
    """
    include, exclude = _patterns(include), _patterns(exclude)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = _output_head(model)
    candidates, unseen = [], {*include, *exclude}
    views: list[View] = []
    skipped: list[Skipped] = []
    seen: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            view = view_of(module, attribute, name) if parameter is not None else None
            if embeddings and isinstance(module, nn.Embedding):
                view = View(name, module, attribute, "linear")
            if view is None:
                continue
            candidates.append(name)
            unseen -= {p for p in unseen if _matches(name, p)}
            asked = any(_matches(name, p) for p in include)
            reason = ""
            if id(parameter) in seen:
                reason = f"the same tensor as {seen[id(parameter)]}, which is treated once"
            elif any(_matches(name, p) for p in exclude):
                reason = "excluded by name"
            elif include and not asked:
                reason = "not included by name"
            elif not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2:
                reason = f"quantized ({parameter.dtype})"
            elif id(parameter) in tables and not asked and not embeddings:
                reason = "tied to an embedding"
            elif parameter is head and not asked:
                reason = "output head"
            elif _is_router(name, module) and not asked:
                reason = "router of a mixture of experts"
            elif parameter.device.type == "meta":
                reason = "on the meta device: it has no values"
            if not reason:
                seen[id(parameter)] = name
                views.append(view)
            elif not (include and reason == "not included by name"):
                skipped.append(Skipped(name, reason))
        skipped += _reparametrized(prefix, module)
    if unseen:
        known = ", ".join(candidates[:3]) + (", ..." if len(candidates) > 3 else "")
        raise InvalidArgument(
            f"name pattern {sorted(unseen)[0]!r} matches no weight; weights are named like {known}"
        )
    if not views:
        reasons = (
            "; ".join(f"{s.name}: {s.reason}" for s in skipped[:3]) or "no Linear, Conv or RNN"
        )
        raise ModelError(f"{type(model).__name__} has no prunable weight ({reasons})")
    return Prunable(tuple(views), tuple(skipped))


def _patterns(given: str | Iterable[str] | None) -> list[str]:
    if given is None:
        return []
    return [given] if isinstance(given, str) else list(given)


def _matches(name: str, pattern: str) -> bool:
    """Shell-style match on the parameter name, its module's name, or one of their parents."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


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


def _is_router(name: str, module: nn.Module) -> bool:
    owner = name.split(".")[-2] if "." in name else ""
    return owner in {"gate", "router", "wg", "shared_expert_gate"} or "router" in owner


def _output_head(model: nn.Module) -> Tensor | None:
    """The weight of the output head, by the model's own word or as the last Linear."""
    get = getattr(model, "get_output_embeddings", None)
    if callable(get):
        try:
            found = get()
        except (NotImplementedError, AttributeError):
            found = None
        if found is not None and hasattr(found, "weight"):
            weight: Tensor = found.weight
            return weight
        base = getattr(model, "base_model", model)
        if base is model:
            return None
        inside = {id(m) for m in base.modules()}
        kinds = (nn.Linear, *_CONVOLUTIONS)
        outside = [m for m in model.modules() if isinstance(m, kinds) and id(m) not in inside]
        return outside[-1].weight if outside else None
    leaves = [(n, m) for n, m in model.named_modules() if isinstance(m, _LAYERS)]
    if len(leaves) < 2:
        return None
    name, last = leaves[-1]
    if not isinstance(last, nn.Linear):
        return None
    return None if _in_repeated_block(model, name) else last.weight


def _in_repeated_block(model: nn.Module, name: str) -> bool:
    """Does the path pass through a list of two or more composite children of one class?"""
    module = model
    for part in name.split(".")[:-1]:
        children = list(module.children())
        child = getattr(module, part)
        alike = [c for c in children if type(c) is type(child) and any(True for _ in c.children())]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(alike) > 1:
            return True
        module = child
    return isinstance(module, nn.MultiheadAttention)


def _reparametrized(prefix: str, module: nn.Module) -> list[Skipped]:
    if not hasattr(module, "parametrizations") or not isinstance(
        module, (*_LAYERS, nn.MultiheadAttention)
    ):
        return []
    return [
        Skipped(f"{prefix}.{a}", "reparametrized; remove the parametrization first")
        for a in module.parametrizations  # type: ignore[union-attr]
    ]
