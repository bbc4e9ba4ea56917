"""Completion in real shells, examples behind every help, options from files."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib import import_module

import pytest
import tyro

from sparseworks.cli import COMMANDS, main
from sparseworks.cli.config import take_config
from sparseworks.cli.prune import Options as Prune
from sparseworks.cli.usage import EXAMPLES
from sparseworks.core import registry
from sparseworks.core.errors import InvalidArgument
from sparseworks.core.kinds import command_of

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
"""


def options_of(command):
    return import_module(f"sparseworks.cli.{command.replace('-', '_')}").Options


# --- completion


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Writes the completion of a shell into a file."""
    folder = tmp_path_factory.mktemp("completion")

    def write(shell):
        if shutil.which(shell) is None:
            pytest.skip(f"{shell} is not installed")
        path = folder / shell
        if not path.exists():
            with path.open("w") as file:
                words = [sys.executable, "-m", "sparseworks", "completion", shell]
                subprocess.run(words, stdout=file, check=True)
        return path

    return write


CASES = [
    (["pr"], {"prune"}),
    (["prune", "--met"], {"--method", "--metric"}),
    (["prune", "--method", "spars"], {"sparsegpt"}),
    (["train", "resnet20", "--method", "rig"], {"rigl"}),
    (["train", "--conf"], {"--config"}),
    (["completion", "--h"], {"--help"}),
]


@pytest.mark.parametrize(("words", "wanted"), CASES)
def test_bash_completes(words, wanted, script):
    code = (
        f"source {script('bash')}; COMP_WORDS=(sparseworks {shlex.join(words)}); "
        f"COMP_CWORD={len(words)}; $(complete -p sparseworks | sed 's/.*-F \\([^ ]*\\).*/\\1/') "
        '; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    ran = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert wanted <= set(ran.stdout.split()), ran.stdout + ran.stderr


@pytest.mark.parametrize(("words", "wanted"), CASES)
def test_fish_completes(words, wanted, script):
    path = script("fish")
    code = f"source {path}; complete -C '{shlex.join(['sparseworks', *words])}'"
    said = subprocess.run(["fish", "-c", code], capture_output=True, text=True).stdout
    assert wanted <= {line.split("\t")[0] for line in said.splitlines()}


def test_zsh_reads_its_script(script):
    path = script("zsh")
    assert path.read_text().startswith("#compdef sparseworks")
    subprocess.run(["zsh", "-n", str(path)], check=True)


def test_every_method_stands_behind_its_command(script):
    text = script("bash").read_text()
    for name in registry.names():
        method = registry.resolve(name)
        options = options_of(command_of(method).split()[1])
        if "method" in {f.name for f in dataclasses.fields(options)}:
            assert f"'{name}'" in text or method.info.kind == "optimizer", name


# --- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples_that_its_options_take(command, capsys):
    assert EXAMPLES[command]
    for line in EXAMPLES[command]:
        words = shlex.split(line.partition(" > ")[0])
        words = words[words.index("sparseworks") + 1 :]
        tyro.cli(options_of(words[0]), args=words[1:])
    assert main([command, "--help"]) == 0
    said = capsys.readouterr().out
    for line in EXAMPLES[command]:
        assert line in said[said.index("examples:") :]


# --- options from files


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


YAML = """
model: net.py:make
method: wanda
pattern: 2:4          # YAML itself would read this as 124
data: digits
batch-size: 16
option: {propagate: dense}
exclude: ["3*"]
signed_zeros: false
dtype: null
"""


def test_a_run_from_yaml_is_that_of_the_command_line_and_the_line_wins(work):
    pytest.importorskip("yaml")
    (work / "run.yaml").write_text(YAML)
    assert main(["prune", "--config", "run.yaml", "--out", "a"]) == 0
    line = ["net.py:make", "--method", "wanda", "--pattern", "2:4", "--data", "digits",
            "--batch-size", "16", "--option", "propagate=dense", "--exclude", "3*",
            "--no-signed-zeros"]  # fmt: skip
    assert main(["prune", *line, "--out", "b"]) == 0
    a, b = (json.loads((work / f / "options.json").read_text()) for f in "ab")
    assert {**a, "out": ""} == {**b, "out": ""}
    assert (work / "a/model.safetensors").read_bytes() == (
        work / "b/model.safetensors"
    ).read_bytes()
    given, rest = take_config(Prune, ["--config=run.yaml", "--pattern", "1:4"], "prune")
    assert tyro.cli(Prune, args=rest, default=given) == dataclasses.replace(given, pattern="1:4")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_options_json_holds_is_what_config_reads(command, tmp_path):
    """For the defaults and for the examples of every command."""
    from sparseworks.cli.running import plain_options

    for line in ["", *EXAMPLES[command]]:
        words = shlex.split(line.partition(" > ")[0])
        words = words[words.index("sparseworks") + 1 :] if words else [command]
        options = tyro.cli(options_of(words[0]), args=words[1:])
        path = tmp_path / "options.json"
        path.write_text(json.dumps(plain_options(options)))
        read, rest = take_config(type(options), ["--config", str(path)], "x")
        assert read == options and rest == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methd: wanda", "no option 'methd'; did you mean 'method'?"),
        ("colour: red", "no option 'colour'; `--help` lists"),
        ("- wanda", "holds no options"),
        ("a: [", "not YAML"),
        ("signed_zeros: maybe", "signed_zeros: 'maybe' is neither true nor false"),
        ("batch-size: 3\nbatch_size: 4", "stands there twice"),
    ],
)
def test_files_that_cannot_be_used_are_refused(text, said, work, capsys):
    pytest.importorskip("yaml")
    (work / "bad.yaml").write_text(text)
    assert main(["prune", "--config", "bad.yaml", "--out", "out"]) == 1
    assert said in capsys.readouterr().err and not (work / "out").exists()


def test_values_of_another_type_and_files_that_are_not_there(work, capsys):
    (work / "bad.json").write_text('{"samples": "many"}')
    assert main(["prune", "--config", "bad.json", "--out", "out"]) == 2
    said = capsys.readouterr()
    assert "--config bad.json" in said.out + said.err and "samples" in said.out + said.err
    assert main(["prune", "--config", "none.json"]) == 1
    assert "none.json: cannot be read" in capsys.readouterr().err
    assert main(["prune", "--config"]) == 1
    assert main(["prune", "--config", "bad.json", "--config", "bad.json"]) == 1
    with pytest.raises(InvalidArgument, match="given twice"):
        take_config(Prune, ["--config", "bad.json", "--config=bad.json"], "prune")
    assert take_config(Prune, ["a", "--", "--config"], "prune") == (None, ["a", "--", "--config"])
    assert not (work / "out").exists() and os.listdir(work)
