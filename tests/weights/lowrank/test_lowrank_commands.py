"""Low-rank training of a language model and the DCT optimizer from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import sparseworks as sw
from sparseworks.cli import main

DATA = Path(os.environ.get("SPARSEWORKS_DATA", "../shared/data"))
MODEL = DATA / "models" / "novel-llama-6m"
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="no data: set SPARSEWORKS_DATA")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((DATA / "text" / "novels-valid.txt").read_text()[:6_000])
    return path


def train(text, out, *more):
    words = ["train", str(MODEL), "--data", str(text), "--length", "32", "--batch-size", "4",
             "--epochs", "1", "--no-tensorboard", "--out", str(out), *more]  # fmt: skip
    assert main(words) == 0
    return json.loads((out / "result.json").read_text())


def test_a_merged_folder_is_an_ordinary_one_and_parts_are_warned_of(text, tmp_path, capsys):
    options = ("--method", "sltrain", "--sparsity", "0.97", "--option", "rank=8", "start=weights")
    done = train(text, tmp_path / "merged", *options, "after=merged")
    assert done["warnings"] == []
    model = sw.from_pretrained(done["checkpoint"])
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all())
    done = train(text, tmp_path / "parts", *options)
    assert "after=merged" in done["warnings"][0]
    assert done["sparsity"] == pytest.approx(0.97, abs=1e-3)


def test_the_dct_optimizer_and_its_options(text, tmp_path, capsys):
    optimizer = ("--method", "dense", "--optimizer", "dct-adamw")
    done = train(text, tmp_path / "dct", *optimizer, "--optimizer-option", "rank=16", "norm=l2")
    assert done["options"]["optimizer_option"] == ["rank=16", "norm=l2"]
    words = ["train", str(MODEL), "--data", str(text), "--out", str(tmp_path / "no"), "--method",
             "dense", "--optimizer"]  # fmt: skip
    assert main([*words, "dct-adamw", "--optimizer-option", "ranks=3"]) == 1
    assert "no option 'ranks'" in capsys.readouterr().err
    assert main([*words, "adam"]) == 1
    assert main([*words, "adamw", "--optimizer-option", "rank=3"]) == 1
    assert not (tmp_path / "no").exists()
