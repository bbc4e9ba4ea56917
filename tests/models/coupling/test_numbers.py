"""Laws of followed numbers: they count like ints, and tell what their attributes must become."""

from __future__ import annotations

import copy
import pickle

from hypothesis import given
from hypothesis import strategies as st

from sparseworks.models.coupling.numbers import (
    Attribute,
    Number,
    attributes,
    evaluate,
    solved,
)

SIGNS = ["+", "-", "*", "//", "r+", "r-", "r*", "r//", "neg"]
SOURCE = object()


def number(name: str, value: int) -> Number:
    return Number.of(value, Attribute("block", name, None, value), SOURCE)


def apply(x: int, sign: str, other: int) -> int:
    if sign == "neg":
        return -x
    a, b = (other, x) if sign.startswith("r") else (x, other)
    sign = sign.lstrip("r")
    if sign == "//" and b == 0:
        return a
    return {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "//" else a // b


steps = st.lists(st.tuples(st.sampled_from(SIGNS), st.integers(1, 9)), max_size=4)


@given(st.integers(1, 64), st.integers(1, 64), steps)
def test_a_formula_makes_what_the_arithmetic_made(value: int, other: int, steps: list) -> None:
    x, plain, second = number("a", value), value, number("b", other)
    for sign, n in steps:
        x, plain = apply(x, sign, n), apply(plain, sign, n)
    x, plain = apply(x, "+", second), plain + other
    assert x == plain
    values = {a: a.value for a in attributes(x.formula)}
    assert evaluate(x.formula, values) == plain


@given(
    st.lists(st.tuples(st.sampled_from(["+", "-", "*", "r+", "r-", "neg"]), st.integers(1, 9))),
    st.integers(1, 64),
    st.integers(1, 64),
)
def test_what_a_number_told_gives_its_attribute_back(steps: list, value: int, new: int) -> None:
    x = number("a", value)
    for sign, n in steps[:4]:
        x = apply(x, sign, n)
    attribute = Attribute("block", "a", None, value)
    values, refused = solved([(x.formula, evaluate(x.formula, {attribute: new}))])
    assert values == {attribute: new} and not refused


@given(st.integers(1, 8), st.integers(1, 8))
def test_heads_tell_the_width_that_they_make(heads: int, size: int) -> None:
    h, d = number("heads", 8), number("dim", 64)
    told = [(h.formula, heads), ((d // h).formula, size)]
    values, refused = solved(told)
    assert {a.name: v for a, v in values.items()} == {"heads": heads, "dim": heads * size}
    assert not refused


def test_what_no_value_fits_is_refused() -> None:
    a = number("a", 4)
    assert solved([(a.formula, 3), (a.formula, 2)])[1] == attributes(a.formula)
    assert solved([((2 * a).formula, 3)])[1] == attributes(a.formula)


def test_two_attributes_in_one_product_tell_neither() -> None:
    values, refused = solved([((number("a", 4) * number("b", 2)).formula, 6)])
    assert not values and not refused


def test_a_number_of_a_shape_makes_numbers_without_a_formula() -> None:
    free = Number.of(3, None, SOURCE)
    assert (number("a", 4) * free).formula is None and number("a", 4) * free == 12


def test_copies_outlive_the_trace_as_plain_ints() -> None:
    x = number("a", 4)
    assert type(copy.deepcopy(x)) is int and type(pickle.loads(pickle.dumps([x]))[0]) is int
