"""Files of our own beside the checkpoints (plans, decoders, gates, masks, training states), with a
checksum over all that they hold.

It stands in the header's metadata under `sparseworks_crc32`: CRC-32 of the names, dtypes, shapes
and bytes of the tensors and of the other metadata. CRC-32 and not the hash of checkpoints: decoders
of gigabytes are mapped, and it reads several times as fast. It finds every burst of damage up to 32
bits, and any other but for one in 4e9; it is no signature. Records of JSON have one of their
values, `crc32`. Files of earlier versions have none and are read as they are.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import CheckpointError, InvalidArgument
from sparseworks.io.container import STORED_AS, Part, as_bytes, header_bytes
from sparseworks.io.writing import write_at

__all__ = [
    "SEAL", "check_seal", "note_edits", "seal_of", "sealed", "text_seal", "unsealed",
    "write_sealed",
]  # fmt: skip

SEAL = "sparseworks_crc32"
_THREADS = 8


def seal_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The checksum of tensors and metadata (its own entry left out), 8 hexadecimal digits."""
    names = sorted(tensors)
    # zlib lets other threads run, and a file is read from the disk by all of them
    with ThreadPoolExecutor(min(_THREADS, torch.get_num_threads())) as pool:
        sums = pool.map(lambda n: zlib.crc32(as_bytes(tensors[n].contiguous())), names)
        lines = [[n, str(tensors[n].dtype), list(tensors[n].shape), s]
                 for n, s in zip(names, sums, strict=True)]  # fmt: skip
    rest = {k: v for k, v in sorted(metadata.items()) if k != SEAL}
    return text_seal([lines, rest])


def text_seal(value: Any) -> str:
    """The checksum of a value of JSON, however its file is indented."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def write_sealed(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a file with its checksum, in place: `atomic_file` gives the path.

    safetensors' own writer makes a hidden file of its own first, which would stay where a process
    is killed meanwhile.

    Raises:
        InvalidArgument: a dtype that the format does not have.
    """
    parts, position = {}, 0
    # wide ones first, so that all are aligned when the file is mapped
    for name in sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n)):
        tensor = tensors[name]
        if tensor.dtype not in STORED_AS:
            raise InvalidArgument(f"{path}: {name!r} is {tensor.dtype}, which no file here holds")
        end = position + tensor.numel() * tensor.dtype.itemsize
        parts[name] = Part(name, tensor.dtype, tuple(tensor.shape), position, end)
        position = end
    header = header_bytes(parts, {**metadata, SEAL: seal_of(tensors, metadata)})
    with open(path, "wb", buffering=0) as file:
        write_at(file.fileno(), memoryview(header), 0)
        for name, part in parts.items():
            data = as_bytes(tensors[name].contiguous())
            write_at(file.fileno(), data, len(header) + part.start)


def check_seal(where: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise where a file that was read does not hold what was written.

    Args:
        where: the file, for the message.
        tensors: all of it.
        metadata: of its header.

    Raises:
        CheckpointError: it does not.
    """
    wanted = metadata.get(SEAL)
    if wanted is not None and wanted != seal_of(tensors, metadata):
        raise CheckpointError(
            f"{where}: damaged: what it holds does not have the checksum that it was written with; "
            "make it again, or copy it again"
        )


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON with its checksum."""
    return {**record, "crc32": text_seal(record)}


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its checksum.

    Raises:
        ValueError: it does not hold what was written.
    """
    rest = {k: v for k, v in record.items() if k != "crc32"}
    if "crc32" in record and record["crc32"] != text_seal(rest):
        raise ValueError("it does not have the checksum that it was written with")
    return rest


def note_edits(file: Path, found: Mapping[str, Any], wanted: Any) -> None:
    """Warn where a file that people may edit (config.json) is not as it was saved.

    Args:
        file: for the message.
        found: what it says.
        wanted: its checksum when it was saved; None: not known.
    """
    if wanted is not None and wanted != text_seal(found):
        warnings.warn(
            f"{file}: is not as it was saved; if nobody edited it, it is damaged: copy it again",
            stacklevel=4,
        )
