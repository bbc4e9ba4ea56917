"""`sparseworks.io.inspect`: what a checkpoint holds, told by its headers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparseworks.io.records import Record, oldest_version

__all__ = ["CheckpointInfo", "TensorInfo", "inspect", "of_records", "signed_zero_note"]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Args:
        name, shape, dtype: of the tensor.
        layout: "dense", "bitmask", "2:4" and the like, "int4/16": 4 bits in groups of 16, "int4/16
            bitmask" or "int4/16 2:4": of some of these integers.
        sparsity: fraction of zeros, or None where only the values can tell.
        mask_sparsity: fraction masked, or None without a mask record.
        pattern: of the mask.
        nbytes: on disk.
        dense_bytes: what the dense tensor takes.
        signed_zero_bytes: of `nbytes`, what tells -0.0 from +0.0 (`weight *= mask` leaves -0.0).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    sparsity: float | None
    mask_sparsity: float | None
    pattern: str
    nbytes: int
    dense_bytes: int
    signed_zero_bytes: int = 0


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint and its tensors.

    Args:
        path: file or folder.
        kind: "sparseworks", "safetensors" or "compressed-tensors".
        method: what made it sparse, where that is recorded.
        tensors: one entry per tensor.
        file_bytes: of the files with weights, headers included.
        ties: other names of these tensors -> the name they are stored under.
        version: of our own format; 0 where it is another.
    """

    path: Path
    kind: str
    method: str
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    ties: Mapping[str, str] = field(default_factory=dict)
    version: int = 0

    @property
    def dense_bytes(self) -> int:
        return sum(t.dense_bytes for t in self.tensors)

    @property
    def signed_zero_bytes(self) -> int:
        """Bytes that tell -0.0 from +0.0; `save(..., signed_zeros=False)` spends none."""
        return sum(t.signed_zero_bytes for t in self.tensors)

    @property
    def masked_ratio(self) -> float | None:
        """Bytes stored over dense bytes of the tensors that have a mask."""
        masked = [t for t in self.tensors if t.mask_sparsity is not None]
        if not masked:
            return None
        return sum(t.nbytes for t in masked) / max(1, sum(t.dense_bytes for t in masked))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **{k: v for k, v in asdict(self).items() if k != "tensors"},
            "path": str(self.path),
            "dense_bytes": self.dense_bytes,
            "signed_zero_bytes": self.signed_zero_bytes,
            "tensors": [asdict(t) for t in self.tensors],
        }

    def __str__(self) -> str:
        dense = self.dense_bytes
        share = f", {self.file_bytes / dense:.1%} of its dense size" if dense else ""
        lines = [f"{self.path}: {self.kind}, {self.file_bytes / 1e6:.2f} MB{share}"]
        width = max((len(t.name) for t in self.tensors), default=0)
        for t in self.tensors:
            sparsity = "     ?" if t.sparsity is None else f"{t.sparsity:.4f}"
            shape = "x".join(map(str, t.shape)) or "scalar"
            lines.append(
                f"  {t.name:<{width}}  {shape:<16} {t.dtype:<10} {t.layout:<8} "
                f"sparsity {sparsity}  {t.nbytes:>12,} of {t.dense_bytes:,} bytes"
            )
        if note := signed_zero_note(self.signed_zero_bytes, self.file_bytes):
            lines.append(f"  {note}: save with signed_zeros=False to store +0.0")
        return "\n".join(lines)


def signed_zero_note(cost: int, file_bytes: int) -> str:
    """What the signs of zeros take of a file, in words; "" where it is nothing."""
    if not cost:
        return ""
    return f"telling -0.0 from +0.0 takes {cost:,} bytes, {cost / file_bytes:.1%} of the file"


def of_records(
    path: Path,
    records: Mapping[str, Record],
    file_bytes: int,
    method: str,
    ties: Mapping[str, str],
) -> CheckpointInfo:
    """The summary of a packed file."""
    return CheckpointInfo(
        path=path,
        kind="sparseworks",
        method=method,
        tensors=tuple(_of_record(name, r) for name, r in records.items()),
        file_bytes=file_bytes,
        ties=dict(ties),
        version=oldest_version(records.values()),
    )


def _of_record(name: str, r: Record) -> TensorInfo:
    total = max(1, r.numel)
    return TensorInfo(
        name=name,
        shape=r.shape,
        dtype=r.dtype,
        layout=_layout(r),
        sparsity=1.0 - r.nonzero / total if r.numel else 0.0,
        mask_sparsity=None if r.mask == "none" else 1.0 - r.kept / total,
        pattern=r.pattern,
        nbytes=r.nbytes,
        dense_bytes=r.dense_bytes,
        signed_zero_bytes=r.signed_zero_bytes,
    )


def _layout(r: Record) -> str:
    runs = f"{r.n}:{r.m}"
    if r.layout == "grid":
        places = runs if r.places == "nm" else "bitmask" if r.places else ""
        return f"int{r.bits}/{r.group} {places}".rstrip()
    return runs if r.layout == "nm" else r.layout


def inspect(path: str | os.PathLike[str], *, values: bool = False) -> CheckpointInfo:
    """What a checkpoint holds: shape, dtype, layout, sparsity and bytes of every tensor.

    Only headers are read, so this is quick for any size.

    Args:
        path: a safetensors file or a folder, written by us or by others.
        values: read the weights too where the header does not tell the sparsity.

    Raises:
        CheckpointError: no checkpoint, or one that is not sound.
    """
    from sparseworks.io.opening import open_checkpoint
    from sparseworks.io.packed import PackedCheckpoint

    with open_checkpoint(path) as checkpoint:
        if isinstance(checkpoint, PackedCheckpoint):
            return of_records(
                Path(path),
                checkpoint.records,
                checkpoint.file_bytes,
                checkpoint.method,
                checkpoint.ties,
            )
        tensors = []
        for name, stored in checkpoint.tensors.items():
            nonzero = stored.nonzero
            if nonzero is None and values:
                nonzero = sum(int((v != 0).sum()) for _, v in checkpoint.slices(name))
            sparsity = None if nonzero is None else 1.0 - nonzero / max(1, stored.numel)
            tensors.append(
                TensorInfo(
                    name=name,
                    shape=stored.shape,
                    dtype=str(stored.dtype).removeprefix("torch."),
                    layout=stored.layout,
                    sparsity=0.0 if stored.numel == 0 else sparsity,
                    mask_sparsity=None,
                    pattern="",
                    nbytes=stored.nbytes,
                    dense_bytes=stored.dense_bytes,
                )
            )
        return CheckpointInfo(
            Path(path),
            checkpoint.kind,
            "",
            tuple(tensors),
            checkpoint.file_bytes,
            dict(checkpoint.ties),
        )
