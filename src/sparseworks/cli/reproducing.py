"""The command lines that make a point of a comparison again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sparseworks.cli.recipes import Recipe
from sparseworks.cli.stages import COMMANDS, options_of

__all__ = ["making", "measuring"]

_ASIDE = {"out": None, "force": False, "resume": False, "share": False, "ray": False, "json": False}
_SWEPT = {"sparsity": "sparsities", "flops": "flops", "bits": "bits"}


def measuring(options: Any, recipe: Recipe, amounts: Mapping[str, Any]) -> str:
    """`sparseworks compare` of this point alone, with all its seeds."""
    from sparseworks.cli.prune import command_of

    plain = type(options)()
    told = {field: getattr(plain, field) for field in _SWEPT.values()}
    told |= {_SWEPT[name]: (value,) for name, value in amounts.items()}
    one = dataclasses.replace(options, methods=(recipe.text,), **told, **_ASIDE)
    return command_of(one, "compare")


def making(options: Any, recipe: Recipe, amounts: Mapping[str, Any], *, folder: bool) -> str | None:
    """The commands that write the model of the first seed; None where no commands do, because a
    later one cannot read what an earlier one writes (weights of a model that the user's own code
    builds), or does not take the dtype.

    Args:
        options: of `sparseworks compare`.
        recipe: methods, one after the other.
        amounts: of what is swept.
        folder: models are written as folders of Hugging Face.
    """
    from sparseworks.cli.prune import command_of

    alone = len(recipe.stages) == 1
    slimmed = any(s.family == "slimming" for s in recipe.stages)
    if not (alone or folder or (options.model.endswith(".safetensors") and not slimmed)):
        return None
    if options.dtype not in (None, "fp32") and {s.family for s in recipe.stages} != {"pruning"}:
        return None
    source, words = options.model, []
    for stage in recipe.stages:
        made = options_of(stage, options, amounts, options.seeds[0])
        out = recipe.file_name(amounts)
        out += "" if stage is recipe.stages[-1] else f".{stage.family}"
        if alone and stage.family != "slimming":  # else what it starts from is not the dense model
            made = dataclasses.replace(
                made, metric=() if options.metric is None else (options.metric,),
                eval_data=options.eval_data, eval_samples=options.eval_samples,
            )  # fmt: skip
        words.append(
            command_of(dataclasses.replace(made, model=source, out=out), COMMANDS[stage.family])
        )
        written = "model" if stage.family == "slimming" else "checkpoint"
        source = f"{out}/{written if folder else 'model.safetensors'}"
    return " && ".join(words)
