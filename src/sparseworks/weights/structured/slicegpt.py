"""SliceGPT (Ashkboos et al. 2024, SliceGPT: Compress Large Language Models by Deleting Rows and
Columns, ICLR 2024, arXiv 2401.15024): a narrower residual stream.

RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q, so a decoder computes the same when the stream is
rotated and every matrix takes the rotation back: readers W <- W Q, writers W <- Q^T W (`[out,
in]`), gains of the norms moved into the readers before. With Q the eigenvectors, descending, of
H = sum x^T x + 0.01 mean(diag) I over calibration tokens, the last directions carry least: they
are deleted from every matrix. All in fp64; nothing is trained.

    basis per block  (the paper) Q anew before every norm, from signals through what is sliced
                     already; the shortcut becomes x S with S = Q_in[:, :w]^T Q_out[:, :w], so a
                     layer is a `SlicedLayer`. The last output keeps its full width (with banks
                     of experts, whose outputs are as wide as their inputs, it does not).
    basis shared     one Q for all, from x / rms(x) before every norm: no shortcuts, and the result
                     is the standard class of width w, which plain from_pretrained loads.

A sliced norm still divides by the old width d: its gain is sqrt(d / w) and its eps grows by d / w.
Heads, their grouping and rotary embeddings live inside of attention and stay as they are. A tied
head is cloned, as the embedding is rotated otherwise.

Differences from the official code: it may replace layer norms and finish with a random rotation of
what is kept; here only RMS-norm decoders are taken, and there is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sparseworks.core.errors import DataError, InvalidArgument, ModelError
from sparseworks.core.random import generator_for
from sparseworks.core.registry import MethodInfo
from sparseworks.models.calls import Arguments, Batch, call, move, token_mask
from sparseworks.models.tap import calibration_mode
from sparseworks.weights.structured.backup import Backup
from sparseworks.weights.structured.base import WholeModel
from sparseworks.weights.structured.planning import shapes_of
from sparseworks.weights.structured.result import SlimResult, Width
from sparseworks.weights.structured.sliced import decoder_layers, forget_shortcuts
from sparseworks.weights.structured.slicing import Stream

__all__ = ["SliceGPT", "principal_basis"]

Basis = Literal["block", "shared"]
Order = Literal["pca", "random", "variance", "magnitude"]
_DAMPING = 0.01


def principal_basis(gram: Tensor) -> Tensor:
    """Eigenvectors `[d, d]` of gram + 0.01 mean(diag) I as columns, largest eigenvalue first."""
    damped = gram + _DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    basis: Tensor = torch.linalg.eigh(damped).eigenvectors.flip(1)
    return basis


@dataclass(frozen=True)
class SliceGPT(WholeModel):
    """Rotate the residual stream and delete its least directions.

    Args:
        slicing: share of the width to delete; None: what the target of `slim` needs.
        basis: "block" (the paper's) or "shared" (a standard class); see this module.
        order: directions by "pca"; for comparison "random" (orthogonal), or the stream's own
            columns by "variance" or by "magnitude" of the weights that read and write them.
        multiple: the width is a multiple of it.
        seed: of the random order.
    """

    slicing: float | None = None
    basis: Basis = "block"
    order: Order = "pca"
    multiple: int = 8
    seed: int = 0

    info: ClassVar[MethodInfo] = MethodInfo(
        name="slicegpt",
        title="SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
        authors="Ashkboos et al.",
        year=2024,
        card="070",
        room="weights/structured",
        kind="whole-model",
        needs=("data",),
        pattern="rotated channels of the residual stream",
        budget="flops, params or slicing=",
        cost="two forward passes over the data and two eigendecompositions a layer",
        summary="rotate the residual stream by principal components and delete the least",
    )

    def __post_init__(self) -> None:
        if self.basis not in get_args(Basis) or self.order not in get_args(Order):
            raise InvalidArgument(
                f"slicegpt: basis={self.basis!r} is one of {get_args(Basis)}, "
                f"order={self.order!r} one of {get_args(Order)}"
            )
        if self.multiple < 1 or not (self.slicing is None or 0 <= self.slicing < 1):
            raise InvalidArgument("slicegpt: multiple= from 1, slicing= in [0, 1)")

    def slim(
        self,
        model: nn.Module,
        example: Arguments,
        targets: Mapping[str, float | None],
        batches: Sequence[Batch] | None,
    ) -> SlimResult:
        """Slice the model in place.

        Raises:
            InvalidArgument: no target, or one that no width reaches.
            DataError: no calibration data.
            ModelError: no RMS-norm decoder, or a config that cannot tell the width.
        """
        began = time.perf_counter()
        if not batches:
            raise DataError("slicegpt finds its basis in calibration data: give data=")
        backup = Backup()
        stream = Stream(model, decoder_layers(model), backup, self.basis == "block")
        width = self._width(stream, targets)
        before, parameters = shapes_of(model), sum(p.numel() for p in model.parameters())
        flops = stream.flops(None), stream.flops(width)
        try:
            with calibration_mode(model):
                stream.fuse_gains()
                if self.basis == "shared":
                    self._shared(stream, width, batches)
                else:
                    self._by_block(stream, width, batches)
            config = stream.told(width) if self.basis == "shared" else None
            after = shapes_of(model)
            tokens = _tokens(example)
            return SlimResult(
                self.info.name,
                {**targets, **asdict(self)},
                (Width("model.embed_tokens.weight axis 1", stream.width, width),),
                {n: (before[n], after[n]) for n in after if n in before and before[n] != after[n]},
                tuple(stream.changes),
                config,
                (flops[0] * tokens, flops[1] * tokens),
                (parameters, sum(p.numel() for p in model.parameters())),
                None,
                model,
                time.perf_counter() - began,
            )
        except BaseException:
            backup.restore()
            for layer in stream.layers:
                forget_shortcuts(layer)
            raise

    def _width(self, stream: Stream, targets: Mapping[str, float | None]) -> int:
        given = {k: v for k, v in targets.items() if v is not None}
        if self.slicing is not None:
            if given:
                raise InvalidArgument("slicegpt: slicing= is the target; leave flops=, params= out")
            width = int((1 - self.slicing) * stream.width + 1e-9) // self.multiple * self.multiple
            if width < 1:
                raise InvalidArgument(f"slicegpt: slicing={self.slicing} leaves no width")
            return stream.width if self.slicing == 0 else width
        if len(given) != 1 or "latency" in given:
            raise InvalidArgument("slicegpt: give slicing=, or one of flops=, params=")
        ((what, share),) = given.items()
        if not 0 < share < 1:
            raise InvalidArgument(f"{what}={share}: the share to keep lies between 0 and 1")
        count: Callable[[int], float] = stream.flops if what == "flops" else stream.parameters
        whole = stream.flops(None) if what == "flops" else float(stream.parameters(None))
        widths = range(self.multiple, stream.width + 1, self.multiple)
        fitting = [w for w in widths if count(w) <= share * whole]
        if not fitting:
            raise InvalidArgument(f"slicegpt: no width reaches {what}={share}")
        return fitting[-1]

    def _basis(self, gram: Tensor, stream: Stream, place: str) -> Tensor:
        if self.order == "pca":
            return principal_basis(gram)
        if self.order == "random":
            drawn = torch.randn(gram.shape, generator=generator_for(self.seed, place)).double()
            basis: Tensor = torch.linalg.qr(drawn.to(gram.device)).Q
            return basis
        strength = gram.diagonal() if self.order == "variance" else stream.magnitudes()
        return torch.eye(len(gram)).to(gram)[:, strength.argsort(descending=True, stable=True)]

    def _shared(self, stream: Stream, width: int, batches: Sequence[Batch]) -> None:
        gram = torch.zeros(stream.width, stream.width, dtype=torch.float64, device=stream.device)
        padding: list[Tensor | None] = [None]

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = _rows(args[0], padding[0])
            x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
            gram.addmm_(x.t(), x)

        handles = [n.register_forward_pre_hook(see) for n in stream.norms]
        try:
            for batch in batches:
                padding[0] = token_mask(batch)
                call(stream.model, move(batch, stream.device))
        finally:
            for handle in handles:
                handle.remove()
        basis = self._basis(gram, stream, "shared")[:, :width]
        stream.rotate_ends(basis, basis)
        for i in range(len(stream.layers)):
            stream.rotate_attention(i, basis, basis)
            stream.rotate_mlp(i, basis, basis)

    def _by_block(self, stream: Stream, width: int, batches: Sequence[Batch]) -> None:
        hidden, kwargs, masks = stream.capture(batches)
        basis = first = self._basis(_gram(hidden, masks), stream, "0")
        for i, layer in enumerate(stream.layers):
            # the layer as it is, on the projected stream, computes what the sliced one will
            came = basis[:, :width]
            hidden = [_projected(x, came) for x in hidden]
            hidden = [x + stream.attend(layer, x, kwargs[j][i]) for j, x in enumerate(hidden)]
            middle = self._basis(_gram(hidden, masks), stream, f"{i}.5")[:, :width]
            hidden = [_projected(y, middle) for y in hidden]
            hidden = [y + stream.mix(layer, y) for y in hidden]
            basis = self._basis(_gram(hidden, masks), stream, str(i + 1))
            full = i == len(stream.layers) - 1 and not stream.banked
            leaves = basis if full else basis[:, :width]
            stream.rotate_attention(i, came, middle)
            stream.rotate_mlp(i, middle, leaves)
            stream.shortcut(i, came.t() @ middle, middle.t() @ leaves)
        stream.rotate_ends(first[:, :width], leaves)


def _projected(hidden: Tensor, basis: Tensor) -> Tensor:
    """What a basis `[d, w]` keeps of hidden states, in the old directions."""
    return (hidden.double() @ basis @ basis.t()).to(hidden.dtype)


def _rows(hidden: Tensor, padding: Tensor | None) -> Tensor:
    """`[tokens, width]` in fp64, without padding."""
    rows = hidden.detach().double().reshape(-1, hidden.shape[-1])
    if padding is not None and padding.numel() == len(rows):
        rows = rows[padding.flatten().to(rows.device)]
    return rows


def _gram(hidden: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    total: Tensor | None = None
    for x, mask in zip(hidden, masks):
        rows = _rows(x, mask)
        part = rows.t() @ rows
        total = part if total is None else total + part
    assert total is not None
    if not bool(torch.isfinite(total).all()):
        raise ModelError("the hidden states of the calibration data are not finite")
    return total


def _tokens(example: Arguments) -> int:
    return next((v.numel() for v in example.values if isinstance(v, Tensor)), 1)
