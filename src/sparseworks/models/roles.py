"""What part a parameter plays in a model, and so why it may stay dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import Tensor, nn

from sparseworks.models.hooks import hook_of
from sparseworks.models.recurrence import RECURRENT

__all__ = ["ADAPTER", "Adapters", "is_bare", "is_router", "matches", "output_head", "why_dense"]

ADAPTER = "an adapter, not a weight of the model"
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def matches(name: str, pattern: str) -> bool:
    """Shell-style match on the parameter name, its module's name, or one of their parents."""
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


class Adapters:
    """Which parameters of a model are adapters, trained beside frozen weights.

    Known by what PEFT's layers say of themselves (`adapter_layer_names`), and by names (`lora_A`).
    """

    def __init__(self, model: nn.Module) -> None:
        said = ((n, getattr(m, "adapter_layer_names", ())) for n, m in model.named_modules())
        self._layers = {n: frozenset(a) for n, a in said if isinstance(a, (tuple, list)) and a}

    def part(self, name: str) -> int | None:
        """Which of the dotted parts of a parameter's name makes it an adapter's, or None."""
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.startswith("lora_") or part in self._layers.get(".".join(parts[:i]), ()):
                return i
        return None

    def named(self, name: str, patterns: Iterable[str]) -> bool:
        """Does a pattern mean this adapter: would it not match without the adapter's own name?

        "*q_proj*" means the weight of the model there, "*lora_A*" the adapter.
        """
        place = self.part(name)
        if place is None:
            return False
        parts = name.split(".")
        without = ".".join(parts[:place] + parts[place + 1 :])
        return any(matches(name, p) and not matches(without, p) for p in patterns)


def is_bare(name: str, module: nn.Module, attribute: str) -> bool:
    """Is it a parameter that a module, none of torch's own, uses by itself?"""
    return not _known(name, module, attribute)


def why_dense(name: str, module: nn.Module, attribute: str) -> str:
    """Why a parameter that is not the weight of a known layer is left dense."""
    return _known(name, module, attribute) or (
        f"a bare parameter of {type(module).__name__}; `prune` takes it where include= names it "
        "and data= shows that it is multiplied"
    )


def _known(name: str, module: nn.Module, attribute: str) -> str:
    tool = hook_of(module, attribute)
    if tool == "prune":
        return "pruned with torch.nn.utils.prune; sparseworks.fold_torch_masks takes its mask over"
    if tool:
        return (
            f"under torch.nn.utils.{tool}, which rescales what is kept; fold it with "
            f"torch.nn.utils.remove_{tool} first"
        )
    owner, parametrized, computed = f".{name}".partition(".parametrizations.")
    if parametrized:
        weight = f"{owner}.{computed.split('.')[0]}".lstrip(".")
        return f"{weight} is computed from it (reparametrized); remove the parametrization first"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "an embedding"
    if type(module).__module__.startswith("torch.nn.modules"):
        container = isinstance(module, (nn.ParameterList, nn.ParameterDict))
        return "" if container else f"nn.{type(module).__name__} has no matrix view here"
    return ""


def is_router(name: str) -> bool:
    """Is the parameter of this name the weight of a router of a mixture of experts?"""
    owner, _, attribute = name.rpartition(".")
    owner = owner.split(".")[-1] if attribute in ("weight", "weight_orig") else ""
    return owner in {"gate", "router", "wg", "shared_expert_gate"} or "router" in owner


def output_head(model: nn.Module, adapters: Adapters) -> Tensor | None:
    """The weight of the output head, by the model's own word or as the last Linear."""
    layers = [
        (n, m)
        for n, m in model.named_modules()
        if isinstance(m, (*_PLAIN, *RECURRENT)) and adapters.part(n) is None
    ]
    unwrap = getattr(model, "get_base_model", None)  # adapters round a model
    core = unwrap() if callable(unwrap) else model
    get = getattr(core, "get_output_embeddings", None)
    if callable(get):
        try:
            found = get()
        except (NotImplementedError, AttributeError):
            found = None
        if found is not None and hasattr(found, "weight"):
            held = _weight_of(found)
            weight: Tensor = found.weight if held is None else held
            return weight
        base = getattr(core, "base_model", core)
        if base is core:
            return None
        inside = {id(m) for m in base.modules()}
        outside = [m for _, m in layers if isinstance(m, _PLAIN) and id(m) not in inside]
        return _weight_of(outside[-1]) if outside else None
    if len(layers) < 2 or not isinstance(layers[-1][1], nn.Linear):
        return None
    name, last = layers[-1]
    return None if _in_repeated_block(model, name) else _weight_of(last)


def _weight_of(layer: nn.Module) -> Tensor | None:
    """The parameter that a layer's weight is, or is computed from by torch's pruning."""
    held = layer._parameters
    return held["weight"] if "weight" in held else held.get("weight_orig")


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
