"""Weights that are integers in groups: what a quantized model remembers of them.

Like masks, grids are part of a model: `sw.quantize` writes weight = scale * (code - zero) into a
parameter and keeps codes, scales and zeros beside it, so that a file stores them and the decoder
packs them as they are. An entry counts as long as its parameter holds these very numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sparseworks.core.errors import ModelError
from sparseworks.kernels.grids import Grid
from sparseworks.models.matrix import Layout, View, of_matrix

__all__ = ["Grids", "Quantized", "attach_grids", "grids"]

_ATTRIBUTE = "_sparseworks_grids"


@dataclass(frozen=True, eq=False)
class Quantized:
    """One parameter in integers.

    Args:
        grid: of its matrix (see `models.matrix`), in groups of consecutive columns.
        bits: of a code, 1 to 8; codes and zeros lie in [-2^(bits - 1), 2^(bits - 1)).
        live: bool `[rows, groups]`, False: a group that is pruned, all 0; None: no such group.
        shape: of the parameter.
        layout: how its axes map to the matrix.
    """

    grid: Grid
    bits: int
    live: Tensor | None
    shape: tuple[int, ...]
    layout: Layout = "linear"

    @classmethod
    def of(cls, view: View, grid: Grid, bits: int, live: Tensor | None = None) -> Quantized:
        """Of a parameter; what lies in pruned groups is dropped."""
        kept = None if live is None or bool(live.all()) else live.cpu()
        if kept is not None:
            zero = None if grid.zero is None else grid.zero.cpu() * kept
            grid = Grid(grid.codes.cpu() * kept[..., None], grid.scale.cpu() * kept, zero)
        cpu = Grid(
            grid.codes.cpu(), grid.scale.cpu(), None if grid.zero is None else grid.zero.cpu()
        )
        return cls(cpu, bits, kept, tuple(view.parameter.shape), view.layout)

    @property
    def group(self) -> int:
        """Columns of a group."""
        return self.grid.codes.shape[2]

    @property
    def groups(self) -> int:
        """That are kept."""
        return self.grid.scale.numel() if self.live is None else int(self.live.sum())

    @property
    def nbytes(self) -> int:
        """Codes, scales and zeros of the kept groups, and a bit a group where some are pruned.

        A file may take less: it leaves out codes of masked weights (see `io.records`).
        """
        zeros = 0 if self.grid.zero is None else -(-self.groups * self.bits // 8)
        flags = 0 if self.live is None else -(-self.live.numel() // 8)
        return -(-self.groups * self.group * self.bits // 8) + 2 * self.groups + zeros + flags

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the parameter is; zeros have no sign."""
        matrix = self.grid.weight().add_(0.0)
        return of_matrix(matrix, self.shape, self.layout).contiguous().to(dtype)

    def mask(self) -> Tensor:
        """Bool, of the parameter's shape: weights of kept groups."""
        live = (
            torch.ones(self.grid.scale.shape, dtype=torch.bool) if self.live is None else self.live
        )
        kept = live.repeat_interleave(self.group, 1)
        return of_matrix(kept, self.shape, self.layout).contiguous()

    def holds(self, parameter: Tensor) -> bool:
        """Is this what the parameter is, bit for bit?"""
        if tuple(parameter.shape) != self.shape or not parameter.is_floating_point():
            return False
        now = parameter.detach().cpu().contiguous()
        return torch.equal(now.view(torch.uint8), self.weight(now.dtype).view(torch.uint8))


class Grids(Mapping[str, Quantized]):
    """Parameter name -> its integers."""

    def __init__(self, entries: Mapping[str, Quantized] | None = None) -> None:
        self._entries = dict(entries or {})

    def __getitem__(self, name: str) -> Quantized:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Grids({len(self)} tensors, {self.bits_per_weight:.3f} bits a weight)"

    @property
    def nbytes(self) -> int:
        return sum(q.nbytes for q in self.values())

    @property
    def bits_per_weight(self) -> float:
        """Scales, zeros and flags included."""
        return 8 * self.nbytes / max(1, sum(q.grid.codes.numel() for q in self.values()))

    def held_by(self, model: nn.Module) -> Grids:
        """The entries whose parameters are still what they say."""
        now = dict(model.named_parameters(remove_duplicate=False))
        return Grids({n: q for n, q in self.items() if n in now and q.holds(now[n])})


def grids(model: nn.Module) -> Grids | None:
    """The integers of a quantized model, or None where it has none."""
    return cast("Grids | None", getattr(model, _ATTRIBUTE, None))


def attach_grids(model: nn.Module, record: Grids | None) -> None:
    """Put a record on a model; None takes it off.

    Raises:
        ModelError: it names a parameter that the model does not have in this shape.
    """
    if not record:
        if hasattr(model, _ATTRIBUTE):
            delattr(model, _ATTRIBUTE)
        return
    known = dict(model.named_parameters(remove_duplicate=False))
    for name, entry in record.items():
        if name not in known or tuple(known[name].shape) != entry.shape:
            raise ModelError(f"the record of integers names {name!r} {list(entry.shape)}, which "
                             "the model does not have")  # fmt: skip
    setattr(model, _ATTRIBUTE, record)
