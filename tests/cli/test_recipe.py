"""`sparseworks recipe`: what it writes works, keeps the goals, and refuses what cannot be."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch

import sparseworks as sw
import tiny_models
from sparseworks.cli import main

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny Llama with a tokenizer and a text; a small net with its metric."""
    root = tmp_path_factory.mktemp("recipe")
    tiny_models.letters().save_pretrained(root / "lm")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=28,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=512,
        )
    ).save_pretrained(root / "lm")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    (root / "net.py").write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            def make():
                torch.manual_seed(0)
                return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                                     nn.Linear(128, 10))

            def data():
                g = torch.Generator().manual_seed(1)
                return [torch.randn(16, 64, generator=g) for _ in range(2)]

            DENSE = make()

            def nearness(model):
                x = data()[0]
                with torch.no_grad():
                    off = (model(x) - DENSE(x)).norm() / DENSE(x).norm()
                return float(1 / (1 + off))
            """
        )
    )
    return root


def recipe(work, *words, out):
    net = [f"{work}/net.py:make", "--metric", f"{work}/net.py:nearness", "--data",
           f"{work}/net.py:data", "--batch", "4", "--input-shape", "64"]  # fmt: skip
    return ["recipe", *net, *words, "--out", str(out)]


def test_keeps_the_goal_and_writes_a_model_that_runs(work, tmp_path, capsys):
    out = tmp_path / "out"
    goal = ["--goal", "size=0.6", "--budget", "20s", "--dtypes", "fp32"]
    assert main(recipe(work, *goal, out=out)) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    found = json.loads((out / "recipe.json").read_text())
    assert found["best_shares"]["size"] <= 0.6 and "best under size=0.6" in told
    whole = found["points"][0]["values"]["size"][0]
    met = [p for p in found["points"][1:] if p["values"]["size"][0] <= 0.6 * whole]
    best = max(p["values"]["quality"][0] for p in met)
    assert found["best_shares"]["quality"] == pytest.approx(best / found["dense"])
    assert {r["why"] for r in found["not_tried"]} <= {"its neighbours tell", "no time was left"}
    assert found["takes_training"] and (out / "recipe.html").is_file()
    front = [p for p in found["points"] if p["front"]]
    assert front and all(set(p["values"]) >= {"quality", "latency", "size"} for p in front)
    if (plan := out / "best" / "compiled.safetensors").is_file():
        assert sw.load_compiled(plan)(torch.randn(4, 64)).shape == (4, 10)
    if "slimming" not in found["best"]["family"]:
        net = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128), torch.nn.ReLU(),
            torch.nn.Linear(128, 10),
        )  # fmt: skip
        sw.load(out / "best" / "model.safetensors", net)


def test_a_language_model_becomes_a_decoder(work, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["recipe", str(work / "lm"), "--goal", "quality=0.5", "--budget", "15s", "--eval-data",
             str(work / "text.txt"), "--eval-samples", "2", "--data", str(work / "text.txt"),
             "--length", "32", "--samples", "8", "--out", str(out)]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    found = json.loads((out / "recipe.json").read_text())
    assert found["metric"] == "perplexity" and found["best"]["dtype"] in ("bf16", "int8", "int4")
    assert found["best_shares"]["quality"] >= 0.5
    decoder = sw.load_decoder(out / "best" / "compiled.safetensors")
    assert decoder(torch.tensor([[1, 2, 3]])).logits.shape[-1] == 28
    assert sw.from_pretrained(out / "best" / "checkpoint").config.model_type == "llama"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--goal", "speed=2"], "latency=0.5"),
        (["--budget", "soon"], "30m"),
        (["--dtypes", "int4"], "fp32, bf16, int8"),
    ],
)
def test_refusals_leave_nothing(words, message, work, tmp_path, capsys):
    assert main(recipe(work, *words, out=tmp_path / "out")) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_under_the_goals(work, tmp_path, capsys):
    goal = ["--goal", "size=0.001", "--budget", "1s", "--dtypes", "fp32", "--no-slimming"]
    assert main(recipe(work, *goal, out=tmp_path / "out")) == 0
    assert "none of the models tried meets size=0.001" in capsys.readouterr().out
    assert not (tmp_path / "out" / "best").exists()
