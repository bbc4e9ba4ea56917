"""The safetensors container, read with every doubt and written in a stream.

A file is eight bytes of header length (little endian), a JSON header and one buffer:

    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {...}}

Nothing in a header is believed before it is checked: tensors must tile the buffer exactly, without
gap or overlap, and have the size that their shape and dtype say.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import CheckpointError

__all__ = [
    "CHUNK",
    "DTYPES",
    "STORED_AS",
    "Container",
    "Part",
    "as_bytes",
    "header_bytes",
    "refuse_pickle",
]

CHUNK = 1 << 24  # bytes read at a time
_HEADER_LIMIT = 100_000_000  # the limit of the format
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
STORED_AS = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """One tensor of a file: where its bytes are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def refuse_pickle(path: Path, start: bytes = b"") -> None:
    """Raise when a path or its first bytes look like a pickle."""
    torch_zip = start.startswith(b"PK\x03\x04")
    plain = start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05" and any(start[4:8])
    if path.suffix.lower() in _PICKLES or torch_zip or plain:
        raise CheckpointError(
            f"{path}: looks like a pickle, which can run code when it is read; give a safetensors "
            "file (load the pickle yourself if you trust it, then `sw.save` the model)"
        )


class Container:
    """An open safetensors file whose header has been checked.

    Args:
        path: of the file.

    Raises:
        CheckpointError: missing, a pickle, truncated, or a header that is not sound; names the
            tensor where there is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if sys.byteorder != "little":
            raise CheckpointError("safetensors files are read on little-endian machines only")
        refuse_pickle(path)
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        try:
            size = os.fstat(self._file.fileno()).st_size
            self.raw_header = self._raw_header(size)
            self._start = 8 + len(self.raw_header)
            self.metadata, self.parts = self._parse(size - self._start)
        except BaseException:
            self.close()
            raise

    def _raw_header(self, size: int) -> bytes:
        prefix = os.pread(self._file.fileno(), 64, 0)
        length = int.from_bytes(prefix[:8], "little")
        if len(prefix) >= 8 and 2 <= length <= min(_HEADER_LIMIT, size - 8):
            header = bytearray()
            while len(header) < length:
                piece = os.pread(self._file.fileno(), length - len(header), 8 + len(header))
                if not piece:
                    break
                header += piece
            if header[:1] == b"{" and len(header) == length:
                return bytes(header)
        refuse_pickle(self.path, prefix)
        raise CheckpointError(
            f"{self.path}: not a safetensors file, or truncated within its header ({size} bytes)"
        )

    def _parse(self, data: int) -> tuple[dict[str, str], dict[str, Part]]:
        try:
            header = json.loads(self.raw_header.decode(), object_pairs_hook=self._unique)
        except (ValueError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: the header is not valid JSON") from error
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
            raise CheckpointError(f"{self.path}: the header's metadata is not a map of strings")
        parts = {name: self._part(name, entry, data) for name, entry in header.items()}
        position, before = 0, "the start of the data"
        for part in sorted(parts.values(), key=lambda p: (p.start, p.end)):
            if part.start != position:
                kind = "overlaps" if part.start < position else "leaves a gap after"
                raise CheckpointError(f"{self.path}: tensor {part.name!r} {kind} {before}")
            position, before = part.end, repr(part.name)
        if position != data:
            raise CheckpointError(
                f"{self.path}: {data - position} bytes after {before} belong to no tensor"
            )
        return metadata, parts

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{self.path}: the header names {twice!r} twice")
        return found

    def _part(self, name: str, entry: Any, data: int) -> Part:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where}: its header entry is malformed")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise CheckpointError(f"{where}: dtype {entry['dtype']!r} is not supported")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 64:
            raise CheckpointError(f"{where}: shape {shape} or offsets {offsets} are not sound")
        start, end = offsets
        if not start <= end:
            raise CheckpointError(f"{where}: its offsets {offsets} are out of order")
        if end > data:
            raise CheckpointError(
                f"{where}: its bytes {start} to {end} reach past the end of the data ({data} "
                "bytes); the file is truncated or its header altered"
            )
        if math.prod(shape) * dtype.itemsize != end - start:
            raise CheckpointError(
                f"{where}: shape {shape} of {entry['dtype']} does not take {end - start} bytes"
            )
        return Part(name, dtype, tuple(shape), start, end)

    def bytes_of(self, part: Part, start: int, count: int) -> Tensor:
        """uint8 `[count]` of a part, from its byte `start`."""
        buffer = torch.empty(count, dtype=torch.uint8)
        view, done = as_bytes(buffer), 0
        while done < count:
            offset = self._start + part.start + start + done
            try:
                read = os.preadv(self._file.fileno(), [view[done:]], offset)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: tensor {part.name!r} cannot be read ({error.strerror})"
                ) from error
            if read <= 0:
                raise CheckpointError(
                    f"{self.path}: tensor {part.name!r}: the file ended while it was read"
                )
            done += read
        return buffer

    def elements(self, part: Part, start: int = 0, count: int | None = None) -> Tensor:
        """Flat tensor of `count` elements of a part, from element `start`."""
        width = part.dtype.itemsize
        count = math.prod(part.shape) - start if count is None else count
        return self.bytes_of(part, start * width, count * width).view(part.dtype)

    def mapped(self, part: Part) -> Tensor:
        """A part as it lies in the file: its pages are read when they are looked at, and what is
        written to them stays in memory. A copy where the file does not align it."""
        begin = self._start + part.start
        if begin % part.dtype.itemsize or part.nbytes == 0:
            return self.elements(part).view(part.shape)
        size = os.fstat(self._file.fileno()).st_size
        whole = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)
        return whole[begin : begin + part.nbytes].view(part.dtype).view(part.shape)

    def pieces(self, part: Part) -> Iterator[memoryview]:
        """All bytes of a part, a chunk at a time."""
        for start in range(0, part.nbytes, CHUNK):
            yield as_bytes(self.bytes_of(part, start, min(CHUNK, part.nbytes - start)))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Container:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _counts(values: Any) -> bool:
    """A list of whole numbers, none negative."""
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def header_bytes(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> bytes:
    """The length and header of a file, padded so that the data starts at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, part in parts.items():
        header[name] = {
            "dtype": STORED_AS[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [part.start, part.end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise CheckpointError(f"the header would take {len(text)} bytes, over the format's limit")
    return len(text).to_bytes(8, "little") + text
