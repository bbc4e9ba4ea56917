"""A quantized model as a decoder: packed from its own integers, without another rounding."""

from __future__ import annotations

import pytest
import torch

import sparseworks as sw
import tiny_models
from sparseworks.core.errors import InvalidArgument
from sparseworks.kernels.grids import Grid
from sparseworks.kernels.native import available
from sparseworks.kernels.panel_packing import pack_panels
from sparseworks.kernels.panels import Format

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built here")


def lines_of(decoder):
    return {line.name: line for line in decoder.report.lines if line.name != "lm_head"}


@pytest.mark.parametrize(("bits", "group", "zeros", "format"), [
    (4, 16, True, "group-int4"), (3, 16, True, "group-int4"), (2, 16, False, "int4"),
    (4, 32, False, "int4"), (4, 32, True, "group-int4"), (8, 32, False, "int8"),
    (6, 32, False, "int8"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX"])
def test_integers_are_packed_as_they_are(kind, bits, group, zeros, format):
    sizes = {"intermediate_size": 64, "num_key_value_heads": 4} if kind == "GPTNeoX" else {
        "intermediate_size": 64}  # fmt: skip
    model = tiny_models.language_model(kind, **sizes)
    sw.quantize(model, "rounding", bits=bits, group=group, zeros=zeros)
    decoder = sw.compile_decoder(model, dtype="int4", head="fp32")
    found = lines_of(decoder)
    assert len(found) == 8
    for line in found.values():
        if group == 16 and not zeros:
            assert line.format == "group-int4" and line.error < 1e-6
        else:
            assert line.format == format and line.error < 1e-6
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, got = model(ids).logits, decoder(ids).logits
    assert float((wanted - got).norm() / wanted.norm()) < 2e-2


def test_pruned_groups_and_widths_that_are_no_panels():
    model = tiny_models.language_model(intermediate_size=80)  # interleaved rows are filled up
    sw.quantize(model, "gqsa", data=tiny_models.texts(), block_epochs=0, tune_epochs=0)
    plain = lines_of(sw.compile_decoder(model, dtype="int4"))
    assert all(x.format == "group-int4" and x.error < 1e-6 for x in plain.values())


def test_what_no_format_holds_is_rounded_anew_and_said():
    model = tiny_models.language_model()
    sw.quantize(model, "rounding", bits=4, group=8)
    report = sw.compile_decoder(model, dtype="int4").report
    assert sum("rounded anew" in n for n in report.notes) == 8
    model = tiny_models.language_model()
    sw.quantize(model, "rounding", bits=8, group=16, zeros=True)
    report = sw.compile_decoder(model, dtype="int8").report
    assert sum("rounded anew" in n for n in report.notes) == 8


def test_other_dtypes_and_changed_weights_are_packed_as_ever():
    model = tiny_models.language_model()
    sw.quantize(model, "rounding", bits=4, group=16)
    assert all(
        x.format == "float" for x in lines_of(sw.compile_decoder(model, dtype="fp32")).values()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert all(x.error > 1e-3 for x in lines_of(sw.compile_decoder(model, dtype="int4")).values())


def test_integers_that_a_format_does_not_take_are_refused():
    weight = torch.zeros(16, 32)
    codes, scale = torch.zeros(16, 1, 32, dtype=torch.int8), torch.ones(16, 1).half()
    grid = Grid(codes, scale)
    assert pack_panels(weight, Format.INT4, grid=grid).error == 0
    for odd, format in (
        (Grid(codes + 8, scale), Format.INT4),
        (Grid(codes, scale, scale.to(torch.int8)), Format.INT4),
        (Grid(codes[:, :, :16], scale), Format.INT4), (grid, Format.GROUP_INT4),
        (grid, Format.HALF),
    ):  # fmt: skip
        with pytest.raises(InvalidArgument, match="integers"):
            pack_panels(weight, format, grid=odd)
