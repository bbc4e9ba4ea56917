"""The cell search space of DARTS (Liu et al. 2019, DARTS: Differentiable Architecture Search) with
plain convolutions added, which is where sparsity pays (Mousavi et al. 2022, DASS).

A network is a stem, cells, and a linear classifier. A cell has two inputs (the two cells before)
and `nodes` nodes; node j adds up one edge from every earlier node i. In the super-network an edge
puts out sum_o softmax(alpha_edge)_o o(x) over all operations; in a derived one every node has two
edges of one operation each. Reduction cells, at one and two thirds of the depth, halve the size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseworks.core.errors import InvalidArgument

__all__ = ["OPERATIONS", "CellNetwork", "Genotype", "SuperNetwork", "random_genotype"]

Edge = tuple[int, int]  # (from, to); 0 and 1 are the inputs of the cell
OPERATIONS = (
    "none", "skip", "max_pool", "avg_pool", "sep3", "dil3", "conv1", "conv3", "conv5",
)  # fmt: skip


@dataclass(frozen=True)
class Genotype:
    """A derived architecture: edge -> operation, of normal and of reduction cells."""

    normal: tuple[tuple[Edge, str], ...]
    reduce: tuple[tuple[Edge, str], ...]

    def share(self, *operations: str) -> float:
        """Fraction of the edges that have one of these operations."""
        chosen = [o for _, o in (*self.normal, *self.reduce)]
        return sum(o in operations for o in chosen) / len(chosen)


class _Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


class _Halve(nn.Module):
    """relu, two 1x1 convolutions of stride 2 (one shifted by a pixel), batch norm."""

    def __init__(self, inputs: int, outputs: int, affine: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs // 2, 1, 2, bias=False)
        self.second = nn.Conv2d(inputs, outputs - outputs // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        shifted = nn.functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        result: Tensor = self.norm(torch.cat([self.first(x), self.second(shifted)], 1))
        return result


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int, affine: bool, *, dilation: int = 1,
    depthwise: bool = False,
) -> list[nn.Module]:  # fmt: skip
    """relu, convolution (depthwise ones with a 1x1 after), batch norm."""
    padding = dilation * (kernel // 2)
    groups = inputs if depthwise else 1
    middle = inputs if depthwise else outputs
    layers: list[nn.Module] = [
        nn.ReLU(),
        nn.Conv2d(inputs, middle, kernel, stride, padding, dilation, groups, bias=False),
    ]
    if depthwise:
        layers.append(nn.Conv2d(middle, outputs, 1, bias=False))
    return [*layers, nn.BatchNorm2d(outputs, affine=affine)]


def _operation(name: str, c: int, stride: int, affine: bool) -> nn.Module:
    if name == "none":
        return _Zero(stride)
    if name == "skip":
        return nn.Identity() if stride == 1 else _Halve(c, c, affine)
    if name == "max_pool":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(c, affine=affine))
    if name == "avg_pool":
        pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        return nn.Sequential(pool, nn.BatchNorm2d(c, affine=affine))
    if name == "sep3":
        return nn.Sequential(
            *_convolution(c, c, 3, stride, affine, depthwise=True),
            *_convolution(c, c, 3, 1, affine, depthwise=True),
        )
    if name == "dil3":
        return nn.Sequential(*_convolution(c, c, 3, stride, affine, dilation=2, depthwise=True))
    return nn.Sequential(*_convolution(c, c, int(name[4:]), stride, affine))


class Cell(nn.Module):
    """Nodes that add up their edges; the output is the concatenation of all nodes."""

    def __init__(
        self,
        inputs: tuple[int, int],
        channels: int,
        edges: Sequence[tuple[Edge, Sequence[str]]],
        *,
        reduces: bool,
        halve_first: bool,
        affine: bool,
    ) -> None:
        super().__init__()
        self.reduces = reduces
        self.before: nn.Module = (
            _Halve(inputs[0], channels, affine)
            if halve_first
            else nn.Sequential(*_convolution(inputs[0], channels, 1, 1, affine))
        )
        self.now = nn.Sequential(*_convolution(inputs[1], channels, 1, 1, affine))
        self.order = [edge for edge, _ in edges]
        self.edges = nn.ModuleDict()
        for (source, target), operations in edges:
            stride = 2 if reduces and source < 2 else 1
            self.edges[f"{source}_{target}"] = nn.ModuleDict(
                {o: _operation(o, channels, stride, affine) for o in operations}
            )

    def forward(self, first: Tensor, second: Tensor, mix: Tensor | None) -> Tensor:
        """`mix` is `[edges, operations]`, the weights of a super-network; None in a derived one."""
        found = {0: self.before(first), 1: self.now(second)}
        for index, (source, target) in enumerate(self.order):
            x = found[source]
            operations = list(self.edges[f"{source}_{target}"].values())  # type: ignore[operator]
            if mix is None:
                y = operations[0](x)
            else:
                y = sum(w * operation(x) for w, operation in zip(mix[index], operations))
            found[target] = found[target] + y if target in found else y
        return torch.cat([found[node] for node in sorted(found) if node > 1], 1)


class _Network(nn.Module):
    def __init__(
        self,
        normal: Sequence[tuple[Edge, Sequence[str]]],
        reduce: Sequence[tuple[Edge, Sequence[str]]],
        *,
        cells: int,
        channels: int,
        in_channels: int,
        classes: int,
        affine: bool,
    ) -> None:
        super().__init__()
        if cells < 1 or channels < 2:
            raise InvalidArgument(f"cells={cells} must be at least 1, channels={channels} 2")
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 2 * channels, 3, 1, 1, bias=False), nn.BatchNorm2d(2 * channels)
        )
        widths, halved = (2 * channels, 2 * channels), False
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduces = cells >= 3 and i in (cells // 3, 2 * cells // 3)
            channels *= 2 if reduces else 1
            edges = reduce if reduces else normal
            cell = Cell(widths, channels, edges, reduces=reduces, halve_first=halved, affine=affine)
            self.cells.append(cell)
            nodes = {target for (_, target), _ in edges}
            widths, halved = (widths[1], len(nodes) * channels), reduces
        self.head = nn.Linear(widths[1], classes)

    def _run(self, images: Tensor, normal: Tensor | None, reduce: Tensor | None) -> Tensor:
        first = second = self.stem(images)
        for cell in self.cells:
            first, second = second, cell(first, second, reduce if cell.reduces else normal)
        logits: Tensor = self.head(second.mean((2, 3)))
        return logits


class CellNetwork(_Network):
    """The network of a genotype.

    Args:
        genotype: of its cells.
        cells: how many; from 3 on, two of them reduce.
        channels: of the first cell; doubled by each reduction.
        in_channels: of the images.
        classes: outputs.
    """

    def __init__(
        self,
        genotype: Genotype,
        *,
        cells: int = 3,
        channels: int = 8,
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        super().__init__(
            [(e, (o,)) for e, o in genotype.normal],
            [(e, (o,)) for e, o in genotype.reduce],
            cells=cells, channels=channels, in_channels=in_channels, classes=classes, affine=True,
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Images `[batch, in_channels, height, width]` to logits."""
        return self._run(images, None, None)


class SuperNetwork(_Network):
    """All operations on all edges, mixed by the softmax of `alpha_normal` and `alpha_reduce`.

    Args:
        operations: names of OPERATIONS.
        nodes: in a cell.
        cells, channels, in_channels, classes: as in `CellNetwork`.
    """

    def __init__(
        self,
        operations: Sequence[str] = OPERATIONS,
        *,
        nodes: int = 2,
        cells: int = 3,
        channels: int = 8,
        in_channels: int = 3,
        classes: int = 10,
    ) -> None:
        unknown = [o for o in operations if o not in OPERATIONS]
        if unknown or not operations or nodes < 1:
            raise InvalidArgument(
                f"super-network: operations {unknown or operations} must be some of {OPERATIONS}, "
                f"nodes={nodes} at least 1"
            )
        edges = [((i, j), tuple(operations)) for j in range(2, 2 + nodes) for i in range(j)]
        super().__init__(
            edges, edges, cells=cells, channels=channels, in_channels=in_channels,
            classes=classes, affine=False,
        )  # fmt: skip
        self.operations, self.nodes = tuple(operations), nodes
        self.alpha_normal = nn.Parameter(1e-3 * torch.randn(len(edges), len(operations)))
        self.alpha_reduce = nn.Parameter(1e-3 * torch.randn(len(edges), len(operations)))

    def forward(self, images: Tensor) -> Tensor:
        """Images `[batch, in_channels, height, width]` to logits."""
        return self._run(images, self.alpha_normal.softmax(-1), self.alpha_reduce.softmax(-1))

    def derive(self) -> Genotype:
        """Of every edge the operation of largest weight that is not "none"; of every node the two
        edges of which that weight is largest."""
        return Genotype(self._derived(self.alpha_normal), self._derived(self.alpha_reduce))

    def _derived(self, alpha: Tensor) -> tuple[tuple[Edge, str], ...]:
        weights = alpha.detach().softmax(-1).clone()
        if "none" in self.operations:
            weights[:, self.operations.index("none")] = -1.0
        best, chosen = weights.max(-1)
        found: list[tuple[Edge, str]] = []
        row = 0
        for node in range(2, 2 + self.nodes):
            ranked = sorted(range(node), key=lambda i: -float(best[row + i]))[:2]
            found += [((i, node), self.operations[int(chosen[row + i])]) for i in sorted(ranked)]
            row += node
        return tuple(found)


def random_genotype(
    generator: torch.Generator, operations: Sequence[str] = OPERATIONS, nodes: int = 2
) -> Genotype:
    """Two random edges a node with a random operation each, "none" left out."""
    names = [o for o in operations if o != "none"]

    def draw() -> tuple[tuple[Edge, str], ...]:
        found: list[tuple[Edge, str]] = []
        for node in range(2, 2 + nodes):
            sources = sorted(torch.randperm(node, generator=generator)[:2].tolist())
            for i in sources:
                pick = int(torch.randint(len(names), (), generator=generator))
                found.append(((i, node), names[pick]))
        return tuple(found)

    return Genotype(draw(), draw())
