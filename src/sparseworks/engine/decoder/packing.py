"""Which format each matrix of a decoder takes, and what rounding costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.decoder.spec import LinearSpec, MixtureSpec, ModelSpec, Weight
from sparseworks.engine.measuring import least_seconds
from sparseworks.kernels.native import module
from sparseworks.kernels.panel_packing import pack_panels
from sparseworks.kernels.panels import Format, Panels

__all__ = ["DTYPES", "GATHERED", "Line", "Report", "pack_model", "read_bandwidth"]

DTYPES = {
    "fp32": (Format.FLOAT,),
    "bf16": (Format.HALF, Format.MASKED_HALF),
    "int8": (Format.INT8, Format.MASKED_INT8, Format.LISTED_INT8),
    "int4": (Format.INT4, Format.MASKED_INT4, Format.GROUP_INT4),
}
GATHERED = {"int8": Format.COLUMN_INT8, "int4": Format.COLUMN_INT4}
_SKIPPING = 0.8  # speed of the memory where columns are left out, which it fetches in part
_CLOSE = 1.05  # ratio of times below which the smaller format is taken
_ROWS = 16
_STRIP = 128  # rows that all formats take whole
_SAMPLE = 1 << 19  # weights that a format is tried on
_REPEATS = 5
_PROBE = 1 << 26  # floats that are read to measure the memory


@dataclass(frozen=True)
class Line:
    """One matrix of a decoder.

    Attributes:
        error: relative, of the rounded weights; with `data`, weighed by the mean squares of inputs.
        seconds: of one vector, warm and with the bandwidth of the memory.
        share: of the inputs, and so of the codes, that a token is expected to need.
    """

    name: str
    format: str
    rows: int
    columns: int
    kept: int
    nbytes: int
    error: float
    seconds: float
    share: float = 1.0

    @property
    def read(self) -> float:
        """Bytes that one token needs."""
        return self.nbytes * _read_share(Format.parse(self.format), self.share)


def _read_share(format: Format, share: float) -> float:
    """Of a matrix's bytes: scales and the codes of active inputs where columns are gathered."""
    if not format.by_columns:
        return 1.0
    scale, code = 2 / format.group, format.bits / 8
    return (scale + share * code) / (scale + code)


@dataclass
class Report:
    """What a decoder is made of."""

    lines: list[Line] = field(default_factory=list)
    bandwidth: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(line.nbytes for line in self.lines)

    @property
    def read(self) -> float:
        """Bytes that one token needs, with all experts."""
        return sum(line.read for line in self.lines)

    def text(self) -> str:
        """A line a matrix, and the sums."""
        width = max((len(line.name) for line in self.lines), default=6)
        out = [
            f"{'matrix':<{width}}  format        kept  inputs      MB  bits/w    error      ms"
            "  of memory"
        ]
        for x in self.lines:
            size = x.rows * x.columns
            share = x.read / x.seconds / self.bandwidth if x.seconds else 0.0
            out.append(
                f"{x.name:<{width}}  {x.format:<11} {x.kept / size:6.1%}  {x.share:6.0%}  "
                f"{x.nbytes / 1e6:6.2f}  {8 * x.nbytes / size:6.2f}  {x.error:7.1e}  "
                f"{1e3 * x.seconds:6.3f}  {share:8.0%}"
            )
        size = sum(x.rows * x.columns for x in self.lines)
        out.append(
            f"all: {self.nbytes / 1e6:.1f} MB, of which a token reads {self.read / 1e6:.1f} (less "
            "where experts are chosen), "
            f"{8 * self.nbytes / max(size, 1):.2f} bits a weight; the memory gives "
            f"{self.bandwidth / 1e9:.1f} GB/s"
        )
        return "\n".join([*out, *self.notes])


@cache
def read_bandwidth(threads: int) -> float:
    """Bytes a second that threads together read from memory: a buffer of 256 MiB, best of 5."""
    code = module()
    if code is None:
        raise ModelError("the native kernels are not built here")
    memory = torch.zeros(_PROBE)
    runs = {"read": lambda: code.decoder.read(memory, threads)}
    return memory.nbytes / least_seconds(runs, _REPEATS)["read"]


def pack_model(
    spec: ModelSpec,
    dtype: str,
    head: str | None,
    threads: int,
    importance: Callable[[str], Tensor | None] = lambda name: None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Pack every matrix of `spec` in place, each in the format that is fastest for one vector.

    Formats that read fewer bytes win unless they were measured to be slower; matrices of the same
    size and density take the same one.

    Args:
        dtype: of weights, a key of `DTYPES`.
        head: of the output head; None: as `dtype`.
        importance: the mean squares of the inputs of a module, by its name.
        progress: called with the name of each matrix.

    Raises:
        InvalidArgument: an unknown dtype.
        ModelError: weights that are not finite.
    """
    for given in (dtype, head):
        if given is not None and given not in DTYPES:
            raise InvalidArgument(f"dtype {given!r}: use one of {', '.join(DTYPES)}")
    report = Report(bandwidth=read_bandwidth(threads))
    chosen: dict[tuple[object, ...], Format] = {}
    routers = {id(x.mlp.router) for x in spec.layers if isinstance(x.mlp, MixtureSpec)}
    leading: dict[int, Format] = {}
    for layer in spec.layers:  # all experts of a layer share one format
        if isinstance(layer.mlp, MixtureSpec):
            for lines in ([e.up for e in layer.mlp.experts], [e.down for e in layer.mlp.experts]):
                format = _leading(lines[0], dtype, chosen, threads, report)
                leading |= {id(line): format for line in lines}
    for linear in spec.linears():
        if progress is not None:
            progress(linear.name)
        wanted = dtype if linear is not spec.head or head is None else head
        if id(linear) in routers:
            wanted = "fp32"
        _pack(linear, wanted, chosen, threads, report, importance, leading.get(id(linear)))
    return report


def _leading(linear: LinearSpec, dtype: str, chosen: dict[tuple[object, ...], Format],
             threads: int, report: Report) -> Format:  # fmt: skip
    assert isinstance(linear.weight, Weight)
    return _choose(linear.weight.make(), dtype, chosen, threads, report, None)


def _pack(
    linear: LinearSpec, dtype: str, chosen: dict[tuple[object, ...], Format], threads: int,
    report: Report, importance: Callable[[str], Tensor | None], format: Format | None,
) -> None:  # fmt: skip
    source = linear.weight
    assert isinstance(source, Weight)
    dense = source.make()
    squares = importance(source.names[0]) if source.names else None
    held = None
    if source.integers is not None and dtype in ("int4", "int8"):
        held = source.integers().packed_as()
        if held is None:
            report.notes.append(f"{linear.name}: rounded anew, no format has its groups")
    try:
        if held is not None:
            format = held[0]
        elif format is None:
            share = None if linear.active is None else linear.active.share
            format = _choose(dense, dtype, chosen, threads, report, share)
        grid = None if held is None else held[1]
        packed = pack_panels(dense, format, importance=squares, grid=grid)
    except InvalidArgument as error:
        raise ModelError(f"{linear.name}: {error}; nothing was compiled") from None
    linear.weight = packed.panels
    share = 1.0 if linear.active is None else linear.active.share
    report.lines.append(
        Line(linear.name, format.text, packed.panels.rows, packed.panels.columns, packed.kept,
             packed.panels.nbytes, packed.error, _seconds(packed.panels, threads, report, share),
             share)
    )  # fmt: skip


def _choose(
    dense: Tensor,
    dtype: str,
    chosen: dict[tuple[object, ...], Format],
    threads: int,
    report: Report,
    share: float | None,
) -> Format:
    """The format that takes the least time for one vector, of those that may serve; `share`: of
    the inputs, where some do not count."""
    density, live = _density(dense)
    key = (dtype, dense.shape, round(density, 2), round(live, 2), share)
    if key in chosen:
        return chosen[key]
    tried = [f for f in DTYPES[dtype] if _may_serve(f, density, live)]
    if share is not None and dtype in GATHERED:
        tried.append(GATHERED[dtype])
    rows = max(_STRIP, min(dense.shape[0], _SAMPLE // dense.shape[1] // _STRIP * _STRIP))
    found = []
    for format in tried if len(tried) > 1 else []:
        panels = pack_panels(dense[:rows], format).panels
        size = panels.nbytes * _read_share(format, 1.0 if share is None else share)
        found.append((_seconds(panels, threads, report, share or 1.0), size, format))
    least = min((seconds for seconds, _, _ in found), default=0.0)
    close = [(size, format) for seconds, size, format in found if seconds <= _CLOSE * least]
    chosen[key] = min(close)[1] if close else tried[0]
    return chosen[key]


def _density(dense: Tensor) -> tuple[float, float]:
    """Shares of weights that are not 0, and of groups of 16 columns that hold one."""
    weights = groups = 0
    pad = -dense.shape[1] % _ROWS
    for rows in torch.split(dense, max(1, _SAMPLE // dense.shape[1])):
        live = torch.nn.functional.pad(rows != 0, (0, pad)).view(rows.shape[0], -1, _ROWS)
        weights += int(live.sum())
        groups += int(live.any(2).sum())
    return weights / dense.numel(), groups * _ROWS / (dense.numel() + pad * dense.shape[0])


def _may_serve(format: Format, density: float, live: float) -> bool:
    if format == Format.GROUP_INT4:
        return live < 0.9
    if format == Format.LISTED_INT8:
        return density < 0.2
    return not format.masked or density < 0.95


def _seconds(panels: Panels, threads: int, report: Report, share: float) -> float:
    """Of one vector: the kernel on what caches hold, shared by threads, or the memory's share,
    whichever is more."""
    code = module()
    assert code is not None  # `read_bandwidth` has asked
    warm: float = code.decoder.time(panels.native, _REPEATS) / threads
    read = _read_share(panels.format, share)
    speed = report.bandwidth * (_SKIPPING if read < 1 else 1)
    return max(warm * read, panels.nbytes * read / speed)
