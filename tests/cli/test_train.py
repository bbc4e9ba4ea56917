"""`sparseworks train`: what it writes, that a kill costs nothing, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

import sparseworks as sw
import tiny_models
from sparseworks.cli import main
from sparseworks.io import inspect
from sparseworks.training.checkpointing import load_state
from tracked import READERS

NET = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 10))

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(65, 10))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A classifier factory, its weights, a tiny Llama with a tokenizer, a text, and images."""
    from PIL import Image
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("train")
    (root / "net.py").write_text(NET)
    tiny_models.letters().save_pretrained(root / "lm")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=28, hidden_size=16, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=1, intermediate_size=24)
    ).save_pretrained(root / "lm")  # fmt: skip
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 60)
    g = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        (root / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(root / "images" / label / f"{i}.png")
    return root


def arguments(work, out, *more, method="rigl", sparsity=0.8):
    chosen = ["--method", method, *(["--sparsity", sparsity] if sparsity is not None else [])]
    base = [f"{work}/net.py:make", "--data", "digits", "--samples", 256, "--batch-size", 32,
            "--epochs", 3, "--no-augment", "--no-tensorboard", "--out", out]  # fmt: skip
    return ["train", *map(str, [*base, *chosen, *more])]


def tensors(path):
    """All tensors of a saved model, for comparison."""
    module = {}
    exec(NET, module)
    model = sw.load(path, module["make"]())
    return {**model.state_dict(), **{f"mask {k}": m for k, m in (sw.masks(model) or {}).items()}}


def history(out):
    rows = json.loads((out / "result.json").read_text())["history"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def fails(capsys, *words):
    """The one-line error of a command that must fail."""
    assert main([str(w) for w in words]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    return error[0]


def killed_at(step, words):
    """Run the command in another process that gets SIGKILL right after a step."""
    code = textwrap.dedent(f"""
        import os, signal, sys
        from sparseworks.cli import main
        from sparseworks.training import loop
        step = loop.Training._advance
        def advance(self, batches):
            step(self, batches)
            if self.step == {step}:
                os.kill(os.getpid(), signal.SIGKILL)
        loop.Training._advance = advance
        sys.exit(main({words!r}))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


METHODS = {
    "gradual": ["--option", "every=3", "--amp", "bf16"],
    "rigl": ["--option", "every=3", "--optimizer", "adamw", "--clip", 0.5],
    "granet": ["--option", "every=3", "--accumulate", 2],
    "set": [],  # the interval of 24 steps
    "iss-p": [],
    "sr-ste": ["--pattern", "unstructured", "--accumulate", 2, "--option", "decay=0.01"],
    "cast": [
        "--pattern",
        "row",
        "--optimizer",
        "adamw",
        "--option",
        "blocks=0",
        "--teacher",
        "start",
        "--amp",
        "bf16",
    ],
    "jackpots": [],  # a transform: its scores are part of the model
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_stopped_anywhere_and_resumed_equals_uninterrupted(method, work, tmp_path, monkeypatch):
    more = METHODS[method]
    assert main(arguments(work, tmp_path / "whole", *more, method=method)) == 0
    out = tmp_path / "parts"
    from sparseworks.training import loop

    advance = loop.Training._advance
    steps = 8 // (2 if "--accumulate" in more else 1)
    for stop in (1, steps + 1, 2 * steps + 3):  # in the first, second and third epoch

        def broken(self, batches, stop=stop):
            advance(self, batches)
            if self.step == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(loop.Training, "_advance", broken)
        first = arguments(work, out, *more, method=method)
        assert main(["train", "--resume", "--out", str(out)] if out.exists() else first) == 130
        assert (out / "state.safetensors").exists() == (stop > steps)
        if stop > steps:
            assert load_state(out / "state.safetensors")["step"] == stop // steps * steps
    monkeypatch.undo()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    whole, parts = tensors(tmp_path / "whole/model.safetensors"), tensors(out / "model.safetensors")
    assert equal(whole, parts)
    assert len(history(out)) == 3
    assert history(out) == history(tmp_path / "whole")
    assert (out / "trace.json").read_text() == (tmp_path / "whole/trace.json").read_text()


def test_kill_9_and_resume_equals_uninterrupted(work, tmp_path):
    more = ["--option", "every=3", "--save-every", 5]
    assert main(arguments(work, tmp_path / "whole", *more)) == 0
    out = tmp_path / "killed"
    killed_at(15, arguments(work, out, *more))
    assert sorted(p.name for p in out.iterdir()) == ["options.json", "state.safetensors"]
    assert load_state(out / "state.safetensors")["step"] == 10  # in the middle of an epoch
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert equal(tensors(tmp_path / "whole/model.safetensors"), tensors(out / "model.safetensors"))
    assert (out / "trace.json").read_text() == (tmp_path / "whole/trace.json").read_text()
    assert not (out / "state.safetensors").exists()


def test_the_result_is_sparse_says_so_and_learns(work, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--option", "every=2", "--eval-data", "digits", "--lr", 0.3, "--epochs", 12, "--json"]
    assert main(arguments(work, out, *more, method="gradual", sparsity=0.6)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((out / "result.json").read_text())
    assert result["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert result["steps"] == 96 and len(result["history"]) == 12
    assert result["history"][-1]["accuracy"] == result["metric"]["after"] > 60
    loaded = tensors(out / "model.safetensors")
    for name, share in result["tensors"].items():
        assert bool((loaded[name][~loaded[f"mask {name}"]] == 0).all())
        assert 1 - loaded[f"mask {name}"].float().mean() == pytest.approx(share, abs=1e-6)
    before = (out / "model.safetensors").read_bytes()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    assert "finished already" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == before


def test_sparsity_zero_and_dense_are_the_same_training(work, tmp_path):
    assert main(arguments(work, tmp_path / "a", method="dense", sparsity=None)) == 0
    assert main(arguments(work, tmp_path / "b", "--option", "every=3", sparsity=0)) == 0
    dense, sparse = (tensors(tmp_path / f"{n}/model.safetensors") for n in "ab")
    assert all(torch.equal(dense[k], sparse[k]) for k in dense)


def test_the_page_shows_masks_and_the_loss_of_the_twin(work, tmp_path, capsys):
    pytest.importorskip("plotly")
    dense, out = tmp_path / "dense", tmp_path / "sparse"
    assert main(arguments(work, dense, method="dense", sparsity=None)) == 0
    assert "plot-layers" not in (dense / "report.html").read_text()
    more = ["--option", "every=3", "--twin", dense, "--eval-data", "digits"]
    assert main(arguments(work, out, *more)) == 0
    page = (out / "report.html").read_text()
    for part in ("plot-loss", "plot-metric", "plot-layers", "plot-churn", "twin", "5.weight"):
        assert part in page
    trace = json.loads((out / "trace.json").read_text())
    assert [row["step"] for row in trace["rows"]] == list(range(1, 25))
    moved = [row["step"] for row in trace["rows"] if row["churn"] > 0]
    assert moved and all(step % 3 == 0 and step < 0.75 * 24 for step in moved)
    assert all(row["sparsity"] == pytest.approx(0.8, abs=0.01) for row in trace["rows"])
    capsys.readouterr()
    error = fails(capsys, *arguments(work, tmp_path / "no", "--twin", tmp_path / "nowhere"))
    assert "holds no finished training" in error and not (tmp_path / "no").exists()


def test_fixed_masks_start_from_a_file(work, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments(work, first, method="static")) == 0
    start = ["--start", first / "model.safetensors"]
    assert main(arguments(work, second, *start, method="fixed", sparsity=None)) == 0
    a, b = tensors(first / "model.safetensors"), tensors(second / "model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a if k.startswith("mask "))
    assert not torch.equal(a["5.weight"], b["5.weight"])


def test_text_goes_on_in_the_middle_of_an_epoch(work, tmp_path, monkeypatch):
    from sparseworks.training import loop

    def words(out):
        return [str(w) for w in (
            "train", work / "lm", "--data", work / "text.txt", "--method", "rigl", "--sparsity",
            0.5, "--option", "every=2", "--length", 32, "--batch-size", 8, "--epochs", 2,
            "--save-every", 3, "--amp", "bf16", "--no-tensorboard", "--out", out)]  # fmt: skip

    assert main(words(tmp_path / "whole")) == 0
    advance = loop.Training._advance

    def broken(self, batches):
        advance(self, batches)
        if self.step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "_advance", broken)
    assert main(words(tmp_path / "parts")) == 130
    monkeypatch.undo()
    assert load_state(tmp_path / "parts" / "state.safetensors")["step"] == 3
    assert main(["train", "--resume", "--out", str(tmp_path / "parts")]) == 0
    whole, parts = (sw.from_pretrained(tmp_path / n / "checkpoint") for n in ("whole", "parts"))
    assert equal(whole.state_dict(), parts.state_dict())
    assert equal(dict(sw.masks(whole)), dict(sw.masks(parts)))


def test_a_language_model_on_text(work, tmp_path, capsys):
    out = tmp_path / "lm"
    words = ["train", work / "lm", "--data", work / "text.txt", "--eval-data", work / "text.txt",
             "--method", "gradual", "--sparsity", 0.5, "--option", "every=2", "--length", 32,
             "--batch-size", 8, "--epochs", 3, "--lr", 0.01, "--no-tensorboard",
             "--out", out, "--json"]  # fmt: skip
    assert main([str(w) for w in words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric"]["name"] == "perplexity"
    assert result["metric"]["after"] < 0.8 * result["metric"]["before"]
    model = sw.from_pretrained(out / "checkpoint")
    assert sw.masks(model).sparsity() == pytest.approx(0.5, abs=1e-3)
    assert sw.masks(model).violations(model) == {}
    assert (out / "checkpoint" / "tokenizer.json").is_file()


def test_a_language_model_learns_n_of_m_from_its_dense_self(work, tmp_path, capsys):
    out = tmp_path / "ast"
    words = ["train", work / "lm", "--data", work / "text.txt", "--eval-data", work / "text.txt",
             "--method", "ast", "--pattern", "2:4", "--option", "every=1", "decay=0.01",
             "--teacher", "start", "--distill", "task=1", "kl=1", "squarehead=0.5", "half=true",
             "--length", 32, "--batch-size", 8, "--epochs", 3, "--lr", 0.003,
             "--no-tensorboard", "--out", out, "--json"]  # fmt: skip
    assert "no repeated blocks" in fails(capsys, *words)  # of one block: nothing repeats
    words[words.index("squarehead=0.5")] = "temperature=2"
    assert main([str(w) for w in [*words, "--force"]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sparsity"] == 0.5 and "start" in result["record"]["recipe"]["teacher"]
    assert result["metric"]["after"] < result["metric"]["before"]
    model = sw.from_pretrained(out / "checkpoint")
    for name, mask in sw.masks(model).items():
        assert bool((mask.view(-1, 4).sum(1) == 2).all()), name
    assert sw.masks(model).violations(model) == {}
    rows = json.loads((out / "trace.json").read_text())["rows"]
    assert rows[-1]["moved"] > 0 and all(row["sparsity"] == 0.5 for row in rows)
    if (out / "report.html").is_file():
        assert "plot-flips" in (out / "report.html").read_text()
    wrong = [*words[: words.index("--teacher")], "--distill", "kl=1", "--out", tmp_path / "no"]
    assert "--distill needs --teacher" in fails(capsys, *wrong)


def test_a_resnet_on_a_folder_of_images(work, tmp_path):
    out = tmp_path / "resnet"
    words = ["train", "resnet20", "--data", work / "images", "--method", "set", "--sparsity", 0.9,
             "--batch-size", 4, "--epochs", 1, "--option", "every=1", "--out", out]  # fmt: skip
    assert main([str(w) for w in words]) == 0
    info = {t.name: t.shape for t in inspect(out / "model.safetensors").tensors}
    assert info["linear.weight"] == (2, 64)  # one output per folder
    if (out / "tensorboard").exists():
        assert any(p.name.startswith("events") for p in (out / "tensorboard").iterdir())


def test_the_log_is_the_trace_and_goes_on_with_the_training(work, tmp_path, monkeypatch):
    """Stopped in the second epoch, and resumed without naming the trackers again."""
    for name in ("tensorboard", "mlflow"):
        pytest.importorskip(name)
    from sparseworks.training import loop

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    advance, out = loop.Training._advance, tmp_path / "out"

    def broken(self, batches):
        advance(self, batches)
        if self.step == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Training, "_advance", broken)
    words = arguments(work, out, "--log", "tensorboard", "mlflow", "--option", "every=3")
    assert main(words) == 130
    monkeypatch.undo()
    assert main(["train", "--resume", "--out", str(out)]) == 0
    trace = json.loads((out / "trace.json").read_text())
    epochs = json.loads((out / "result.json").read_text())["history"]
    for tracker in ("tensorboard", "mlflow"):
        shown = READERS[tracker](out)
        if tracker == "mlflow":  # steps that were taken again stand there twice
            shown = {name: list(dict(values).items()) for name, values in shown.items()}
        for name, key in (("loss", "loss"), ("masks/flips", "flips")):
            wanted = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in trace["rows"]]
            assert shown[name] == wanted, (tracker, name)
        assert [step for step, _ in shown["epoch/loss"]] == [row["step"] for row in epochs]


def test_bad_input_is_refused_in_one_line(work, tmp_path, capsys):
    out = tmp_path / "out"

    def refused(*more, **kwargs):
        error = fails(capsys, *arguments(work, out, *more, **kwargs))
        assert not out.exists(), "nothing may be written"
        return error

    assert "did you mean 'rigl'" in refused(method="rigel")
    assert "no tracker 'tensorbord'" in refused("--log", "tensorbord")
    assert "is one-shot, not hooked or transform" in refused(method="wanda")
    assert "needs `sparsity`" in refused(sparsity=None)
    assert "sparsity" in refused(sparsity=1.5)
    assert "no option 'evry'; did you mean 'every'" in refused("--option", "evry=3")
    assert "end=1.2 must be in [0, 1]" in refused("--option", "end=1.2")
    assert "every 100 steps, but the training has 24" in refused("--option", "every=100")
    assert "fewer than" in refused("--batch-size", 300)
    assert "needs a model with masks" in refused(method="fixed", sparsity=None)
    assert "takes no --sparsity" in refused(method="dense")
    assert "amp='int8'" in refused("--amp", "int8")
    assert "sgd or adamw" in refused("--optimizer", "lion")
    assert "warmup=2" in refused("--warmup", 2)
    assert "epochs=0" in refused("--epochs", 0)
    assert "no such file" in refused("--data", tmp_path / "absent.parquet")
    tiny = ["--data", "digits", "--out", out, "--method", "dense"]
    assert "labels from 0 to 9" in fails(capsys, "train", f"{work}/net.py:narrow", *tiny)
    assert "cannot take images of [1, 8, 8]" in fails(capsys, "train", f"{work}/net.py:wide", *tiny)
    assert "resnet20 cannot take images" in fails(capsys, "train", "resnet20", *tiny)
    text = ["train", work / "lm", "--data", work / "text.txt", "--method", "dense", "--out", out]
    assert "--samples is for images" in fails(capsys, *text, "--samples", 9)
    assert "--label-smoothing is for images" in fails(capsys, *text, "--label-smoothing", 0.1)
    assert "fewer than one window" in fails(capsys, *text, "--length", 99999)
    assert "no --method" in fails(capsys, "train", "resnet20", "--data", "digits", "--out", out)
    assert "give --out" in fails(capsys, "train", "resnet20", "--data", "digits")
    assert "holds no training to resume" in fails(capsys, "train", "--resume", "--out", out)
    assert not out.exists()


def test_resuming_another_training_is_refused(work, tmp_path, capsys):
    out = tmp_path / "out"
    killed_at(9, arguments(work, out, "--option", "every=3"))
    state = (out / "state.safetensors").read_bytes()
    again = ["train", "--resume", "--out", out]
    assert "was started with --method rigl, not set" in fails(capsys, *again, "--method", "set")
    assert "--sparsity 0.8, not 0.9" in fails(capsys, *again, "--sparsity", 0.9)
    assert "--epochs 3, not 30" in fails(capsys, *again, "--epochs", 30)
    assert "go on with --resume" in fails(capsys, *arguments(work, out, "--option", "every=3"))
    # options.json changed by hand: the state itself knows better
    stored = json.loads((out / "options.json").read_text())
    for change, message in (
        ({"method": "set"}, "the state is of method 'rigl'"),
        ({"epochs": 4}, "a training of 24 steps, this one has 32"),
        ({"samples": 320}, "a training of 24 steps, this one has 30"),
    ):
        (out / "options.json").write_text(json.dumps({**stored, **change}))
        assert message in fails(capsys, *again)
    (out / "options.json").write_text(json.dumps(stored))
    (out / "state.safetensors").write_bytes(state[:-9])
    assert "cannot be read as a training state" in fails(capsys, *again)
    save_file({"a": torch.ones(1)}, out / "state.safetensors")
    assert "not a training state" in fails(capsys, *again)
    (out / "state.safetensors").write_bytes(state)
    assert main([str(w) for w in again]) == 0


def test_a_schedule_that_skipped_steps_cut_short_is_named(work, tmp_path, capsys, monkeypatch):
    calls = []
    scale = torch.amp.GradScaler.scale

    def overflow_once(self, loss):
        calls.append(loss)
        return scale(self, loss) * (float("inf") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", overflow_once)
    more = ["--amp", "fp16", "--option", "every=24", "end=1.0", "--lr", 1e-3]
    assert main(arguments(work, tmp_path / "out", *more, method="gradual")) == 0
    assert "the sparsity is 0.00%, not 80.00%: the masks saw 23 of 24" in capsys.readouterr().err


def test_a_diverging_training_says_so(work, tmp_path, capsys):
    more = ["--lr", 1e30, "--optimizer", "sgd"]
    error = fails(capsys, *arguments(work, tmp_path / "out", *more, method="static"))
    assert "not finite in epoch 1; lower the learning rate" in error
    assert os.listdir(tmp_path / "out") == ["options.json"]
