"""The layer of all mixtures: router x dispatch x experts x combine.

    y_t = sum over i chosen for t of w_ti E_i(x_t) + s_t E_shared(x_t)

Tokens are sorted by expert and each expert multiplies its own; training and evaluation compute the
same function unless the router has noise or a capacity is asked for. Names of parameters are those
of Mixtral and Qwen2-MoE in transformers (`gate.weight`, `experts.gate_up_proj`,
`experts.down_proj`, `shared_expert`, `shared_expert_gate.weight`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.experts.banks import Experts
from sparseworks.experts.load import Load
from sparseworks.experts.routers import Router
from sparseworks.experts.routing import Routing, limit

__all__ = ["MoE", "mixtures"]


class MoE(nn.Module):
    """A mixture of experts in place of an MLP.

    Args:
        gate: the router.
        experts: the banks.
        shared_expert: an MLP that every token uses besides.
        shared_gate: the shared expert is multiplied by sigmoid of a linear function (Qwen2-MoE).
        capacity: factor of the even load at which experts turn tokens away in training; None: no
            token is dropped.
        eval_capacity: the same in evaluation; None: no token is dropped there.
        renormalize: whether the weights left after a drop keep their sum.
        dense: compute every expert for every token; the same result (see `Experts`).

    Attributes:
        routing: of the last call, with its graph; losses read it.
        load: counts of all calls since `load.reset()`.
        attention: for routers that attend; what calls the layer sets it just before.
    """

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        *,
        shared_expert: nn.Module | None = None,
        shared_gate: bool = False,
        capacity: float | None = None,
        eval_capacity: float | None = None,
        renormalize: bool = False,
        dense: bool = False,
    ) -> None:
        super().__init__()
        if gate.weight.shape[-2:] != (experts.count, experts.width):
            raise InvalidArgument(
                f"a router of shape {tuple(gate.weight.shape)} for {experts.count} experts of "
                f"width {experts.width}"
            )
        for name, given in (("capacity", capacity), ("eval_capacity", eval_capacity)):
            if given is not None and not given > 0:
                raise InvalidArgument(f"{name}={given} must be above 0; None drops no token")
        self.gate, self.experts, self.shared_expert = gate, experts, shared_expert
        self.shared_expert_gate = nn.Linear(experts.width, 1, bias=False) if shared_gate else None
        self.capacity, self.eval_capacity = capacity, eval_capacity
        self.renormalize, self.dense = renormalize, dense
        self.load = Load(experts.count)
        self.routing: Routing | None = None
        self.attention: Tensor | None = None

    @property
    def attends(self) -> bool:
        """Whether `attention` must be set before each call."""
        return self.gate.attends

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to the same shape."""
        attention, self.attention = self.attention, None
        if self.attends and attention is None:
            raise ModelError(
                "this router needs the attention probabilities of the block before, and nothing "
                "gave them: load the model with attn_implementation='eager'"
            )
        routing: Routing = self.gate(x, attention)
        tokens, found = x.reshape(-1, x.shape[-1]), routing.flat()
        factor = self.capacity if self.training else self.eval_capacity
        if factor is not None:
            found = limit(found, factor, renormalize=self.renormalize)
        self.routing = found.shaped(routing.weights.shape)
        self.load.add(found)
        y: Tensor = self.experts(tokens, found, dense=self.dense).to(x.dtype)
        if self.shared_expert is not None:
            common = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                common = common * self.shared_expert_gate(tokens).sigmoid()
            y = y + common
        return y.view(x.shape)

    def __getstate__(self) -> dict[str, Any]:
        # graphs of the last call can be neither copied nor written
        return {**self.__dict__, "routing": None, "attention": None}

    def extra_repr(self) -> str:
        return "" if self.capacity is None else f"capacity={self.capacity}"


def mixtures(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """The mixtures of a model by the names of their modules."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            yield name, module
