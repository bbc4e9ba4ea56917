"""Examples for fine-tuning: which tokens are targets, padding, classes, and broken files."""

from __future__ import annotations

import json

import pytest
import torch

from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.data.finetuning import (
    Images,
    classes_of,
    completions,
    kind_of_source,
    labelled_texts,
    padded,
    read_rows,
    text_windows,
)


class Letters:
    """A tokenizer: a letter is a token; 0 begins a text that takes special tokens."""

    eos_token_id = 99
    chat_template = None

    def __call__(self, text, add_special_tokens=True, truncation=False, max_length=None, **_):
        ids = [0] * add_special_tokens + [ord(c) - 96 for c in text]
        return {"input_ids": ids[:max_length] if truncation else ids}

    def apply_chat_template(self, messages, add_generation_prompt=False, **_):
        ids = [t for m in messages for t in [50, *[ord(c) - 96 for c in m["content"]]]]
        return {"input_ids": ids + [50] * add_generation_prompt}


def lines(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_the_completion_alone_is_a_target(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cd"})
    [row] = completions(path, Letters(), 10)
    assert row["input_ids"].tolist() == [1, 2, 3, 4, 99]
    assert row["labels"].tolist() == [-100, -100, 3, 4, 99]
    [short] = completions(path, Letters(), 4)  # the beginning goes
    assert short["input_ids"].tolist() == [2, 3, 4, 99]
    assert short["labels"].tolist() == [-100, 3, 4, 99]


def test_the_last_message_is_the_target(tmp_path):
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    path = lines(tmp_path / "a.jsonl", {"messages": said})
    with pytest.raises(InvalidArgument, match="chat template"):
        completions(path, Letters(), 10)
    tokenizer = Letters()
    tokenizer.chat_template = "there"
    [row] = completions(path, tokenizer, 10)
    assert row["input_ids"].tolist() == [50, 1, 2, 50, 3]
    assert row["labels"].tolist() == [-100, -100, -100, -100, 3]
    with pytest.raises(DataError, match=r"row 1"):
        completions(lines(tmp_path / "b.jsonl", {"messages": said[:1]}), tokenizer, 10)


def test_batches_are_padded_on_the_right(tmp_path):
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 2, 3])},
            {"input_ids": torch.tensor([4]), "labels": torch.tensor([4])}]  # fmt: skip
    batch = padded(rows, 7)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
    assert "attention_mask" not in padded(rows[:1])
    classes = [{"input_ids": r["input_ids"], "labels": torch.tensor(i)} for i, r in enumerate(rows)]
    assert padded(classes)["labels"].tolist() == [0, 1]


def test_classes_and_labels(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"a,b",10\nc,9\n')
    assert kind_of_source(path) == "labelled texts" and classes_of(path) == ("9", "10")
    rows = labelled_texts(path, Letters(), 2, ("9", "10"))
    assert [int(r["labels"]) for r in rows] == [1, 0]
    assert rows[1]["input_ids"].tolist() == [0, 3]
    with pytest.raises(DataError, match=r"row 1.*'10'"):
        labelled_texts(path, Letters(), 2, ("9",))


def test_windows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefg")
    rows = text_windows(path, Letters(), 3)
    assert [r["input_ids"].tolist() for r in rows] == [[1, 2, 3], [4, 5, 6]]
    assert torch.equal(rows[0]["labels"], rows[0]["input_ids"])


def test_images_are_resized(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for label in "ab":
        (tmp_path / label).mkdir()
        Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / label / "x.png")
    assert kind_of_source(tmp_path) == "images"
    images = Images.read(tmp_path, (6, 6), None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    row = images[1]
    assert row["pixel_values"].shape == (3, 6, 6) and int(row["labels"]) == 1
    assert torch.allclose(row["pixel_values"][0], torch.ones(6, 6))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": 1}\n{"text"', "line 2"),
        ("a.jsonl", b"[1]\n", "line 1.*list"),
        ("a.jsonl", b"", "no rows"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"text\n\xff\xfe\n", "UTF-8"),
        ("a.parquet", b"PAR1", "not a parquet"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_columns_of_no_kind(tmp_path):
    with pytest.raises(DataError, match="prompt and completion"):
        kind_of_source(lines(tmp_path / "a.jsonl", {"question": "a"}))
    with pytest.raises(DataError, match="row 1: 'text' is 5"):
        text_windows(lines(tmp_path / "b.jsonl", {"text": 5}), Letters(), 2)
