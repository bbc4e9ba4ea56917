"""Every registered method has a command that runs it: the one that `sparseworks methods` prints."""

from __future__ import annotations

import json
import shlex

import pytest

import sparseworks as sw
import tiny_models
from sparseworks.cli import COMMANDS, main
from sparseworks.core import registry
from sparseworks.core.kinds import command_of
from sparseworks.io import inspect

NET = tiny_models.__file__
QUICK = {
    "activations": "--samples 16 --eval-samples 64 --metric accuracy --eval-data digits",
    "prune": "--samples 32 --batch-size 16",
    "quantize": "",
    "train": "--samples 128 --batch-size 32 --epochs 1 --no-augment --no-tensorboard",
    "tickets": "--samples 150 --batch-size 30 --epochs 1",
    "slim": "--batch-size 32",
    "curve": "--samples 16 --eval-samples 64 --metric accuracy --sparsities 0.3 0.6 0.9",
    "audit": "",
    "upcycle": "--experts 4",
}
MORE = {"synflow": "--rounds 2", "ecodiff": "--include denoiser.blocks"}
DATA = dict.fromkeys(("cfsp", "cptquant", "gqsa", "pat", "slicegpt", "stun"), f"{NET}:texts")
OPTIONS = {
    "ast": "every=2",
    "cast": "every=2",
    "slorb": "every=2",
    "ecodiff": "epochs=1",
    "gqsa": "block_epochs=1 tune_epochs=1",
    "ownership": "size=4",
    "rewinding": "rounds=1",
    "components": "step=0.45 least=-0.9",
    "random-search": "candidates=3",
    "soup": "copies=2 phases=1",
    "precrop": "densities=expected",
    "sap": "rounds=1",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Model files, a sparse checkpoint and two recorded runs."""
    root = tmp_path_factory.mktemp("commands")
    run = [f"{NET}:net", "--data", "digits", *QUICK["train"].split()]
    for method, more in (("static", ["--sparsity", "0.5"]), ("dense", [])):
        out = ["--out", str(root / method)]
        assert main(["train", *run, "--method", method, *more, *out]) == 0
    return root


def words_of(name, work, out):
    """The printed command with the user's words filled in, and small enough for a test."""
    factory = tiny_models.FACTORIES.get(name, tiny_models.net).__name__
    filled = {
        "MODEL": f"{NET}:{factory}", "DATA": DATA.get(name, "digits"), "OUT": str(out),
        "OUT.json": f"{out}.json", "SPARSE": str(work / "static" / "model.safetensors"),
        "FILE.py:CHAINS": f"{NET}:chains", "sampler=FILE.py:SAMPLER": f"sampler={NET}:sampler",
        "owner=OWNER": "owner=somebody",
    }  # fmt: skip
    program, command, *words = shlex.split(command_of(registry.resolve(name)))
    assert program == "sparseworks" and command in COMMANDS
    runs = iter((f"dense={work / 'dense'}", f"static={work / 'static'}"))
    words = [next(runs) if w == "RUN" else filled.get(w, w) for w in words]
    assert not [w for w in words if w.isupper()], "a word in capitals that nobody knows"
    quick = f"{QUICK[command]} {MORE.get(name, '')}".split()
    if "--epochs" in words:
        words[words.index("--epochs") + 1] = "4" if name == "pat" else "1"
        quick += ["--samples", "96", "--no-augment"]
    own = OPTIONS.get(name, "").split()
    if "--option" in words:
        place = words.index("--option") + 1
        return [command, *words[:place], *own, *words[place:], *quick]
    return [command, *words, *quick, *(["--option", *own] if own else [])]


@pytest.mark.parametrize("name", registry.names())
def test_the_printed_command_runs_the_method(name, work, tmp_path):
    out = tmp_path / "out"
    words = words_of(name, work, out)
    assert main(words) == 0, shlex.join(words)
    if words[0] == "audit":
        assert json.loads((tmp_path / "out.json").read_text())["verdict"]
        return
    if words[0] == "activations":
        model = tiny_models.FACTORIES.get(name, tiny_models.net)()
        assert sw.load_activations(out, model).gates
        return
    result = json.loads((out / "result.json").read_text())
    if words[0] == "upcycle":
        assert result["method"] == name and (out / result["checkpoint"]).exists()
    if words[0] == "quantize":
        saved = inspect(out / "checkpoint" / "sparseworks.safetensors")
        assert any(t.layout.startswith("int") for t in saved.tensors)
    if registry.resolve(name).info.kind == "optimizer":
        assert result["steps"] == 4 and result["options"]["optimizer"] == name
    elif words[0] in ("prune", "train", "tickets"):
        [saved] = list(out.glob("*.safetensors")) or out.rglob("*.safetensors")
        assert any(t.sparsity for t in inspect(saved).tensors)
    elif words[0] == "slim":
        before, after = result["result"]["parameters"]
        assert result["result"]["method"] == name and 0 < after <= before


def test_the_catalogue_carries_the_commands(capsys):
    assert main(["methods", "--json"]) == 0
    for listed in json.loads(capsys.readouterr().out):
        assert listed["command"].startswith("sparseworks "), listed["name"]
        assert listed["call"].startswith("sw."), listed["name"]
    assert main(["methods", "wgsef"]) == 0
    assert "sparseworks slim MODEL --data DATA --method wgsef" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "m.py:f", "--data", "digits", "--method", "wgsef", "--out", "o"],
         "sparseworks slim MODEL --data DATA --method wgsef"),
        (["slim", "m.py:f", "--method", "rigl", "--flops", "0.5"],
         "sparseworks train MODEL --data DATA --method rigl"),
        (["prune", "m.py:f", "--method", "soup", "--sparsity", "0.5"],
         "sparseworks tickets MODEL --data DATA --method soup"),
        (["tickets", "m.py:f", "--data", "digits", "--method", "components", "--out", "o"],
         "sparseworks prune MODEL --data DATA --method components"),
        (["slim", "m.py:f", "--method", "wgsef"], "give --data and --epochs"),
    ],
)  # fmt: skip
def test_the_right_command_is_named(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_python_has_the_same_front():
    import torch
    from torch import nn

    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    done = sw.slim(model, x, method="wgsef", data=[(x, y)] * 4, epochs=15, keep=0.5, strength=5.0)
    assert done.method == "wgsef" and done.options["keep"] == 0.5 and done.options["epochs"] == 15
    [width] = done.widths
    assert (width.name, width.before) == ("0.weight axis 0", 8)
    assert model[0].out_features == width.after == len(model[2].weight[0])
    assert dict(done.shapes)["0.weight"] == ((8, 6), (width.after, 6))
