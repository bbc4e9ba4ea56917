"""The kinds of methods: what each is written as, what calls it in Python, which command runs it."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, get_args

from sparseworks.core.errors import InvalidArgument

__all__ = ["KINDS", "Contract", "Kind", "MethodInfo", "Need", "base_of", "call_of", "check_kind",
           "check_method", "command_of"]  # fmt: skip

Kind = Literal[
    "one-shot", "search", "staged", "hooked", "transform", "driver", "structured", "train-and-cut",
    "whole-model", "quantization",
    "measurement", "activation", "mixture", "optimizer",
]  # fmt: skip
Need = Literal["data", "loss", "labels", "training"]


@dataclass(frozen=True)
class Contract:
    """What the methods of one kind have in common.

    Args:
        base: "package.module:Class" that each of them derives from.
        call: what runs one in Python; `{name}` and `{cls}` stand for the method.
        command: what runs one on the command line; words in capitals are the user's, and `{data}`
            is `--data DATA` where the method needs data.
    """

    base: str
    call: str
    command: str


KINDS: dict[Kind, Contract] = {
    "one-shot": Contract(
        "sparseworks.weights.oneshot.base:OneShot",
        'sw.prune(model, "{name}", ...)',
        "sparseworks prune MODEL{data} --method {name} --sparsity 0.5 --out OUT",
    ),
    "search": Contract(
        "sparseworks.weights.oneshot.base:Search",
        'sw.prune(model, "{name}", data=..., ...)',
        "sparseworks prune MODEL{data} --method {name} --out OUT",
    ),
    "staged": Contract(
        "sparseworks.weights.oneshot.base:Staged",
        'sw.prune(model, "{name}", ...)',
        "sparseworks prune MODEL{data} --method {name} --sparsity 0.5 --out OUT",
    ),
    "hooked": Contract(
        "sparseworks.training.method:Hooked",
        'sw.sparsify(model, optimizer, "{name}", ...)',
        "sparseworks train MODEL --data DATA --method {name} --sparsity 0.9 --out OUT",
    ),
    "transform": Contract(
        "sparseworks.training.transforming:Transform",
        'sw.transform(model, "{name}", ...)',
        "sparseworks train MODEL --data DATA --method {name} --sparsity 0.9 --out OUT",
    ),
    "driver": Contract(
        "sparseworks.training.driving:Driver",
        'sw.experiment(fit, model, "{name}", ...)',
        "sparseworks tickets MODEL --data DATA --method {name} --sparsity 0.9 --out OUT",
    ),
    "structured": Contract(
        "sparseworks.weights.structured.base:GroupScore",
        'sw.slim(model, example, method="{name}", ...)',
        "sparseworks slim MODEL --data DATA --method {name} --flops 0.5 --out OUT",
    ),
    "train-and-cut": Contract(
        "sparseworks.weights.structured.base:TrainAndCut",
        'sw.slim(model, example, method="{name}", data=..., epochs=...)',
        "sparseworks slim MODEL --data DATA --method {name} --epochs 10 --out OUT",
    ),
    "whole-model": Contract(
        "sparseworks.weights.structured.base:WholeModel",
        'sw.slim(model, example, method="{name}", data=..., ...)',
        "sparseworks slim MODEL --data DATA --method {name} --params 0.8 --out OUT",
    ),
    "quantization": Contract(
        "sparseworks.weights.quantization.method:Quantization",
        'sw.quantize(model, "{name}", ...)',
        "sparseworks quantize MODEL{data} --method {name} --out OUT",
    ),
    "activation": Contract(
        "sparseworks.activations.method:ActivationMethod",
        'sw.sparse_activations(model, "{name}", data=..., ...)',
        "sparseworks activations MODEL{data} --method {name} --sparsity 0.5 --out OUT",
    ),
    "mixture": Contract(
        "sparseworks.experts.method:MixtureMethod",
        'sw.upcycle(model, "{name}", ...)',
        "sparseworks upcycle MODEL{data} --method {name} --out OUT",
    ),
    "optimizer": Contract(
        "sparseworks.training.optimizing:OptimizerMethod",
        'sw.optimizer(model.parameters(), "{name}", lr=...)',
        "sparseworks train MODEL --data DATA --method dense --optimizer {name} --out OUT",
    ),
    "measurement": Contract(
        "sparseworks.diagnostics.measurement:Measurement",
        "sw.methods.{cls}()(...)",
        "",
    ),
}
assert set(KINDS) == set(get_args(Kind))


@dataclass(frozen=True)
class MethodInfo:
    """What the catalogue says of a method.

    Args:
        name: the public string.
        title: title of the paper.
        authors: "First author et al.".
        year: of publication.
        card: number of the method card ("a01"); "" when there is none.
        room: folder of the house.
        kind: how it is written and called; see `KINDS`.
        needs: what the caller must give.
        pattern: default pattern and what else is accepted.
        budget: default budget.
        tensors: default tensors, when not the usual prunable ones.
        cost: what it costs in passes over model or data.
        summary: one line on what it does.
        call: in Python, where it is not that of the kind.
        command: on the command line, where it is not that of the kind.
    """

    name: str
    title: str
    authors: str
    year: int
    room: str
    kind: Kind
    card: str = ""
    needs: tuple[Need, ...] = ()
    pattern: str = "any"
    budget: str = "uniform"
    tensors: str = "default"
    cost: str = ""
    summary: str = ""
    call: str = ""
    command: str = ""


def base_of(kind: Kind) -> type[Any]:
    """The class that methods of a kind derive from."""
    module, _, name = KINDS[kind].base.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found


def call_of(cls: Any) -> str:
    """What runs a method in Python."""
    info: MethodInfo = cls.info
    return info.call or KINDS[info.kind].call.format(name=info.name, cls=cls.__name__)


def command_of(cls: Any) -> str:
    """The command line that runs a method; words in capitals stand for what the user has."""
    from sparseworks.core.patterns import parse_pattern  # not before it is asked for: imports torch

    info: MethodInfo = cls.info
    data = " --data DATA" if "data" in info.needs else ""
    words = KINDS[info.kind].command.format(name=info.name, data=data)
    pattern = getattr(cls(), "pattern", None)
    if pattern is not None and parse_pattern(pattern).fixed_density is not None:
        words = re.sub(r" --sparsity \S+", "", words)  # N:M tells it
    return info.command or words


def check_kind(cls: Any, kinds: tuple[Kind, ...]) -> None:
    """Refuse a class of methods of another kind, and say what runs it.

    Raises:
        InvalidArgument: it derives from none of the bases of these kinds.
    """
    if issubclass(cls, tuple(base_of(k) for k in kinds)):
        return
    wanted = " or ".join(kinds)
    info = getattr(cls, "info", None)
    if isinstance(info, MethodInfo) and info.kind not in kinds:
        raise InvalidArgument(
            f"method {info.name!r} is {info.kind}, not {wanted}: call {call_of(cls)}, or "
            f"`{command_of(cls)}`"
        )
    bases = " or ".join(KINDS[k].base.rpartition(":")[2] for k in kinds)
    raise InvalidArgument(
        f"{cls.__name__} is not a method of kind {wanted}: give a registered name "
        f"(`sparseworks methods`) or an object of a class that derives from {bases}"
    )


def check_method(cls: Any) -> None:
    """Refuse what does not do as a method: the class of a user, or of an installed package.

    Raises:
        InvalidArgument: it is no frozen dataclass, has no `info`, or not the base of its kind.
    """
    if not isinstance(cls, type):
        raise InvalidArgument(f"{cls!r} is no class; a method is a frozen dataclass")
    name, info = cls.__name__, getattr(cls, "info", None)
    if "__dataclass_params__" not in vars(cls) or not is_dataclass(cls):
        raise InvalidArgument(
            f"{name}: is no dataclass; write @dataclass(frozen=True) right above the class"
        )
    if not vars(cls)["__dataclass_params__"].frozen:
        raise InvalidArgument(f"{name}: is not frozen; write @dataclass(frozen=True)")
    if not isinstance(info, MethodInfo):
        raise InvalidArgument(f"{name}: has no `info: ClassVar[MethodInfo] = MethodInfo(...)`")
    if info.kind not in KINDS:
        raise InvalidArgument(
            f"{name}: info.kind is {info.kind!r}; one of {', '.join(map(repr, KINDS))}"
        )
    if not info.name or info.name != "-".join(info.name.split()):
        raise InvalidArgument(f"{name}: info.name is {info.name!r}; a word without spaces")
    if not issubclass(cls, base_of(info.kind)):
        module, _, base = KINDS[info.kind].base.partition(":")
        raise InvalidArgument(
            f"{name}: is {info.kind} and does not derive from {base}; "
            f"write `from {module} import {base}` and `class {name}({base})`"
        )
    if unwritten := sorted(getattr(cls, "__abstractmethods__", ())):
        raise InvalidArgument(f"{name}: lacks the function {unwritten[0]!r} of its base class")
