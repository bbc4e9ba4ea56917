"""Reading a packed file: every doubt first, then the weights slice by slice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import CheckpointError
from sparseworks.core.masks import MaskEntry, Masks, pack_bits, unpack_bits
from sparseworks.io.bits import count_true, top_bit, words
from sparseworks.io.checkpoint import Checkpoint, Stored
from sparseworks.io.codes import code_bits, codes_to_mask
from sparseworks.io.container import Container, Part
from sparseworks.io.encoding import SLICE
from sparseworks.io.integers import read_grid
from sparseworks.io.reading import read_record
from sparseworks.io.records import FORMAT_VERSION, METADATA_KEY, part_name
from sparseworks.models.matrix import of_matrix
from sparseworks.models.quantized import Grids, Quantized

__all__ = ["DIGEST_KEY", "ZERO_DIGEST", "PackedCheckpoint", "hasher", "header_digest"]

DIGEST_KEY = "sparseworks_digest"
ZERO_DIGEST = "0" * 32


def hasher() -> Any:
    """BLAKE2b of 128 bits: finds damage and mistakes; it is no signature."""
    return hashlib.blake2b(digest_size=16)


def header_digest(header: bytes, digest: str) -> str:
    """Hash of a header in which its own digest is replaced by zeros; "" where it is not."""
    entry = f'"{DIGEST_KEY}":"{digest}"'.encode()
    if header.count(entry) != 1:
        return ""
    h = hasher()
    h.update(header.replace(entry, f'"{DIGEST_KEY}":"{ZERO_DIGEST}"'.encode()))
    return str(h.hexdigest())


class PackedCheckpoint(Checkpoint):
    """A file that `save` wrote.

    Raises:
        CheckpointError: anything in the header is unsound; the tensor is named where there is one.
    """

    kind = "sparseworks"

    def __init__(self, container: Container) -> None:
        super().__init__(container.path)
        self._file = container
        self.file_bytes = container.path.stat().st_size
        header = self._header()
        self.method: str = header["method"]
        self.model: str = header["model"]
        self.ties: dict[str, str] = header["ties"]
        self.records = {
            name: read_record(f"{self.path}: tensor {name!r}", entry)
            for name, entry in header["tensors"].items()
        }
        self._parts = self._match_parts()
        for alias, name in self.ties.items():
            if name not in self.records or alias in self.records:
                raise CheckpointError(f"{self.path}: {alias!r} is tied to {name!r}: not possible")
        self._digest = container.metadata.get(DIGEST_KEY, "")
        self.tensors = {
            name: Stored(r.torch_dtype, r.shape, r.layout, r.nbytes, r.nonzero)
            for name, r in self.records.items()
        }

    @staticmethod
    def recognises(container: Container) -> bool:
        return METADATA_KEY in container.metadata

    def _header(self) -> dict[str, Any]:
        damaged = CheckpointError(f"{self.path}: its sparseworks metadata is damaged")
        try:
            header = json.loads(self._file.metadata[METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise damaged from error
        kinds = {"method": str, "model": str, "ties": dict, "tensors": dict}
        if not isinstance(header, dict) or type(header.get("version")) is not int:
            raise damaged
        if not 1 <= header["version"] <= FORMAT_VERSION:
            raise CheckpointError(
                f"{self.path}: format version {header['version']}; this sparseworks reads 1 to "
                f"{FORMAT_VERSION}, so a newer one is needed"
            )
        if any(type(header.get(k)) is not v for k, v in kinds.items()):
            raise damaged
        if not all(isinstance(v, str) for v in header["ties"].values()):
            raise damaged
        return header

    def _match_parts(self) -> dict[str, dict[str, Part]]:
        """Every part that the records speak of, of the right shape, and no others."""
        found: dict[str, dict[str, Part]] = {}
        left = dict(self._file.parts)
        for name, record in self.records.items():
            found[name] = {}
            for part, (dtype, shape) in record.parts().items():
                stored = left.pop(part_name(name, part), None)
                if stored is None or stored.dtype != dtype or stored.shape != shape:
                    what = "is missing" if stored is None else "has another shape or dtype"
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r}: its part {part or 'values'!r} {what}"
                    )
                found[name][part] = stored
        if left:
            raise CheckpointError(f"{self.path}: tensor {next(iter(left))!r} has no record")
        return found

    def verify(self, name: str) -> None:
        record, parts = self.records[name], self._parts[name]
        h = hasher()
        h.update(record.seal())
        for part in record.parts():
            for piece in self._file.pieces(parts[part]):
                h.update(piece)
        if h.hexdigest() != record.hash:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is damaged: its bytes do not have the recorded hash"
            )
        self._check_counts(name)

    def finish_verify(self) -> None:
        digest = header_digest(self._file.raw_header, self._digest)
        if not digest or digest != self._digest:
            raise CheckpointError(f"{self.path}: the header was altered (no tensor is at fault)")

    def _check_counts(self, name: str) -> None:
        """What the decoder relies on, in case a file was made to lie."""
        record = self.records[name]
        bad = CheckpointError(f"{self.path}: tensor {name!r}: its bits do not match its record")
        if record.layout == "grid":
            self._integers(name)
        elif record.layout != "dense":
            count = sum(count_true(s) for _, s in self._stored(name))
            if count != record.stored:
                raise bad
        groups = record.numel // max(1, record.group)
        bits = {"bitmask": record.bitmask_bits, "signs": record.numel - record.stored,
                "live": groups}  # fmt: skip
        for part, total in bits.items():
            if part in record.parts() and self._padding(name, part, total):
                raise bad
        if record.mask == "own":
            entry = self._mask(name)
            if entry.kept != count_true(entry.mask) or self._padding(name, "mask", record.numel):
                raise bad

    def _padding(self, name: str, part: str, bits: int) -> bool:
        """Whether a bit past the end of a packed part is set."""
        if bits % 8 == 0:
            return False
        last = self._file.elements(self._parts[name][part], bits // 8, 1)
        return bool(int(last.item()) >> (bits % 8))

    def _stored(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(start, bool: stored) slice by slice, in stored order."""
        record, parts = self.records[name], self._parts[name]
        step = SLICE if record.layout == "bitmask" else SLICE // (8 * record.m) * 8 * record.m
        for start in range(0, record.numel, step):
            size = min(step, record.numel - start)
            if record.layout == "bitmask":
                packed = self._file.elements(parts["bitmask"], start // 8, (size + 7) // 8)
                yield start, unpack_bits(packed, (size,))
                continue
            width = code_bits(record.n, record.m)
            first, runs = start // record.m * width // 8, size // record.m
            packed = self._file.elements(parts["codes"], first, (runs * width + 7) // 8)
            mask = codes_to_mask(packed, runs, record.n, record.m)
            if mask is None:
                raise CheckpointError(f"{self.path}: tensor {name!r}: a code is out of range")
            yield start, mask

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        record, parts = self.records[name], self._parts[name]
        if record.layout == "grid":
            yield 0, self._integers(name).weight(record.torch_dtype).view(-1)
            return
        if not record.moved:
            yield from self._in_stored_order(name)
            return
        rest = [s for i, s in enumerate(record.shape) if i != record.axis]
        flat = torch.empty(record.numel, dtype=parts["values"].dtype)
        for start, values in self._in_stored_order(name):
            flat[start : start + values.numel()] = values
        moved = flat.view(*rest, record.shape[record.axis])
        yield 0, moved.movedim(-1, record.axis).reshape(-1)

    def _in_stored_order(self, name: str) -> Iterator[tuple[int, Tensor]]:
        record, parts = self.records[name], self._parts[name]
        dtype = record.torch_dtype
        if record.layout == "dense":
            for start in range(0, record.numel, SLICE):
                size = min(SLICE, record.numel - start) * dtype.itemsize
                raw = self._file.bytes_of(parts[""], start * dtype.itemsize, size)
                yield start, raw.view(dtype)
            return
        position = 0
        for start, stored in self._stored(name):
            count = count_true(stored)
            values = self._file.elements(parts["values"], position, count)
            weights = torch.zeros(stored.numel(), dtype=dtype)
            words(weights).masked_scatter_(stored, words(values))
            if record.signs:
                negative = self._signs(parts["signs"], start - position, stored.numel() - count)
                words(weights)[~stored] = torch.where(negative, top_bit(dtype), 0).to(
                    words(weights).dtype
                )
            position += count
            yield start, weights

    def _signs(self, part: Part, start: int, count: int) -> Tensor:
        """Bits `start` to `start + count` of a packed part."""
        skip = start % 8
        packed = self._file.elements(part, start // 8, (skip + count + 7) // 8)
        return unpack_bits(packed, (packed.numel() * 8,))[skip : skip + count]

    def _integers(self, name: str) -> Quantized:
        return self._grid(name)[0]

    def _grid(self, name: str) -> tuple[Quantized, Tensor]:
        parts = self._parts[name]
        found = read_grid(self.records[name], lambda part: self._file.elements(parts[part]))
        if found is None:
            raise CheckpointError(f"{self.path}: tensor {name!r}: its bits do not match its record")
        return found

    def _mask(self, name: str) -> MaskEntry:
        record, parts = self.records[name], self._parts[name]
        if record.mask == "full":
            packed = pack_bits(torch.ones(record.numel, dtype=torch.bool))
        elif record.mask == "own":
            packed = self._file.elements(parts["mask"])
        elif record.layout == "bitmask":
            packed = self._file.elements(parts["bitmask"])
        elif record.layout == "grid":
            integers, stored = self._grid(name)
            packed = pack_bits(of_matrix(stored, record.shape, integers.layout))
        else:
            mask = torch.cat([m for _, m in self._stored(name)])
            if record.moved:
                rest = [s for i, s in enumerate(record.shape) if i != record.axis]
                mask = mask.view(*rest, -1).movedim(-1, record.axis).reshape(-1)
            packed = pack_bits(mask)
        return MaskEntry(packed, record.shape, record.kept, record.pattern)

    def masks(self) -> Masks | None:
        entries = {alias: self._mask(name) for name, r in self.records.items() for alias in r.names}
        return Masks(entries, self.method) if entries or self.method else None

    def grids(self) -> Grids:
        found = {n: self._integers(n) for n, r in self.records.items() if r.layout == "grid"}
        return Grids(found)

    def close(self) -> None:
        self._file.close()
