"""Examples to fine-tune on: windows of text, prompts with completions, labelled texts, images.

| source | becomes |
| --- | --- |
| a text file, a folder of texts; rows with `text` alone | windows of tokens, every token a target |
| rows with `prompt`, `completion` | one example a row; targets are the completion's tokens |
| rows with `messages` (role, content) | the chat template; targets are the last message's tokens |
| rows with `text`, `label` | one example a row, and its class |
| rows with `image`, `label`; a folder with one folder of images a class | likewise |

Rows are those of a .jsonl, .csv or .parquet file.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.data.images import ImageSet, holds_images, read_images
from sparseworks.data.parquet import column_names, read_parquet
from sparseworks.data.paths import existing
from sparseworks.data.text import read_text, token_ids, windows

__all__ = ["Examples", "Images", "classes_of", "completions", "kind_of_source", "labelled_texts",
           "padded", "read_rows", "text_windows"]  # fmt: skip

Kind = Literal["text", "completions", "labelled texts", "images"]
Examples = Sequence[Mapping[str, Any]]
"""What a loader of `torch.utils.data` takes: a length, and rows by their index."""
_ROWS = (".jsonl", ".csv", ".parquet")


def kind_of_source(source: str | os.PathLike[str]) -> Kind:
    """What a file or folder holds, told from its columns.

    Raises:
        DataError: nothing there, or columns of none of the kinds.
    """
    path = existing(source)
    if holds_images(path):
        return "images"
    if path.is_dir() or path.suffix not in _ROWS:
        return "text"
    names = set(_columns(path))
    if names & {"image", "img"}:
        return "images"
    if {"prompt", "completion"} <= names or "messages" in names:
        return "completions"
    if "text" in names:
        return "labelled texts" if "label" in names else "text"
    raise DataError(
        f"{path}: has columns {sorted(names)}; needs text, text and label, prompt and completion, "
        "messages, or image and label"
    )


def read_rows(source: str | os.PathLike[str], limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .csv or .parquet file, the first `limit` of them where it is given.

    Raises:
        DataError: missing, empty or malformed, and where.
    """
    path = existing(source)
    rows: list[dict[str, Any]] = []
    try:
        if path.suffix == ".parquet":
            rows = read_parquet(path).slice(0, limit).to_pylist()
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(itertools.islice(csv.DictReader(file), limit))
        else:
            with path.open(encoding="utf-8") as file:
                lines = ((n, line) for n, line in enumerate(file, 1) if line.strip())
                for number, line in itertools.islice(lines, limit):
                    rows.append(_object(line, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def text_windows(source: str | os.PathLike[str], tokenizer: Any, length: int) -> Examples:
    """Windows of `length` tokens without overlap; `input_ids` and equal `labels` of each.

    Raises:
        DataError: fewer tokens than one window.
    """
    path = existing(source)
    if path.suffix in (".jsonl", ".csv"):
        text = "\n\n".join(_words(r, "text", f"{path}, row {i}") for i, r in _numbered(path))
    else:
        text = read_text(path)
    [ids] = [b["input_ids"] for b in windows(token_ids(text, tokenizer), length=length,
                                             batch_size=1 << 62)]  # fmt: skip
    return [{"input_ids": row, "labels": row} for row in ids]


def completions(source: str | os.PathLike[str], tokenizer: Any, length: int) -> Examples:
    """One example a row; tokens of the prompt are no targets (label -100).

    What is longer than `length` tokens loses its beginning, so that the completion stays.

    Raises:
        DataError: a row without its fields, or without a single target.
        InvalidArgument: messages for a tokenizer that has no chat template.
    """
    path = existing(source)
    examples = []
    for number, row in _numbered(path):
        where = f"{path}, row {number}"
        if "messages" in row:
            prompt, completion = _chat(row["messages"], tokenizer, where)
        else:
            prompt = _ids(tokenizer, _words(row, "prompt", where))
            completion = _ids(tokenizer, _words(row, "completion", where))
            if tokenizer.eos_token_id is not None:
                completion = [*completion, tokenizer.eos_token_id]
        if not completion:
            raise DataError(f"{where}: the completion has no tokens")
        ids = torch.tensor([*prompt, *completion])[-length:]
        labels = torch.tensor([*[-100] * len(prompt), *completion])[-length:]
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def classes_of(source: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of the classes that the labels of a source name, sorted (numbers by value)."""
    return _classes([str(r.get("label")) for r in read_rows(source)])


def labelled_texts(
    source: str | os.PathLike[str], tokenizer: Any, length: int, classes: Sequence[str]
) -> Examples:
    """One example a row; `labels` is the place of its label among `classes`.

    Raises:
        DataError: a row without text, or with a label that is none of the classes.
    """
    path = existing(source)
    places = {name: i for i, name in enumerate(classes)}
    examples = []
    for number, row in _numbered(path):
        where = f"{path}, row {number}"
        label = str(row.get("label"))
        if label not in places:
            raise DataError(f"{where}: label {label!r} is none of the classes {list(classes)}")
        ids = tokenizer(_words(row, "text", where), truncation=True, max_length=length)["input_ids"]
        examples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(places[label])})
    return examples


@dataclass(frozen=True)
class Images:
    """Images as a Hugging Face model takes them: `pixel_values` and `labels` of each.

    Args:
        images: of one size.
        size: `(height, width)` that the model takes; others are resized (bilinear).
    """

    images: ImageSet
    size: tuple[int, int]

    @classmethod
    def read(cls, source: Any, size: tuple[int, int], limit: int | None, **normal: Any) -> Images:
        """From what `read_images` reads; `normal` gives mean and std."""
        found = read_images(source, limit=limit)
        return cls(ImageSet(found.pixels, found.labels, **normal), size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = self.images.normalized(slice(index, index + 1))
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True, align_corners=False)
        return {"pixel_values": x[0], "labels": self.images.labels[index]}


def padded(rows: Sequence[Mapping[str, Any]], padding: int = 0) -> dict[str, Tensor]:
    """A batch of examples: token rows are filled up on the right, with labels -100.

    Args:
        rows: examples of one kind.
        padding: the token to fill up with; `attention_mask` is 0 there.
    """
    if "input_ids" not in rows[0]:
        return {k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in rows[0]}
    sizes = [len(r["input_ids"]) for r in rows]
    most = max(sizes)

    def filled(name: str, value: int) -> Tensor:
        return torch.stack([F.pad(r[name], (0, most - len(r[name])), value=value) for r in rows])

    batch = {"input_ids": filled("input_ids", padding)}
    if min(sizes) < most:
        batch["attention_mask"] = (torch.arange(most) < torch.tensor(sizes)[:, None]).long()
    per_token = rows[0]["labels"].ndim == 1
    batch["labels"] = (
        filled("labels", -100) if per_token else torch.stack([r["labels"] for r in rows])
    )
    return batch


def _columns(path: Path) -> list[str]:
    return column_names(path) if path.suffix == ".parquet" else list(read_rows(path, 1)[0])


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: a JSON object is needed, not {type(found).__name__}")
    return found


def _numbered(path: Path) -> Any:
    return enumerate(read_rows(path), 1)


def _words(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} is {value!r}, not text")
    return value


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _chat(messages: Any, tokenizer: Any, where: str) -> tuple[list[int], list[int]]:
    """Tokens before the last message and of it."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InvalidArgument(
            "the tokenizer has no chat template: give rows with prompt and completion instead"
        )
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages
    )
    if not good or len(messages) < 2:
        raise DataError(f"{where}: messages must be two or more objects with role and content")
    ids = [
        tokenizer.apply_chat_template(m, tokenize=True, return_dict=True, **more)["input_ids"]
        for m, more in ((messages[:-1], {"add_generation_prompt": True}), (messages, {}))
    ]
    before, whole = list(ids[0]), list(ids[1])
    if whole[: len(before)] != before:
        raise InvalidArgument(
            "the chat template writes earlier messages otherwise when more follow, so the last "
            "one's tokens cannot be told: give rows with prompt and completion instead"
        )
    return before, whole[len(before) :]


def _classes(labels: Sequence[str]) -> tuple[str, ...]:
    names = set(labels)
    if all(n.lstrip("-").isdigit() for n in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))
