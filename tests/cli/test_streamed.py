"""`sparseworks prune --stream`, killed and resumed, and on two processes of torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny_models
from sparseworks.cli import main
from sparseworks.weights.oneshot.staging import Journal

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = tiny_models.__file__


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "source"
    model = tiny_models.language_model("Llama", num_hidden_layers=6)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def command(source, out, *more):
    return [
        "prune", str(source), "--stream", "--method", "sparsegpt", "--sparsity", "0.5",
        "--data", f"{MODELS}:texts", "--shard-size", "50KB", "--out", str(out), *more,
    ]  # fmt: skip


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def whole(source, one_thread):
    out = source.parent / "whole"
    assert main(command(source, out)) == 0
    return files(out / "checkpoint")


def test_writes_what_it_did(source, whole, capsys):
    out = source.parent / "told"
    assert main(command(source, out, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert json.loads((out / "result.json").read_text())["result"] == told["result"]
    assert told["result"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert told["result"]["options"]["memory"] > 0
    assert files(out / "checkpoint") == whole
    assert any(n.endswith("-of-00007.safetensors") or "index" in n for n in whole)
    assert any(n.startswith("masks/") for n in whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric", "perplexity"], "as a whole"),
        (["--force"], "delete"),
        (["--resume"], "nothing was interrupted"),
        (["--method", "snip"], "whole model"),
    ],
    ids=str,
)
def test_refusals_leave_nothing(source, more, message, tmp_path, capsys):
    assert main(command(source, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resume_goes_with_stream(source, capsys):
    assert main(["prune", str(source), "--sparsity", "0.5", "--resume"]) == 1
    assert "--stream" in capsys.readouterr().err


@pytest.mark.parametrize("spill", [False, True])
def test_killed_and_resumed(spill, source, whole, tmp_path):
    out = tmp_path / "out"
    more = ["--spill"] if spill else []
    journal = out / "checkpoint.part" / "journal.jsonl"
    words = [sys.executable, "-m", "sparseworks", *command(source, out, *more)]
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE)
    while process.poll() is None:
        if journal.exists() and len(done_units(journal)) >= 2:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stderr.read()
    before = done_units(journal)
    assert before and not (out / "checkpoint").exists()
    lines = []
    add = Journal.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "add", lambda self, x: (lines.append(x["unit"]), add(self, x)))
        assert main(command(source, out, *more, "--resume")) == 0
    assert not set(lines) & set(before)  # nothing is done again
    assert files(out / "checkpoint") == whole


def done_units(journal):
    lines = journal.read_bytes().rpartition(b"\n")[0].split(b"\n")
    return [json.loads(line)["unit"] for line in lines[1:]]


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(("stream", "method"), [(True, "sparsegpt"), (False, "wanda")])
def test_two_processes_as_one(stream, method, source, tmp_path):
    words = [
        "prune", str(source), "--method", method, "--sparsity", "0.5",
        "--data", f"{MODELS}:odd_texts", *(["--stream"] if stream else []),
    ]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    two = [*TORCHRUN, "-m", "sparseworks", *words, "--out", str(tmp_path / "two")]
    run = subprocess.run(two, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    one = files(tmp_path / "one" / "checkpoint")
    assert files(tmp_path / "two" / "checkpoint") == one
    results = [
        json.loads((tmp_path / n / "result.json").read_text())["result"] for n in ("one", "two")
    ]
    for tensors in zip(*(r["tensors"] for r in results)):
        assert tensors[0] | {"seconds": 0} == tensors[1] | {"seconds": 0}
    assert run.stdout.count("wrote ") == 1  # rank 0 alone speaks
    assert Path(tmp_path / "two" / "result.json").is_file()
