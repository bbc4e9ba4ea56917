"""A stage of a recipe as the command that runs it alone, and run as that command runs it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from sparseworks.cli.recipes import Recipe, Stage, parse_amount

__all__ = ["COMMANDS", "apply", "changed", "drawn", "options_of"]

COMMANDS = {"pruning": "prune", "slimming": "slim", "quantization": "quantize"}


def options_of(stage: Stage, options: Any, amounts: Mapping[str, Any], seed: int) -> Any:
    """Of `sparseworks prune`, `slim` or `quantize`; what they measure and where they write is left
    out.

    Args:
        stage: of a recipe.
        options: of `sparseworks compare`.
        amounts: of what is swept.
        seed: of this run.
    """
    from sparseworks.cli import prune, quantize, slim
    from sparseworks.core import registry

    amount: Any = amounts.get(stage.swept or "")
    told = dict(stage.options)
    shared: dict[str, Any] = {
        "method": stage.name, "plugin": options.plugin, "data": options.data,
        "samples": options.samples, "length": options.length, "batch_size": options.batch_size,
        "include": options.include, "exclude": options.exclude, "seed": seed, **stage.call,
    }  # fmt: skip
    if stage.family == "pruning":
        more: dict[str, Any] = parse_amount(amount) if stage.swept else {}
        return prune.Options(
            **shared, **more, dtype=options.dtype, option=_pairs(told),
            skip_indivisible=options.skip_indivisible,
        )  # fmt: skip
    if stage.family == "quantization":
        bits: dict[str, Any] = {"bits": amount} if stage.swept else {}
        return quantize.Options(**shared, **bits, option=_pairs(told))
    target: dict[str, Any] = {"flops": amount} if stage.swept else {}
    if seed and registry.has_option(stage.name, "seed"):
        told.setdefault("seed", seed)
    shape = (options.batch_size, *options.input_shape) if options.input_shape else ()
    return slim.Options(**shared, **target, input_shape=shape, option=_pairs(told))


def _pairs(options: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in options.items())


def drawn(stage: Stage, made: Any, loaded: Any) -> Any:
    """Calibration batches of a stage; of slimming also the example, before them."""
    from sparseworks.cli.preparing import calibration
    from sparseworks.cli.subjects import subject
    from sparseworks.cli.values import parse_options
    from sparseworks.core import registry

    if stage.family == "slimming":
        return subject(loaded, made, registry.build(made.method, **parse_options(made.option)))
    return calibration(loaded, made)


def apply(stage: Stage, made: Any, model: Any, data: Any) -> Any:
    """Change a model; the result has the model, and what was done.

    Args:
        stage: of a recipe.
        made: from `options_of`.
        model: changed in place.
        data: from `drawn`.
    """
    import sparseworks as sw
    from sparseworks.cli.values import parse_options

    only = {"include": made.include or None, "exclude": made.exclude or None}
    extra = parse_options(made.option)
    if stage.family == "pruning":
        return sw.prune(
            model, made.method, sparsity=made.sparsity, pattern=made.pattern, budget=made.budget,
            rounds=made.rounds, recovery=made.recovery, data=data, seed=made.seed,
            skip_indivisible=made.skip_indivisible, **only, **extra,
        )  # fmt: skip
    if stage.family == "quantization":
        if made.bits is not None:
            whole = made.bits == int(made.bits)
            extra["bits"] = int(made.bits) if whole else made.bits
        return sw.quantize(model, made.method, data=data, seed=made.seed, **only, **extra)
    example, batches = data
    return sw.slim(
        model, example, method=made.method, flops=made.flops, params=made.params,
        floor=made.floor, iterations=made.iterations, streams=made.streams, blocks=made.blocks,
        data=batches, **only, **extra,
    )  # fmt: skip


def changed(
    recipe: Recipe, loaded: Any, options: Any, amounts: Mapping[str, Any], seed: int,
    kept: dict[Any, Any],
) -> list[tuple[Stage, Any]]:  # fmt: skip
    """A copy of the model through all stages: each with its result, the last of which has it.

    Args:
        recipe: methods, one after the other.
        loaded: the dense model, which stays as it is.
        options: of `sparseworks compare`.
        amounts: of what is swept.
        seed: of this run.
        kept: calibration data by the name of a method, of this recipe and seed; what is lacking is
            drawn and added.
    """
    model, done = copy.deepcopy(loaded.model), []
    for stage in recipe.stages:
        made = options_of(stage, options, amounts, seed)
        if stage.name not in kept:
            kept[stage.name] = drawn(stage, made, loaded)
        done.append((stage, apply(stage, made, model, kept[stage.name])))
        model = done[-1][1].model
    return done
