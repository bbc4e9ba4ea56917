"""Text: from files to token windows (language models) or padded passages (encoders)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.data.parquet import read_parquet
from sparseworks.data.paths import existing

__all__ = ["passages", "random_windows", "read_text", "token_ids", "windows"]

_SUFFIXES = {".txt", ".md", ".rst", ".py", ""}


def read_text(source: str | os.PathLike[str]) -> str:
    """The text of a file, of all text files of a folder (sorted), or of a parquet text column.

    Raises:
        DataError: missing, empty, or not UTF-8 text.
    """
    path = existing(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
        if not files:
            raise DataError(f"{path}: the folder holds no text file (.txt, .md, .rst, .py)")
        text = "\n\n".join(_read_file(f) for f in files)
    elif path.suffix == ".parquet":
        text = "\n\n".join(_text_column(path))
    else:
        text = _read_file(path)
    if not text.strip():
        raise DataError(f"{path}: the file is empty; calibration needs text")
    return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text (byte {error.start}); is it a text file?"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _text_column(path: Path) -> list[str]:
    table = read_parquet(path)
    from pyarrow import types

    for field in table.schema:
        if types.is_string(field.type) or types.is_large_string(field.type):
            return [t for t in table[field.name].to_pylist() if t]
    raise DataError(f"{path}: no text column among {table.schema.names}")


def token_ids(text: str, tokenizer: Any) -> Tensor:
    """All token ids of a text, `[tokens]` int64, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def random_windows(
    text: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Calibration windows from uniformly random places of a text, batches of `input_ids`.

    Only the text around each place is tokenized, so a large corpus costs no more than a small one.

    Raises:
        DataError: the text has fewer tokens than one window.
    """
    _positive(samples=samples, length=length, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    span = 12 * length  # characters: enough for a window of nearly any tokenizer
    whole = token_ids(text, tokenizer) if len(text) <= 4 * span else None
    rows: list[Tensor] = []
    while len(rows) < samples:
        if whole is None:
            start = int(torch.randint(0, len(text) - span, (), generator=generator))
            ids = token_ids(text[start : start + span], tokenizer)[1:]  # the first may be cut
            if len(ids) >= length:
                rows.append(ids[:length])
            else:
                whole = token_ids(text, tokenizer)
            continue
        if len(whole) < length:
            raise DataError(
                f"the text has {len(whole)} tokens, fewer than one window of {length}; "
                "give more text or a smaller length"
            )
        start = int(torch.randint(0, len(whole) - length + 1, (), generator=generator))
        rows.append(whole[start : start + length])
    return _batches(torch.stack(rows), batch_size)


def windows(ids: Tensor, *, length: int = 256, batch_size: int = 8) -> list[dict[str, Tensor]]:
    """Evaluation windows without overlap; the rest that fills no window is left out.

    Raises:
        DataError: the text has fewer tokens than one window.
    """
    _positive(length=length, batch_size=batch_size)
    count = len(ids) // length
    if count == 0:
        raise DataError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    return _batches(ids[: count * length].view(count, length), batch_size)


def passages(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    samples: int | None = None,
    length: int = 128,
    batch_size: int = 16,
    seed: int | None = None,
) -> list[dict[str, Tensor]]:
    """Padded passages for encoders: `input_ids` and `attention_mask` of each batch.

    Args:
        texts: one passage each.
        samples: how many; chosen at random with a seed, else the first.
        length: tokens at most.

    Raises:
        DataError: there is no passage.
    """
    _positive(length=length, batch_size=batch_size)
    chosen: Sequence[str] = [t for t in texts if t.strip()]
    if not chosen:
        raise DataError("the text holds no passage")
    if seed is not None:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[i] for i in order.tolist()]
    chosen = chosen[:samples]
    batches = []
    for start in range(0, len(chosen), batch_size):
        batch = tokenizer(
            list(chosen[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        batches.append({k: batch[k] for k in ("input_ids", "attention_mask")})
    return batches


def _batches(rows: Tensor, size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": rows[i : i + size]} for i in range(0, len(rows), size)]


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InvalidArgument(f"{name}={value} must be at least 1")
