"""`sparseworks finetune`: every kind of data, exact resumption, two processes, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sparseworks as sw
import tiny_models
from sparseworks.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} x {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny Llama and BERT with a tokenizer, a ViT, and a file of every kind of data."""
    from PIL import Image

    root = tmp_path_factory.mktemp("finetune")
    tokenizer = tiny_models.letters(eos_token="z", pad_token="[UNK]")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24}  # fmt: skip
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **small)
    ).save_pretrained(root / "lm")
    transformers.BertModel(
        transformers.BertConfig(vocab_size=len(tokenizer), **small)
    ).save_pretrained(root / "bert")
    transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=12, patch_size=4, num_labels=2, **small)
    ).save_pretrained(root / "vit")
    for name in ("lm", "bert"):
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    (root / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{c} is", "completion": f" {c * 3}"}) + "\n"
                for c in "abcdefgh")
    )  # fmt: skip
    (root / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": c},
                                         {"role": "assistant", "content": c * 2}]}) + "\n"
                for c in "abcdefgh")
    )  # fmt: skip
    (root / "labelled.csv").write_text(
        "text,label\n" + "".join(f"{c * 4},{'good' if c < 'e' else 'bad'}\n" for c in "abcdefgh")
    )
    g = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        (root / "images" / label).mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(0, 256, (8, 8, 3), generator=g, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / "images" / label / f"{i}.png")
    return root


def command(work, out, model="lm", data="text.txt", **options):
    given = {"length": 16, "batch-size": 4, "epochs": 1, "calibration": 8, **options}
    words = ["finetune", str(work / model), "--data", str(work / data), "--out", str(out)]
    for name, value in given.items():
        words += [f"--{name}"] if value is True else [f"--{name}", *str(value).split()]
    return words


def result_of(out):
    return json.loads((out / "result.json").read_text())


CASES = {
    "one-shot": {"method": "sparsegpt", "pattern": "2:4", "teacher": "start"},
    "hooked": {"method": "gradual", "sparsity": 0.6, "amp": "bf16", "accumulate": 2},
    "straight-through": {"method": "ast", "pattern": "2:4", "teacher": "start"},
    "transform": {"method": "maskllm", "pattern": "2:4", "checkpointing": True},
    "dense": {"method": "dense", "optimizer": "adafactor"},
    "own optimizer": {"method": "fixed", "start": "", "optimizer": "dct-adamw", "steps": 3},
    "completions": {"data": "rows.jsonl", "method": "wanda", "sparsity": 0.5},
    "chats": {"data": "chats.jsonl", "method": "magnitude", "sparsity": 0.5},
    "texts": {"model": "bert", "data": "labelled.csv", "method": "wanda", "sparsity": 0.5},
    "images": {"model": "vit", "data": "images", "method": "magnitude", "sparsity": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_data_and_method(case, work, tmp_path, capsys):
    options = dict(CASES[case])
    if options.get("start") == "":
        model = sw.from_pretrained(work / "lm")
        sw.prune(model, "magnitude", sparsity=0.5)
        sw.save(model, tmp_path / "start.safetensors")
        options["start"] = tmp_path / "start.safetensors"
    out = tmp_path / "out"
    data = options.get("data", "text.txt")
    words = command(work, out, **options, **{"eval-data": work / data})
    assert main(words) == 0, capsys.readouterr().err
    found = result_of(out)
    model = sw.from_pretrained(out / "checkpoint")
    wanted = {"dense": 0.0, "hooked": 0.6}.get(case, 0.5)
    if wanted:
        assert sw.masks(model).violations(model) == {}
        assert sw.masks(model).sparsity() == pytest.approx(wanted, abs=0.01)
    assert found["sparsity"] == pytest.approx(wanted, abs=0.01)
    named = "accuracy" if case in ("texts", "images") else "perplexity"
    assert found["metric"]["name"] == named
    assert found["history"] and not (out / "states").exists()
    assert json.loads((out / "trace.json").read_text())["rows"]
    assert transformers.AutoConfig.from_pretrained(out / "checkpoint").model_type in (
        "llama", "bert", "vit",
    )  # fmt: skip
    if case == "texts":
        assert model.config.id2label == {0: "bad", 1: "good"}


def test_zeros_of_an_encoder_stay_under_a_new_head(work, tmp_path):
    encoder = sw.from_pretrained(work / "bert")
    sw.prune(encoder, "magnitude", pattern="2:4")
    sw.save(encoder, tmp_path / "pruned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "bert")
    tokenizer.save_pretrained(tmp_path / "pruned")
    words = command(work, tmp_path / "out", data="labelled.csv", method="fixed", lr=0.01)
    words[1] = str(tmp_path / "pruned")
    assert main(words) == 0
    model = sw.from_pretrained(tmp_path / "out" / "checkpoint")
    record = sw.masks(model)
    assert record.violations(model) == {} and len(record) == len(sw.masks(encoder))
    for name in sw.masks(encoder):
        assert torch.equal(record[f"bert.{name}"], sw.masks(encoder)[name])
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.weight,
                           encoder.encoder.layer[0].output.dense.weight)  # fmt: skip


def test_training_helps(work, tmp_path):
    out = tmp_path / "out"
    options = {"method": "magnitude", "sparsity": 0.5, "epochs": 6, "lr": 0.01}
    assert main(command(work, out, **options, **{"eval-data": work / "text.txt"})) == 0
    found = result_of(out)["metric"]
    assert found["after"] < 0.9 * found["before"]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("method", ["sparsegpt", "ast"])
def test_killed_and_resumed(method, work, tmp_path):
    options = {"method": method, "pattern": "2:4", "epochs": 3, "save-every": 4}
    assert main(command(work, tmp_path / "whole", **options)) == 0
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "sparseworks", *command(work, out, **options)],
        env=environment(), stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None and not list((out / "states").glob("checkpoint-*/watched*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "result.json").exists(), process.stderr.read()
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    whole, resumed = (sw.from_pretrained(d / "checkpoint") for d in (tmp_path / "whole", out))
    for (name, p), q in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(p, q), name
    traces = [json.loads((d / "trace.json").read_text())["rows"] for d in (tmp_path / "whole", out)]
    assert traces[0] == traces[1]
    assert main(["finetune", "--resume", "--out", str(out)]) == 0  # finished: says so


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_take_the_steps_of_one(work, tmp_path):
    """The same windows, halved between two processes."""
    options = {"method": "wanda", "sparsity": 0.5, "optimizer": "sgd", "lr": 0.1, "samples": 80}
    assert main(command(work, tmp_path / "one", **options)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = command(work, tmp_path / "two", **{**options, "batch-size": 2})
    run = subprocess.run(
        [*launch, "-m", "sparseworks", *words], env=environment(), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    one, two = (sw.from_pretrained(tmp_path / n / "checkpoint") for n in ("one", "two"))
    assert all(torch.equal(sw.masks(one)[n], sw.masks(two)[n]) for n in sw.masks(one))
    for p, q in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


REFUSALS = {
    "no method": ({}, "no --method given"),
    "sparsity of dense": ({"method": "dense", "sparsity": 0.5}, "takes no --sparsity"),
    "no sparsity": ({"method": "wanda"}, "sparsity"),
    "too much": ({"method": "wanda", "sparsity": 1.5}, "1.5"),
    "pattern": ({"method": "wanda", "pattern": "2:x"}, "2:x"),
    "kind of method": ({"method": "rewinding"}, "is driver"),
    "kind of data": ({"method": "dense", "data": "labelled.csv"}, "labelled texts, which need"),
    "text for an encoder": ({"method": "dense", "model": "bert"}, "causal language model"),
    "images for text": ({"method": "dense", "data": "images"}, "image classifier"),
    "another kind to evaluate": ({"method": "dense", "eval-data": "rows.jsonl"}, "completions"),
    "amp": ({"method": "dense", "amp": "bf61"}, "bf61"),
    "optimizer": ({"method": "dense", "optimizer": "adamx"}, "adamx"),
    "schedule": ({"method": "dense", "schedule": "cosinus"}, "cosinus"),
    "distill": ({"method": "dense", "distill": "kl=1"}, "--teacher"),
    "short": ({"method": "dense", "length": 100_000}, "fewer than one window"),
    "samples": ({"method": "dense", "eval-samples": 3}, "--eval-data"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_leave_nothing(case, work, tmp_path, capsys):
    options, message = REFUSALS[case]
    options = dict(options)
    if "eval-data" in options:
        options["eval-data"] = work / options["eval-data"]
    assert main(command(work, tmp_path / "out", **options)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_needs_a_folder_that_holds_a_training(work, tmp_path, capsys):
    assert main(["finetune", "--resume", "--out", str(tmp_path / "none")]) == 1
    assert "no training to resume" in capsys.readouterr().err
    assert Path(work / "text.txt").is_file()
