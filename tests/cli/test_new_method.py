"""What `sparseworks new-method` writes runs as it is: its test, its command, style checks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_models
from sparseworks.cli import main
from sparseworks.core import plugins, registry
from sparseworks.core.kinds import command_of

NET = f"{tiny_models.__file__}:net"
KINDS = ("one-shot", "hooked", "transform", "structured")
QUICK = {
    "train": "--samples 128 --batch-size 32 --epochs 1 --no-augment --no-tensorboard",
    "slim": "--batch-size 32",
    "prune": "",
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    held = registry.snapshot()
    monkeypatch.setattr(plugins, "_LOADED", {})
    monkeypatch.chdir(tmp_path)
    yield
    registry.restore(held)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_run_as_they_are(kind: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["new-method", "my-idea-2", "--kind", kind]) == 0
    printed = capsys.readouterr().out
    assert sorted(p.name for p in Path().iterdir()) == ["my_idea_2.py", "test_my_idea_2.py"]
    for path in Path().iterdir():
        text = path.read_text()
        assert not any(word in text.lower() for word in ("own_method", "own-method", "ownmethod"))
        assert "type: ignore" not in text
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_idea_2.py"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    if ruff := shutil.which("ruff", path=str(Path(sys.executable).parent)):
        checked = subprocess.run(
            [ruff, "check", "--isolated", "--line-length", "100", "--select", "E,F,W,B,UP", "."]
        )
        assert checked.returncode == 0

    assert main(["methods", "my-idea-2", "--plugin", "my_idea_2.py", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == kind and told["room"] == "own"
    words = shlex.split(command_of(registry.resolve("my-idea-2")))[1:]
    filled = {"MODEL": NET, "DATA": "digits", "OUT": "out"}
    words = [filled.get(w, w) for w in words] + QUICK[words[0]].split()
    assert main([*words, "--plugin", "my_idea_2.py"]) == 0
    result = json.loads(Path("out/result.json").read_text())
    assert "my-idea-2" in json.dumps(result)
    assert f"sparseworks {words[0]} MODEL" in printed and "--plugin my_idea_2.py" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_its_test_notices_a_wrong_formula(kind: str) -> None:
    assert main(["new-method", "mine", "--kind", kind]) == 0
    file = Path("mine.py")
    wrong = {
        "one-shot": ("return size /", "return -size /"),
        "hooked": (
            "return magnitudes(run)",
            "return {n: (-s).where(s >= 0, s) for n, s in magnitudes(run).items()}",
        ),
        "transform": (".detach().abs()", ".detach()"),
        "structured": ("self.power\n", "1\n"),
    }[kind]
    assert wrong[0] in file.read_text()
    file.write_text(file.read_text().replace(*wrong))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 1, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([""], "for example: sparseworks new-method my-method"),
        (["My-Idea"], "small letters"),
        (["2nd"], "a letter first"),
        (["class"], "small letters"),
        (["../there"], "small letters"),
        (["wanda"], "a method has it already"),
        (["torch"], "would hide the Python module torch"),
        (["mine", "--out", f"{__file__}/gone"], "is not a folder"),
    ],
)
def test_bad_names_are_refused_and_nothing_is_written(
    words: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["new-method", *words]) == 1
    assert said in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize("there", ["mine.py", "test_mine.py"])
def test_what_is_there_stays(there: str, capsys: pytest.CaptureFixture) -> None:
    Path(there).write_text("mine")
    assert main(["new-method", "mine"]) == 1
    assert "already exists" in capsys.readouterr().err
    assert [p.name for p in Path().iterdir()] == [there] and Path(there).read_text() == "mine"
