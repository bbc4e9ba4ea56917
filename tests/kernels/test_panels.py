"""Panels: packing is exact where it says so, and products are those of the dense matrix."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.grids import round_groups
from sparseworks.kernels.native import instruction_set, module
from sparseworks.kernels.panel_packing import pack_panels
from sparseworks.kernels.panel_products import panel_product, unpack_panels
from sparseworks.kernels.panels import Format, Panels

native = pytest.mark.skipif(module() is None, reason="the native kernels are not built")
EXAMPLES = int(os.environ.get("SPARSEWORKS_EXAMPLES", "25"))  # `make fuzz` takes 10,000
ISAS = ["base", "avx2", "avx512vbmi2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("SPARSEWORKS_ISA", request.param)
    try:
        instruction_set()
    except InvalidArgument as reason:
        pytest.skip(str(reason))
    return request.param


def matrix(format, rows, columns, density, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g)
    if format == Format.GROUP_INT4:
        keep = torch.rand(rows, -(-columns // 16), generator=g) < density
        keep = keep.repeat_interleave(16, 1)[:, :columns]
    else:
        keep = torch.rand(rows, columns, generator=g) < density
    return (w * keep).to(dtype)


def on_grid(w, format):
    """Whole multiples of 1/64, the largest code in every group, so that a scale without error is
    that of the largest."""
    top = 7 if format.bits == 4 else 127
    codes = (w * 3).round().clamp(-top, top)
    for c in range(0, w.shape[1], format.group):
        part = codes[:, c : c + format.group]
        at = w[:, c : c + format.group].abs().argmax(1, keepdim=True)
        part.scatter_(1, at, torch.where(part.gather(1, at) != 0, float(top), 0.0))
        part[(part.gather(1, at) == 0).expand_as(part)] = 0
    return codes / 64


sizes = {
    "rows": st.integers(1, 50),
    "columns": st.integers(1, 300),
    "density": st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]),
    "seed": st.integers(0, 10_000),
}


@pytest.mark.parametrize("format", list(Format), ids=lambda f: f.text)
@settings(max_examples=EXAMPLES, deadline=None)
@given(**sizes)
def test_what_a_format_can_say_is_packed_exactly(format, rows, columns, density, seed):
    w = matrix(format, rows, columns, density, seed)
    if format in (Format.HALF, Format.MASKED_HALF):
        w = w.bfloat16().float()
    elif format.bits:
        w = on_grid(w, format)
    packed = pack_panels(w, format)
    assert torch.equal(unpack_panels(packed.panels), w)
    assert packed.error == 0 and packed.kept == int(torch.count_nonzero(w))


@native
@pytest.mark.parametrize("format", list(Format), ids=lambda f: f.text)
@settings(max_examples=EXAMPLES, deadline=None)
@given(tokens=st.sampled_from([1, 2, 4, 5, 17, 40]), zeros=st.booleans(), **sizes)
def test_products_are_those_of_the_dense_matrix(
    format, rows, columns, density, seed, tokens, zeros
):
    w = matrix(format, rows, columns, density, seed)
    panels = pack_panels(w, format, zeros=zeros).panels
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    _compare(panels, x)


def _compare(panels, x):
    dense = unpack_panels(panels)
    wanted = x.double() @ dense.double().T
    # what the rounding of inputs may do: to 16 bits of the largest for integers, to bf16 in batches
    size = x.double().abs() @ dense.double().abs().T
    many = x.shape[0] > 8 and panels.format != Format.FLOAT
    bound = 2.0**-7 if many else 1e-6
    slack = size * bound
    if panels.format.bits and not many:
        largest = x.abs().amax(1, keepdim=True).double() / 32639
        slack = slack + largest * dense.double().abs().sum(1) + 1e-5 * size
    found = panel_product(panels, x, threads=2).double()
    assert bool(((found - wanted).abs() <= slack + 1e-6).all())


@native
@pytest.mark.parametrize("format", list(Format), ids=lambda f: f.text)
@pytest.mark.parametrize("tokens", [1, 3, 9, 33])
def test_every_instruction_set(format, tokens, isa):
    for seed, (rows, columns, density) in enumerate([(40, 515, 0.5), (16, 64, 1.0), (7, 33, 0.2)]):
        w = matrix(format, rows, columns, density, seed)
        _compare(pack_panels(w, format).panels, torch.randn(tokens, columns))


@native
@pytest.mark.parametrize("format", [Format.COLUMN_INT8, Format.COLUMN_INT4], ids=lambda f: f.text)
@settings(max_examples=EXAMPLES, deadline=None)
@given(share=st.sampled_from([0.0, 0.02, 0.3, 0.6]), tokens=st.integers(1, 3), **sizes)
def test_columns_of_inputs_that_are_zero_are_not_needed(
    format, rows, columns, density, seed, tokens, share
):
    panels = pack_panels(matrix(format, 20 * rows, columns, density, seed), format).panels
    g = torch.Generator().manual_seed(seed)
    live = torch.rand(tokens, columns, generator=g) < share
    x = torch.randn(tokens, columns, generator=g) * live
    _compare(panels, x)


@native
@pytest.mark.parametrize("format", [Format.COLUMN_INT8, Format.COLUMN_INT4], ids=lambda f: f.text)
@pytest.mark.parametrize("tokens", [1, 20])
def test_matrices_of_several_tiles(format, tokens):
    panels = pack_panels(matrix(format, 2 * 8192 + 200, 130, 1.0, 0), format).panels
    assert len(panels.offset) >= 4
    x = torch.randn(tokens, 130)
    _compare(panels, x * (x.abs() > 0.7))


@native
def test_bytes_that_are_not_read_do_not_matter():
    """Codes of a column whose input is 0 may be anything."""
    w = matrix(Format.COLUMN_INT8, 600, 64, 1.0, 0)
    panels = pack_panels(w, Format.COLUMN_INT8).panels
    x = torch.randn(1, 64)
    x[0, 5] = 0
    before = panel_product(panels, x)
    other = panels.data.clone()
    rows = 640  # the first 128s that hold 600
    other[2 * rows + 5 * rows : 2 * rows + 6 * rows] = 77  # column 5
    changed = Panels(panels.format, 600, 64, False, other, panels.offset)
    assert torch.equal(panel_product(changed, x), before)
    x[0, 5] = 1.0
    assert not torch.equal(panel_product(changed, x), panel_product(panels, x))


@native
def test_outliers_among_inputs_keep_their_neighbours():
    w = matrix(Format.INT8, 32, 256, 1.0, 0)
    panels = pack_panels(w, Format.INT8).panels
    x = torch.randn(1, 256)
    x[0, 7] = 300.0
    wanted = x @ unpack_panels(panels).T
    assert float((panel_product(panels, x) - wanted).norm() / wanted.norm()) < 1e-3


def test_importance_lowers_the_error_that_it_weighs():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    h = torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 6 * 100
    plain, aware = (pack_panels(w, Format.INT4, importance=i).panels for i in (None, h))
    errors = [((unpack_panels(p) - w).square() * h).sum() for p in (plain, aware)]
    assert errors[1] < errors[0]


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_zero_points_are_those_of_the_formula(seed):
    """Against scale = (max - min) / 15, zero = round(-min / scale), group by group."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 32, generator=g) + 0.5
    grid = round_groups(w, torch.ones_like(w, dtype=torch.bool), 16, 4, zeros=True)
    for r in range(3):
        for k in range(2):
            part = w[r, 16 * k : 16 * k + 16]
            low, high = min(0.0, float(part.min())), max(0.0, float(part.max()))
            scale = float(torch.tensor((high - low) / 15).half())
            zero = round(-low / scale)
            q = (part / scale).round().add(zero).clamp(0, 15)
            found = grid.weight()[r, 16 * k : 16 * k + 16]
            assert torch.allclose(found, scale * (q - zero), atol=1e-5)


def test_weights_rounded_before_stay_as_they_are():
    """Rows on grids of their own, as GPTQ-style rounding leaves them, whatever the groups hold."""
    g = torch.Generator().manual_seed(0)
    step = torch.rand(40, 1, generator=g).half().float() / 16
    w = torch.randint(-15, 16, (40, 512), generator=g) * step
    for format in (Format.INT8, Format.MASKED_INT8):
        assert torch.equal(unpack_panels(pack_panels(w, format).panels), w)
    w = torch.randint(-7, 8, (40, 512), generator=g) * step
    for format in (Format.INT4, Format.MASKED_INT4, Format.GROUP_INT4):
        assert torch.equal(unpack_panels(pack_panels(w, format).panels), w)


def test_sizes_are_those_of_the_table():
    w = torch.randn(1024, 1024)
    kept = torch.rand_like(w) < 0.5
    groups = (torch.rand(1024, 64) < 0.5).repeat_interleave(16, 1)
    for format, mask, bits in (
        (Format.HALF, None, 16), (Format.INT8, None, 8.5), (Format.INT4, None, 4.5),
        (Format.MASKED_INT8, kept, 5.125), (Format.MASKED_INT4, kept, 3.5),
        (Format.GROUP_INT4, groups, 2.56), (Format.LISTED_INT8, torch.rand_like(w) < 0.1, 2.18),
    ):  # fmt: skip
        panels = pack_panels(w if mask is None else w * mask, format).panels
        assert 8 * panels.nbytes / w.numel() == pytest.approx(bits, rel=0.04), format


@native
@pytest.mark.parametrize(
    "format", [Format.MASKED_INT8, Format.LISTED_INT8, Format.GROUP_INT4], ids=lambda f: f.text
)
def test_damaged_panels_are_refused(format):
    good = pack_panels(matrix(format, 32, 256, 0.1, 0), format).panels
    pieces = {f: getattr(good, f) for f in ("format", "rows", "columns", "zeros")}
    generator = torch.Generator().manual_seed(0)
    refused = 0
    about = 64 + 4 + 2 * 4  # of the first panel: sums, and who has what, before scales and values
    for turn in range(200):
        data = good.data.clone()
        at = int(torch.randint(0, about if turn % 2 else good.nbytes, (1,), generator=generator))
        data[at] = data[at] ^ (1 << int(torch.randint(0, 8, (1,), generator=generator)))
        try:
            Panels(**pieces, data=data, offset=good.offset)
        except InvalidArgument:
            refused += 1
    assert refused > 5  # flips that change lengths; those of values and scales are other weights
    for data, offset in ((good.data[:-70], good.offset), (good.data, good.offset[:-1]),
                         (good.data, good.offset + 1)):  # fmt: skip
        with pytest.raises(InvalidArgument, match="not a matrix in panels"):
            Panels(**pieces, data=data, offset=offset)


def test_misuse_is_refused():
    with pytest.raises(InvalidArgument, match="matrix is packed"):
        pack_panels(torch.zeros(3), Format.INT8)
    with pytest.raises(InvalidArgument, match="NaN"):
        pack_panels(torch.full((2, 2), float("nan")), Format.INT8)
    with pytest.raises(InvalidArgument, match="mask"):
        pack_panels(torch.zeros(2, 2), Format.INT8, mask=torch.ones(3, 3))
    with pytest.raises(InvalidArgument, match="importance"):
        pack_panels(torch.zeros(2, 2), Format.INT8, importance=torch.ones(3))
    with pytest.raises(InvalidArgument, match="unknown format"):
        Format.parse("int5")
    panels = pack_panels(torch.ones(2, 2), Format.HALF).panels
    with pytest.raises(InvalidArgument, match="takes fp32"):
        panel_product(panels, torch.zeros(1, 3))


def test_panels_are_pickled():
    panels = pack_panels(torch.randn(20, 40), Format.INT4).panels
    again = pickle.loads(pickle.dumps(panels))
    x = torch.randn(2, 40)
    assert torch.equal(panel_product(again, x), panel_product(panels, x))
