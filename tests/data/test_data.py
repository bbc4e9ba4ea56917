"""Batches from every kind of source, and clear errors for what is not one."""

from __future__ import annotations

import io

import pytest
import torch

from sparseworks import data
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.data.builtin import docstrings, sources
from sparseworks.data.images import augment


class Characters:
    """A tokenizer of one token a character."""

    def __call__(self, text, **kwargs):
        if isinstance(text, str):
            return {"input_ids": [ord(c) % 100 for c in text]}
        width = min(kwargs["max_length"], max(map(len, text)))
        ids = torch.zeros(len(text), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, t in enumerate(text):
            codes = torch.tensor([ord(c) % 100 for c in t[:width]])
            ids[i, : len(codes)], mask[i, : len(codes)] = codes, 1
        return {"input_ids": ids, "attention_mask": mask}


TOK = Characters()


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"paragraph {i} " + "words " * 40 for i in range(100)))
    return path


def test_evaluation_windows_cover_the_text_once(corpus):
    batches = data.load(corpus, tokenizer=TOK, split="evaluation", samples=None, length=64)
    ids = torch.cat([b["input_ids"] for b in batches]).flatten()
    text = corpus.read_text()
    expected = torch.tensor(TOK(text)["input_ids"])
    assert torch.equal(ids, expected[: len(expected) // 64 * 64])


def test_calibration_is_seeded_and_comes_from_the_text(corpus):
    def draw(seed):
        return torch.cat(
            [b["input_ids"] for b in data.load(corpus, tokenizer=TOK, samples=5, length=32,
                                               seed=seed)]
        )  # fmt: skip

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    whole = ",".join(map(str, TOK(corpus.read_text())["input_ids"]))
    assert draw(1).shape == (5, 32)
    assert all(",".join(map(str, row.tolist())) in whole for row in draw(1))


def test_folders_parquet_and_datasets(tmp_path, corpus):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = corpus.read_text().split("\n\n")
    pq.write_table(pa.table({"id": [0] * 100, "text": texts}), tmp_path / "t.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(corpus.read_text())

    class Dataset:
        column_names = ("text",)

        def __getitem__(self, name):
            return texts

    expected = data.load(corpus, tokenizer=TOK, samples=3, length=16)
    for source in (tmp_path / "t.parquet", tmp_path / "folder", Dataset()):
        found = data.load(source, tokenizer=TOK, samples=3, length=16)
        assert torch.equal(found[0]["input_ids"], expected[0]["input_ids"])


def test_passages_are_padded_and_masked(corpus):
    batches = data.load(corpus, tokenizer=TOK, kind="passages", samples=10, length=20)
    assert sum(len(b["input_ids"]) for b in batches) == 10
    assert all(b["attention_mask"].shape == b["input_ids"].shape for b in batches)


def test_images_from_parquet_and_folders(tmp_path):
    pa = pytest.importorskip("pyarrow")
    image = pytest.importorskip("PIL.Image")
    import pyarrow.parquet as pq

    encoded = []
    for i in range(4):
        buffer = io.BytesIO()
        image.new("RGB", (8, 6), (i * 60, 0, 255)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
        folder = tmp_path / "set" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(buffer.getvalue())
    pq.write_table(pa.table({"image": encoded, "label": [0, 1, 0, 1]}), tmp_path / "set.parquet")
    flat = data.read_images(tmp_path / "set.parquet")
    assert flat.pixels.shape == (4, 3, 6, 8) and flat.labels.tolist() == [0, 1, 0, 1]
    assert flat.pixels[:, 0, 0, 0].tolist() == [0, 60, 120, 180]
    nested = data.read_images(tmp_path / "set")
    assert nested.labels.tolist() == [0, 0, 1, 1]
    (x, y), *_ = data.load(tmp_path / "set.parquet", samples=2, split="evaluation")
    assert x.shape == (2, 3, 6, 8) and y.tolist() == [0, 1]
    with pytest.raises(DataError, match="not an image"):
        pq.write_table(pa.table({"image": [b"x"], "label": [0]}), tmp_path / "bad.parquet")
        data.read_images(tmp_path / "bad.parquet")


def test_builtin_sets_are_real_and_stable():
    docs = docstrings()
    assert len(docs) > 1000 and docs == docstrings()
    assert len({d.summary for d in docs}) == len(docs)
    assert any(name == "json.decoder" for name, _ in sources())
    digits = data.digits()
    assert len(digits) == 1797 and digits.pixels.shape[1:] == (1, 8, 8)
    x = digits.normalized(slice(None))
    assert abs(float(x.mean())) < 0.05 and abs(float(x.std()) - 1) < 0.05


def test_calibration_and_evaluation_share_no_docstring():
    first = data.load("docstrings", tokenizer=TOK, kind="passages", samples=None, length=400)
    second = data.load("docstrings", tokenizer=TOK, kind="passages", samples=None, length=400,
                       split="evaluation")  # fmt: skip

    def rows(batches):
        return {tuple(r[m.bool()].tolist()) for b in batches
                for r, m in zip(b["input_ids"], b["attention_mask"])}  # fmt: skip

    assert not rows(first) & rows(second)


def test_augmentation_only_shifts_and_flips():
    x = torch.rand(16, 3, 8, 8)
    out = augment(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (4,) * 4)
    for i in range(16):
        crops = [padded[i, :, a : a + 8, b : b + 8] for a in range(9) for b in range(9)]
        assert any(torch.equal(out[i], c) or torch.equal(out[i], c.flip(2)) for c in crops)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda p: p / "missing.txt", "no such file"),
        (lambda p: (p / "empty.txt", (p / "empty.txt").write_text(" \n"))[0], "empty"),
        (lambda p: (p / "b.txt", (p / "b.txt").write_bytes(b"\xff\xfe\x80"))[0], "not UTF-8"),
        (lambda p: (p / "s.txt", (p / "s.txt").write_text("short"))[0], "fewer than one window"),
        (lambda p: (p / "x.parquet", (p / "x.parquet").write_text("no"))[0], "parquet"),
        (lambda p: (p / "dir", (p / "dir").mkdir())[0], "no text file"),
        (lambda p: [], "empty"),
    ],
)
def test_bad_sources(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        data.load(make(tmp_path), tokenizer=TOK)


def test_text_needs_a_tokenizer(corpus):
    with pytest.raises(InvalidArgument, match="tokenizer"):
        data.load(corpus)
