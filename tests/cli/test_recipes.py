"""Methods as `compare` takes them: alone, with options, and one after the other."""

from __future__ import annotations

import pytest

from sparseworks.cli.recipes import parse_recipe
from sparseworks.core.errors import InvalidArgument

SWEPT = {"sparsity": ("0.5", "0.7", "2:4"), "flops": (0.8, 0.6), "bits": (8, 4)}


@pytest.mark.parametrize(
    ("text", "family", "amounts"),
    [
        ("wanda", "pruning", ["0.5", "0.7", "2:4"]),
        ("wanda:sparsity=0.6", "pruning", [""]),
        ("wanda:pattern=2:4", "pruning", [""]),
        ("group-norm", "slimming", ["flops=0.8", "flops=0.6"]),
        ("group-norm:params=0.5,floor=0.2", "slimming", [""]),
        ("rounding:group=16", "quantization", ["bits=8", "bits=4"]),
        ("wanda+rounding:bits=3", "pruning + quantization", ["0.5", "0.7", "2:4"]),
        ("wanda:pattern=2:4+rounding", "pruning + quantization", ["bits=8", "bits=4"]),
        ("group-norm:flops=0.5+magnitude:sparsity=0.5+rounding",
         "slimming + pruning + quantization", ["bits=8", "bits=4"]),
        ("gqsa:sparsity=0.25", "quantization", ["bits=8", "bits=4"]),
    ],
)  # fmt: skip
def test_what_a_recipe_does_not_tell_is_swept(text: str, family: str, amounts: list[str]) -> None:
    recipe = parse_recipe(text)
    recipe.check(SWEPT)
    assert recipe.family == family
    assert [recipe.amount(a) for a in recipe.amounts(SWEPT)] == amounts


def test_names_of_files_and_lines() -> None:
    recipe = parse_recipe("wanda+rounding:group=16")
    every = recipe.amounts(SWEPT)
    names = [recipe.file_name(a) for a in every]
    assert len(set(names)) == len(every) == 6 and names[0] == "wanda+rounding-group=16-0.5-bits=8"
    assert not any(set(n) & set("/: ,") for n in names) and "2of4" in names[4]
    lines = [recipe.line(a) for a in every]
    assert lines[0] == lines[2] != lines[1] == lines[3]  # a line for each number of bits
    assert lines[4] == lines[5] == ""  # N:M is no number to draw a line over


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wanda+rouding", "unknown method 'rouding'; did you mean 'rounding'"),
        ("wanda+", "none of them empty"),
        ("rounding+wanda", "in this order"),
        ("wanda+magnitude", "at most one method each"),
        ("rigl", "'rigl' is hooked"),
        ("wanda+wgsef", "'wgsef' is train-and-cut"),
        ("components", "'components' is search"),
        ("wanda:power=2", "no option 'power'"),
        ("wanda:sparsity", "wanda:option=value"),
        ("wanda:sparsity=1.5", "not in [0, 1)"),
        ("wanda:pattern=4:2", "4:2"),
        ("wanda+gqsa", "gqsa prunes by itself"),
        ("rounding:bits=99", "bits=99"),
    ],
)
def test_what_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        parse_recipe(text)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "swept", "said"),
    [
        ("rounding", {"bits": (4, 99)}, "bits=99"),
        ("wanda:pattern=row", {"sparsity": ("0.5", "2:4")}, "has a pattern"),
        ("wanda+rounding", {"sparsity": (), "bits": (4,)}, "give --sparsities, or wanda:sparsity="),
        ("rounding", {"bits": ()}, "give --bits, or rounding:bits="),
    ],
)
def test_amounts_that_a_method_does_not_take(text: str, swept: dict, said: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        parse_recipe(text).check(swept)
    assert said in str(error.value)
