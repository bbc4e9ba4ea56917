"""The command line as a user meets it: what it writes, and what it refuses in one line."""

from __future__ import annotations

import html
import json
import subprocess
import sys

import pytest
import torch

import sparseworks as sw
from sparseworks.cli import COMMANDS, main


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A small random BERT and Llama with tokenizers, a text, and a classifier factory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    root = tmp_path_factory.mktemp("work")
    words = {w: i for i, w in enumerate(["[UNK]", "[PAD]", *"abcdefghijklmnopqrstuvwxyz"])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
    sizes = {
        "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48,
    }  # fmt: skip
    torch.manual_seed(0)
    for name, model in (
        ("bert", BertModel(BertConfig(**sizes))),
        ("llama", LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
    (root / "net.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 10))\n"
        "def score(model):\n    return float(model[1].weight.abs().sum())\n"
        "def broken():\n    net = make()\n    net[1].weight.data[0, 0] = float('nan')\n"
        "    return net\n"
        "def negative():\n    net = make()\n    net[3].weight.data *= 0.0\n    return net\n"
    )
    return root


def fails(capsys, *arguments, code=1):
    """The one-line error of a command that must fail."""
    assert main([str(a) for a in arguments]) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1, error
    return error[0]


def prune(work, name, out, *more):
    return main(
        ["prune", str(work / name), "--data", str(work / "text.txt"), "--eval-data",
         str(work / "text.txt"), "--samples", "8", "--length", "32", "--eval-samples", "4",
         "--out", str(out), *map(str, more)]
    )  # fmt: skip


def test_prune_writes_a_checkpoint_that_loads(workplace, tmp_path, capsys):
    out = tmp_path / "out"
    assert prune(workplace, "llama", out, "--method", "wanda", "--sparsity", 0.5) == 0
    assert "perplexity" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint", "options.json", "report.html", "result.json",
    ]  # fmt: skip
    model = sw.from_pretrained(out / "checkpoint")
    assert sw.masks(model).sparsity() == pytest.approx(0.5)
    assert sw.masks(model).violations(model) == {}
    result = json.loads((out / "result.json").read_text())
    assert result["metrics"][0]["name"] == "perplexity" and result["file_bytes"] > 0
    assert result["command"].startswith("sparseworks prune")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sw.sparsify(model, optimizer, "fixed")
    ids = torch.randint(0, 20, (2, 8))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    run.finish()
    assert sw.masks(model).violations(model) == {}


def test_the_report_has_texts_of_both_models(workplace, tmp_path, capsys):
    out = tmp_path / "out"
    assert prune(workplace, "llama", out, "--method", "wanda", "--sparsity", 0.5) == 0
    rows = json.loads((out / "result.json").read_text())["continuations"]
    page = (out / "report.html").read_text()
    assert len(rows) == 3 and "What it says" in page
    for row in rows:
        assert row["prompt"] and html.escape(row["prompt"]) in page
        assert html.escape(row["dense"]) in page and html.escape(row["pruned"]) in page
    none = tmp_path / "none"
    assert prune(workplace, "llama", none, "--sparsity", 0.5, "--continuations", 0) == 0
    assert "What it says" not in (none / "report.html").read_text()
    wrong = tmp_path / "wrong"
    assert prune(workplace, "llama", wrong, "--sparsity", 0.5, "--continuations", -1) == 1
    assert "--continuations -1" in capsys.readouterr().err and not wrong.exists()


def test_options_json_repeats_the_run(workplace, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert prune(workplace, "bert", first, "--method", "sparsegpt", "--pattern", "2:4") == 0
    again = ["prune", "--config", str(first / "options.json"), "--out", str(second)]
    assert main(again) == 0
    a, b = (sw.from_pretrained(p / "checkpoint") for p in (first, second))
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_factories_metrics_and_method_options(workplace, tmp_path, capsys):
    net, metric = f"{workplace / 'net.py'}:make", f"{workplace / 'net.py'}:score"
    out = tmp_path / "net"
    code = main(
        ["prune", net, "--method", "wanda", "--sparsity", "0.5", "--data", "digits", "--metric",
         metric, "--option", 'propagate="dense"', "--out", str(out), "--json"]
    )  # fmt: skip
    printed = json.loads(capsys.readouterr().out)
    assert code == 0 and printed["result"]["options"]["propagate"] == "dense"
    assert printed["metrics"][0]["after"] < printed["metrics"][0]["before"]
    assert (out / "model.safetensors").is_file()
    assert main(["inspect", str(out / "model.safetensors"), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["totals"]["zeros"] >= 64 * 33 // 2 - 33


def test_compare_writes_table_csv_and_plot(workplace, tmp_path, capsys):
    out = tmp_path / "compare"
    code = main(
        ["compare", str(workplace / "llama"), "--methods", "magnitude", "wanda", "--sparsities",
         "0.5", "2:4", "--data", str(workplace / "text.txt"), "--eval-data",
         str(workplace / "text.txt"), "--samples", "8", "--length", "32", "--eval-samples", "4",
         "--out", str(out)]
    )  # fmt: skip
    assert code == 0
    assert {p.name for p in out.iterdir()} == {
        "compare.csv", "compare.json", "compare.html", "options.json",
    }  # fmt: skip
    assert len((out / "compare.csv").read_text().strip().splitlines()) == 5
    assert "magnitude" in capsys.readouterr().out


def test_bad_input_is_one_line_and_writes_nothing(workplace, tmp_path, capsys):
    out = tmp_path / "never"
    llama, text = workplace / "llama", workplace / "text.txt"
    base = ["prune", llama, "--out", out, "--samples", "4", "--length", "16"]
    data = [*base, "--data", text]
    net = f"{workplace / 'net.py'}:make"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "m.pt").write_bytes(b"\x80\x04.")
    assert "not in [0, 1)" in fails(capsys, *data, "--sparsity", "1.0")
    assert "not in [0, 1)" in fails(capsys, *data, "--sparsity=-0.1")
    assert "did you mean 0.5" in fails(capsys, *data, "--sparsity", "50")
    assert "give --sparsity" in fails(capsys, *data)
    assert "contradicts" in fails(capsys, *data, "--pattern", "2:4", "--sparsity", "0.9")
    assert "multiple of 3" in fails(capsys, *data, "--pattern", "2:3")
    assert "empty" in fails(capsys, *base, "--data", tmp_path / "empty.txt", "--sparsity", "0.5")
    assert "no such file" in fails(capsys, *base, "--data", "missing.txt", "--sparsity", "0.5")
    wrong = fails(capsys, *data, "--method", "wand", "--sparsity", "0.5")
    assert "did you mean 'wanda'" in wrong
    pickle = fails(capsys, "prune", tmp_path / "m.pt", "--sparsity", "0.5", "--out", out)
    assert "pickle" in pickle
    broken = net.replace(":make", ":broken")
    nan = fails(capsys, "prune", broken, "--method", "magnitude", "--sparsity", "0.5", "--out", out)
    assert "NaN" in nan and "1.weight" in nan
    assert "no such" in fails(capsys, "prune", tmp_path / "gone", "--sparsity", "0.5")
    assert "name=value" in fails(capsys, *data, "--sparsity", "0.5", "--option", "rows")
    fails(capsys, "prnue", code=2)
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_calibration_data_is_checked_before_metrics_run(workplace, tmp_path, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("the metrics ran before the calibration data was read")

    monkeypatch.setattr("sparseworks.cli.preparing.make_metrics", never)
    out = tmp_path / "never"
    base = ["prune", workplace / "bert", "--sparsity", "0.5", "--out", out]
    assert "no such file" in fails(capsys, *base, "--data", "missing.txt")
    assert not out.exists()


INPUTS = {
    "prune": ("--data", "--eval-data", "--metric"),
    "compare": ("--data", "--eval-data", "--metric"),
    "curve": ("--data", "--eval-data", "--metric"),
    "slim": ("--data",),
    "train": ("--data", "--eval-data", "--start"),
    "tickets": ("--data", "--eval-data", "--start"),
    "compile": ("--weights",),
    "bench": ("--weights",),
}


@pytest.mark.parametrize(("command", "flag"), [(c, f) for c, fs in INPUTS.items() for f in fs])
def test_inputs_that_are_not_there_are_refused_before_a_model_is_loaded(
    command, flag, tmp_path, monkeypatch, capsys
):
    def never(*_):
        raise AssertionError("the model was loaded before the paths were looked at")

    monkeypatch.setattr("sparseworks.cli.loading.load_model", never)
    out = tmp_path / "never"
    given = {
        "prune": ["--sparsity", "0.5"],
        "slim": ["--flops", "0.5"],
        "train": ["--method", "dense"],
        "tickets": ["--sparsity", "0.5"],
    }.get(command, [])
    if command in ("train", "tickets") and flag != "--data":
        given += ["--data", "digits"]
    name = "gone.py:score" if flag == "--metric" else "gone"
    said = fails(capsys, command, "minilm", *given, flag, name, "--out", out)
    assert "no such file" in said and "gone" in said and not out.exists()


def test_an_existing_output_is_not_overwritten(workplace, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    error = fails(capsys, "prune", workplace / "llama", "--sparsity", "0.5", "--out", out)
    assert "already exists" in error and (out / "precious").read_text() == "mine"


def test_skipping_indivisible_tensors(workplace, tmp_path):
    net = f"{workplace / 'net.py'}:make"
    base = ["prune", net, "--method", "magnitude", "--pattern", "2:4", "--include", "*"]
    assert main([*base, "--out", str(tmp_path / "a")]) == 1
    assert main([*base, "--out", str(tmp_path / "a"), "--skip-indivisible"]) == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())["result"]
    assert "3.weight" in result["skipped"]


def test_negative_zeros_are_said_and_can_be_left_out(workplace, tmp_path, capsys):
    model = f"{workplace / 'net.py'}:negative"
    costs = {}
    for out, more in (("signed", []), ("small", ["--no-signed-zeros"])):
        arguments = ["--method", "magnitude", "--sparsity", "0.5", "--include", "1.weight", *more]
        assert main(["prune", model, *arguments, "--out", str(tmp_path / out)]) == 0
        assert main(["inspect", str(tmp_path / out / "model.safetensors")]) == 0
        said = capsys.readouterr().out.count("telling -0.0 from +0.0")
        result = json.loads((tmp_path / out / "result.json").read_text())
        costs[out] = said, result["signed_zero_bytes"] > 0
        assert all(word in result["command"] for word in more)
    assert costs == {"signed": (2, True), "small": (0, False)}


def test_interruption_leaves_nothing(workplace, tmp_path, monkeypatch, capsys):
    import sparseworks.io as io

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(io, "save", stop)
    out = tmp_path / "out"
    assert prune(workplace, "llama", out, "--sparsity", 0.5) == 130
    assert not list(tmp_path.iterdir())
    assert "interrupted" in capsys.readouterr().err


def test_checkpoints_of_another_model_are_refused(workplace, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for part in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (other / part).write_bytes((workplace / "llama" / part).read_bytes())
    weights = (workplace / "bert" / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights)
    fails(capsys, "prune", other, "--method", "magnitude", "--sparsity", "0.5")


def test_methods_lists_everything(capsys):
    assert main(["methods", "--json"]) == 0
    listed = {m["name"] for m in json.loads(capsys.readouterr().out)}
    assert {"random", "magnitude", "snip", "grasp", "synflow", "wanda", "sparsegpt"} <= listed
    for name in listed:
        assert main(["methods", name]) == 0
    assert "did you mean" in fails(capsys, "methods", "sparsegtp")


def test_help_and_version_do_not_import_torch():
    for word in ("--help", "--version"):
        code = f"import sys; from sparseworks.cli import main; main(['{word}']); "
        code += "sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    assert main(["--help"]) == 0 and main([]) == 2


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"sparseworks {command}" in capsys.readouterr().out


def test_inspect_names_what_it_does_not_count(tmp_path):
    (tmp_path / "bare.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torch.nn.utils import prune\n"
        "class Bare(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.W = nn.Parameter(torch.ones(4, 4))\n"
        "        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)\n"
        "        prune.random_unstructured(self.a, 'weight', 0.5)\n"
        "    def forward(self, x):\n"
        "        return self.b(self.a(x @ self.W.T))\n"
        "def make():\n"
        "    return Bare()\n"
        "def alone():\n"
        "    return nn.Embedding(4, 4)\n"
    )
    from sparseworks.cli.inspect import Options, run

    result = run(Options(f"{tmp_path / 'bare.py'}:make"))
    assert result["totals"]["zeros"] == 8  # of the weight that is computed from a mask
    assert {r["name"] for r in result["tensors"]} == {"a.weight_orig"}
    assert set(result["skipped"]) == {"W", "b.weight"} and "bare" in result["skipped"]["W"]
    assert run(Options(f"{tmp_path / 'bare.py'}:alone"))["skipped"] == {"weight": "an embedding"}
    import torch

    import sparseworks as sw

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model.register_parameter("W", torch.nn.Parameter(torch.ones(4, 4)))
    sw.save(model, tmp_path / "m.safetensors")
    stored = run(Options(str(tmp_path / "m.safetensors")))
    assert set(stored["skipped"]) == {"W"}
