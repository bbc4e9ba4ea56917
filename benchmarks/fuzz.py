"""Random shapes, patterns and dtypes: packing must be exact, kernels must be their reference.

Each law takes one random case and says what is wrong with it, or nothing. Oracles are fp64 products
of the dense matrix, brute force for patterns, and the bits that were saved. Kernels take each
instruction set that the processor has in turn.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseworks as sw
from damage import in_a_process
from drawn import FULL, HALF, blocked, generator, grouped, inputs, matrix
from sparseworks import kernels
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.masks import Masks
from sparseworks.core.patterns import NM, Block, Unstructured
from sparseworks.io.container import DTYPES
from sparseworks.kernels.panel_packing import pack_panels
from sparseworks.kernels.panel_products import panel_product, unpack_panels
from sparseworks.kernels.panels import Format
from sparseworks.kernels.zeroing import keep_only

__all__ = ["LAWS", "campaign", "instruction_sets"]

Law = Callable[[random.Random], str]


def instruction_sets() -> list[str]:
    """Those that can be forced here; none without native kernels."""
    found = []
    for name in ("base", "avx2", "avx512f", "avx512vbmi2", "avx512"):
        os.environ["SPARSEWORKS_ISA"] = name
        with contextlib.suppress(InvalidArgument):
            if kernels.instruction_set() != "none":
                found.append(name)
    os.environ.pop("SPARSEWORKS_ISA", None)
    return found


def off(found: Tensor, wanted: Tensor, bound: Tensor) -> str:
    """What is wrong with a product; a bound for each entry."""
    over = ((found.double() - wanted).abs() - bound).max() if wanted.numel() else torch.tensor(0.0)
    return "" if float(over) <= 0 else f"off by {float(over):.1e} over its bound"


def pack_rows(draw: random.Random) -> str:
    weight = matrix(draw, HALF)
    for pack in (kernels.pack_mask, kernels.pack_index):
        if not torch.equal(kernels.unpack(pack(weight)), weight):
            return f"{pack.__name__}: another matrix comes back"
    rounded = kernels.unpack(kernels.pack_integer(weight))
    top = nn.functional.pad(weight.float().abs(), (0, -weight.shape[1] % 128))
    step = top.view(len(weight), -1, 128).amax(2).repeat_interleave(128, 1) / 127
    far = (rounded - weight.float()).abs() > 0.5 * step[:, : weight.shape[1]] * (1 + 1e-5) + 1e-7
    return "pack_integer: more than half a step away" if bool(far.any()) else ""


def pack_groups(draw: random.Random) -> str:
    dtype = draw.choice((HALF, FULL))
    weight, pattern = grouped(draw, dtype)
    back = kernels.unpack_nm(kernels.pack_nm(weight, None, pattern, dtype))
    return "" if torch.equal(back.to(dtype), weight) else "another matrix comes back"


def pack_blocks(draw: random.Random) -> str:
    weight, block = blocked(draw)
    back = kernels.unpack_blocks(kernels.pack_blocks(weight, block=block))
    return "" if torch.equal(back, weight.to(back.dtype)) else "another matrix comes back"


def pack_floats(draw: random.Random) -> str:
    weight = matrix(draw).bfloat16().float()
    format = draw.choice((Format.FLOAT, Format.HALF, Format.MASKED_HALF))
    packed = pack_panels(weight, format)
    same = torch.equal(unpack_panels(packed.panels), weight)
    return "" if same and packed.error == 0 else f"{format.text}: another matrix comes back"


def multiply_row(draw: random.Random) -> str:
    weight, name = matrix(draw, HALF, 1100), draw.choice(("mask", "index", "integer"))
    packed = getattr(kernels, f"pack_{name}")(weight)
    held, x = kernels.unpack(packed).double(), inputs(draw, weight.shape[1], FULL)[0]
    size = held.abs() @ x.double().abs() + 1e-6
    if name == "integer":  # x keeps 15 bits of its largest entry
        size = size + held.abs().sum(1) * float(x.abs().max())
    found = kernels.spmv(packed, x, None, draw.randint(1, 3))
    return off(found, held @ x.double(), 2e-5 * size)


def multiply_groups(draw: random.Random) -> str:
    dtype = draw.choice((HALF, FULL))
    weight, pattern = grouped(draw, dtype)
    x = inputs(draw, weight.shape[1], FULL)
    packed = kernels.pack_nm(weight, None, pattern, dtype)
    short = x.to(dtype).double()
    bound = 1e-5 * (short.abs() @ weight.double().abs().T + 1)
    found = kernels.nm_product(packed, x, threads=draw.randint(1, 3))
    return off(found, short @ weight.double().T, bound)


def multiply_blocks(draw: random.Random) -> str:
    weight, block = blocked(draw)
    x = inputs(draw, weight.shape[1], FULL)
    packed, short = kernels.pack_blocks(weight, block=block), x.bfloat16().double()
    bound = 1e-5 * (short.abs() @ weight.double().abs().T + 1)
    found = kernels.block_product(packed, x, threads=draw.randint(1, 3))
    return off(found, short @ weight.double().T, bound)


def multiply_columns(draw: random.Random) -> str:
    weight = matrix(draw, draw.choice((HALF, FULL)))
    x = inputs(draw, weight.shape[1], FULL, 8)
    x *= torch.rand(x.shape[1], generator=generator(draw)) < draw.choice((0.0, 0.5, 1.0))
    bound = 1e-5 * (x.double().abs() @ weight.double().abs().T + 1e-3)
    found = kernels.gathered(kernels.pack_columns(weight), x, None, None, draw.randint(1, 3))
    return off(found, x.double() @ weight.double().T, bound)


def multiply_panels(draw: random.Random) -> str:
    format = draw.choice(list(Format))
    weight = matrix(draw)
    panels = pack_panels(weight, format, zeros=draw.random() < 0.5).panels
    x, dense = inputs(draw, weight.shape[1], FULL), unpack_panels(panels).double()
    size = x.double().abs() @ dense.abs().T
    many = len(x) > 8 and format != Format.FLOAT
    bound = size * (2.0**-7 if many else 1e-6)
    if format.bits and not many:  # inputs are rounded to 16 bits of the largest
        largest = x.abs().amax(1, keepdim=True).double() / 32639
        bound = bound + largest * dense.abs().sum(1) + 1e-5 * size
    found = panel_product(panels, x, threads=draw.randint(1, 3))
    text = off(found, x.double() @ dense.T, bound + 1e-6 * (1 + dense.abs().max()))
    return text and f"{format.text}: {text}"


def zero(draw: random.Random) -> str:
    shape = [draw.randint(0, 7) for _ in range(draw.randint(0, 4))]
    dtype = draw.choice((torch.float16, HALF, FULL, torch.float64, torch.complex128, torch.int8,
                         torch.int64, torch.bool))  # fmt: skip
    mask = torch.rand(shape, generator=generator(draw)) < draw.choice((0.0, 0.3, 1.0))
    tensor = (100 * torch.randn(shape, generator=generator(draw))).to(dtype)
    wanted = tensor.masked_fill(~mask, 0)
    keep_only(mask, tensor)
    return "" if torch.equal(tensor, wanted) else f"{dtype}: not masked_fill"


def select(draw: random.Random) -> str:
    """Patterns against a sort in Python; ties keep the lowest index."""
    kind = draw.choice(("unstructured", "row", "nm", "block"))
    m = draw.choice((2, 4, 8)) if kind == "nm" else 1
    h, w = (draw.randint(1, 3), draw.randint(1, 3)) if kind == "block" else (1, m)
    shape = h * draw.randint(1, 5), w * draw.randint(1, 5)
    values = torch.randint(-3, 4, shape, generator=generator(draw)).to(draw.choice((FULL, HALF)))
    if kind == "block":
        pooled = values.float().view(shape[0] // h, h, shape[1] // w, w).sum((1, 3))
        keep = draw.randint(0, pooled.numel())
        wanted = top(pooled.flatten().tolist(), keep)
        made = torch.tensor(wanted).view(pooled.shape)
        made = made.repeat_interleave(h, 0).repeat_interleave(w, 1)
        mask = Block(h, w).select(values, keep)
    elif kind == "unstructured":
        keep = draw.randint(0, values.numel())
        made = torch.tensor(top(values.flatten().tolist(), keep)).view(shape)
        mask = Unstructured().select(values, keep)
    else:
        run = m if kind == "nm" else shape[1]
        each = draw.randint(1, run)
        rows = values.view(-1, run).tolist()
        made = torch.tensor([top(r, each) for r in rows]).view(shape)
        pattern: Any = NM(each, m) if kind == "nm" else Unstructured("row")
        mask = pattern.select(values) if kind == "nm" else pattern.select(values, each * shape[0])
    return "" if torch.equal(mask, made) else f"{kind}: another choice than a sort makes"


def top(values: list[float], keep: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep]
    return [i in set(order) for i in range(len(values))]


class Holder(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        if tensor.is_floating_point() or tensor.is_complex():
            self.held = nn.Parameter(tensor, requires_grad=False)
        else:
            self.register_buffer("held", tensor)


def save_and_load(draw: random.Random) -> str:
    """Any bits (NaN payloads, -0.0, denormals) of any dtype and shape come back, and the mask."""
    dtype = draw.choice(list(DTYPES.values()))
    shape = [draw.randint(0, 20) for _ in range(draw.randint(0, 3))]
    if draw.random() < 0.5:
        shape = [draw.randint(1, 40), 4 * draw.randint(1, 20)]
    count = math.prod(shape)
    g = generator(draw)
    if dtype == torch.bool:
        tensor = torch.randint(0, 2, shape, generator=g).bool()
    else:
        raw = torch.randint(0, 256, (count, dtype.itemsize), generator=g, dtype=torch.uint8)
        raw[torch.rand(count, generator=g) < draw.choice((0.0, 0.5, 0.95, 1.0))] = 0
        tensor = raw.view(-1).view(dtype).view(shape)
    model = Holder(tensor.clone())
    record = None
    if isinstance(model.held, nn.Parameter) and draw.random() < 0.6:
        kept = torch.rand(shape, generator=g) < draw.random()
        record = Masks.of({"held": kept}, "fuzz")
        sw.attach(model, record)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        path = Path(folder) / "m.safetensors"
        sw.save(model, path)
        back = sw.load(path, Holder(torch.empty_like(tensor)))
    if not torch.equal(bits(back.held), bits(tensor)):
        return f"{dtype} {shape}: other bits"
    found = sw.masks(back)
    same = (found is None) == (record is None) and (
        record is None or torch.equal(found["held"], record["held"])
    )
    return "" if same else f"{dtype} {shape}: another mask"


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


LAWS: dict[str, Law] = {
    "rows, packed and unpacked": pack_rows,
    "N:M, packed and unpacked": pack_groups,
    "blocks, packed and unpacked": pack_blocks,
    "panels, packed and unpacked": pack_floats,
    "products of rows": multiply_row,
    "products of N:M": multiply_groups,
    "products of blocks": multiply_blocks,
    "products of gathered columns": multiply_columns,
    "products of panels": multiply_panels,
    "zeroing": zero,
    "patterns against brute force": select,
    "saved and loaded": save_and_load,
}  # fmt: skip


def cases(name: str, numbers: range, seed: int, sets: list[str]) -> Iterator[dict[str, Any]]:
    law = LAWS[name]
    for number in numbers:
        if sets:
            os.environ["SPARSEWORKS_ISA"] = sets[number % len(sets)]
        try:
            wrong = law(random.Random(f"{seed} {name} {number}"))
            outcome = "differs" if wrong else "agrees"
        except Exception as error:
            outcome, wrong = "error", f"{type(error).__name__}: {error}"[:300]
        yield {"case": number, "outcome": outcome, "message": wrong}


def campaign(name: str, count: int, seed: int, sets: list[str]) -> dict[str, Any]:
    """Counts of one law, and the first cases that break it."""
    counts: Counter[str] = Counter()
    bad: list[dict[str, Any]] = []
    first = 0
    while first < count:
        for line in in_a_process(partial(cases, name, range(first, count), seed, sets)):
            first = line["case"] + 1
            counts[line["outcome"]] += 1
            if line["outcome"] != "agrees":
                bad.append(line)
        if first < count:  # it died in this case
            counts["crash"] += 1
            bad.append({"case": first, "outcome": "crash"})
            first += 1
    kinds = ("agrees", "differs", "error", "crash")
    made = {"law": name, "cases": count, **{k: counts[k] for k in kinds}}
    return {**made, "first that must not be": bad[:5]}
