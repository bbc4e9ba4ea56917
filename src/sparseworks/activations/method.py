"""The contract of methods that make activations sparse, and the part that those by inputs share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from sparseworks.activations.calibrating import Family, Job, Reader, quantile
from sparseworks.activations.rotation import RotatedGate, rotations
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.core.registry import MethodInfo
from sparseworks.models.active import ActiveInputs, Gate, InputGate
from sparseworks.models.matrix import View

__all__ = ["ActivationMethod", "ByInputs", "InputMethod", "column_norms",
           "gated_mlps", "mlp_ends"]  # fmt: skip

_ENDS = ("down_proj", "down", "fc2", "c_proj", "dense_4h_to_h", "w2")


class ActivationMethod(ABC):
    """What `sparse_activations` calls."""

    info: ClassVar[MethodInfo]
    layouts: ClassVar[tuple[str, ...]] = ("linear", "transposed")
    """Of the layers that may take part."""

    @abstractmethod
    def gates(self, job: Job) -> dict[str, Gate]:
        """A gate for each module that takes part, by its name; nothing is changed.

        Raises:
            ModelError: a model that has not what the method needs.
        """


class InputMethod(ActivationMethod):
    """Methods that set inputs of linear layers to 0, each by a rule of its own."""

    together: ClassVar[bool] = False

    @abstractmethod
    def family(self, reader: Reader) -> Family:
        """The gates of a layer for every sparsity."""

    def families(self, job: Job) -> dict[tuple[str, ...], Family]:
        found: dict[tuple[str, ...], Family] = {}

        def visit(reader: Reader) -> None:
            found[reader.names] = self.family(reader)

        job.each(self.as_one(), visit)
        return found

    def as_one(self) -> bool:
        """Whether layers that read the same inputs share a rule."""
        return self.together

    def gates(self, job: Job) -> dict[str, Gate]:
        families = self.families(job)
        return {n: family(job.sparsity) for ns, family in families.items() for n in ns}


@dataclass(frozen=True)
class ByInputs(InputMethod):
    """Inputs of smallest |x_i| w_i are set to 0, for a weight w of each input.

    Args:
        select: "threshold": a quantile of all calibration values, so that tokens differ in how
            many inputs they keep; "top-k": the floor(n (1 - s)) largest of each token.
        per: "matrix": every linear layer has a rule of its own; "input": those that read the same
            inputs share one, as a decoder needs that reads their columns together.
        rotate: turn inputs first (see `rotation`).
    """

    select: Literal["threshold", "top-k"] = "threshold"
    per: Literal["matrix", "input"] = "matrix"
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.select not in ("threshold", "top-k"):
            raise InvalidArgument(f"select={self.select!r}: use 'threshold' or 'top-k'")
        if self.per not in ("matrix", "input"):
            raise InvalidArgument(f"per={self.per!r}: use 'matrix' or 'input'")

    def as_one(self) -> bool:
        return self.per == "input"

    @abstractmethod
    def weight(self, reader: Reader) -> Tensor | None:
        """w `[in]`, or None for 1."""

    def families(self, job: Job) -> dict[tuple[str, ...], Family]:
        if not self.rotate:
            return super().families(job)
        turns = rotations(job)
        found: dict[tuple[str, ...], Family] = {}

        def visit(reader: Reader) -> None:
            turn = turns.get(reader.names[0])
            if turn is None:
                found[reader.names] = self._family(reader.inputs, None, None)
                return
            turned = Reader(reader.names, reader.weight @ turn.matrix, reader.inputs @ turn.matrix)
            weight = self.weight(turned) if turn.leader in reader.names else None
            found[reader.names] = self._family(turned.inputs, weight, turn.matrix)

        job.each(self.as_one(), visit)
        return found

    def family(self, reader: Reader) -> Family:
        return self._family(reader.inputs, self.weight(reader), None)

    def _family(self, inputs: Tensor, weight: Tensor | None, turn: Tensor | None) -> Family:
        score = ActiveInputs(weight=weight).score(inputs)

        def gate(sparsity: float) -> Gate:
            rule = self.rule(score, weight, sparsity)
            return InputGate(rule) if turn is None else RotatedGate(rule, turn)

        return gate

    def rule(self, score: Tensor, weight: Tensor | None, sparsity: float) -> ActiveInputs:
        share = 1.0 - sparsity
        if self.select == "top-k":
            keep = max(1, int(score.shape[1] * share + 1e-9))
            return ActiveInputs(keep=keep, weight=weight, share=keep / score.shape[1])
        threshold = quantile(score, sparsity)
        found = float((score > threshold).float().mean())
        return ActiveInputs(threshold=threshold, weight=weight, share=found)


def column_norms(weight: Tensor) -> Tensor:
    """||W_:,i||_2 `[in]`."""
    norms: Tensor = weight.float().norm(dim=0)
    return norms


def mlp_ends(job: Job) -> list[View]:
    """The last matrix of every MLP, by its name.

    Raises:
        ModelError: no name tells one.
    """
    found = [v for v in job.views if v.module_name.rpartition(".")[2] in _ENDS]
    if not found:
        raise ModelError(f"no layer named as one of {', '.join(_ENDS)} ends an MLP here")
    return found


def gated_mlps(model: nn.Module) -> list[tuple[str, str]]:
    """(activation module, up projection) of every gated MLP, by name.

    Raises:
        ModelError: there is none.
    """
    found = []
    for name, module in model.named_modules():
        act = getattr(module, "act_fn", None)
        if (
            isinstance(act, nn.Module)
            and hasattr(module, "gate_proj")
            and hasattr(module, "up_proj")
        ):
            found.append((f"{name}.act_fn".lstrip("."), f"{name}.up_proj".lstrip(".")))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no gated MLP with modules gate_proj, up_proj and act_fn"
        )
    return found
