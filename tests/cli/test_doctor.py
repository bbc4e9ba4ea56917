"""`sparseworks doctor`: what is there is told as it is, and what lacks ends in code 1."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import sparseworks
from sparseworks.cli import doctor, main
from sparseworks.kernels import native

ROOT = Path(__file__).resolve().parents[2]
NEEDS_NATIVE = pytest.mark.skipif(not native.available(), reason="no native kernels here")
SOURCE = Path(sparseworks.__file__).parents[1]


def report(capsys: pytest.CaptureFixture, code: int = 0) -> dict:
    assert main(["doctor", "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_it_says_what_the_library_itself_says(capsys: pytest.CaptureFixture) -> None:
    told = report(capsys)
    assert told["problems"] == []
    assert told["native"]["built"] == native.available()
    assert told["native"]["instruction_set"] == native.instruction_set()
    assert told["native"]["amx"] == native.has_amx()
    assert told["torch"]["version"] == torch.__version__
    assert told["torch"]["threads"] == torch.get_num_threads()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "nothing that an installation needs is missing" in text


def test_every_package_of_the_project_file_is_there_with_its_purpose(
    capsys: pytest.CaptureFixture,
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = {(r["extra"], r["name"]): r for r in report(capsys)["packages"]}
    for extra, wanted in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        assert extra in doctor.EXTRAS
        for requirement in wanted:
            name, _, least = requirement.partition(">=")
            name = name.partition("[")[0]
            if name == "sparseworks":
                continue
            row = rows[extra, name]
            assert row["for"] and row["least"] == (least or None)
            assert extra in ("test", "docs") or row["for"] == doctor.PURPOSES[name]


@pytest.mark.parametrize(
    ("version", "ok"),
    [("2.11", True), ("2.11.0+cpu", True), ("2.9.1", False), ("3.0rc1", True), ("2.11rc1", True)],
)
def test_versions_are_compared_as_numbers(
    version: str, ok: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda n: version if n == "torch" else real(n)
    )
    told = report(capsys, 0 if ok else 1)
    said = [f"torch {version} is too old (all tensors and models): pip install 'torch>=2.11'"]
    assert told["problems"] == ([] if ok else said)


def test_an_optional_package_may_be_missing_and_a_needed_one_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = importlib.metadata.version
    lacking = {"plotly"}

    def version(name: str) -> str:
        if name in lacking:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert report(capsys)["problems"] == []
    assert main(["doctor"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("  plotly"))
    assert "missing" in line and "report.html" in line
    lacking.add("safetensors")
    [said] = report(capsys, 1)["problems"]
    assert said == "safetensors is missing (checkpoints): pip install 'safetensors>=0.5'"


@NEEDS_NATIVE
@pytest.mark.parametrize(("isa", "code"), [("base", 0), ("avx9", 1)])
def test_a_forced_instruction_set_is_said_or_refused(
    isa: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("SPARSEWORKS_ISA", isa)
    told = report(capsys, code)
    assert told["native"]["forced"] == isa
    assert told["native"]["instruction_set"] == ("none" if code else isa)
    assert [isa in said for said in told["problems"]] == [True] * code


def without_packages(folder: Path, *names: str) -> subprocess.CompletedProcess:
    """The command in a Python that has this package's own files, as given, and no others."""
    meta = folder / "sparseworks-0.1.0.dist-info"
    meta.mkdir()
    text = importlib.metadata.distribution("sparseworks").read_text("METADATA")
    assert text is not None
    (meta / "METADATA").write_text(text)
    code = (
        f"import sys; sys.path[:0] = [{str(folder)!r}]\n"
        "from sparseworks.cli import main\n"
        f"sys.exit(main({['doctor', *names]!r}))"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=folder
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The Python files of the package alone."""
    for path in (SOURCE / "sparseworks").rglob("*.py"):
        target = tmp_path / path.relative_to(SOURCE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def test_where_all_packages_are_missing_it_names_them(copied: Path) -> None:
    ran = without_packages(copied, "--json")
    assert ran.returncode == 1, ran.stderr
    told = json.loads(ran.stdout)
    missing = [said.partition(" ")[0] for said in told["problems"]]
    assert missing == ["torch", "numpy", "safetensors", "rich", "tyro"]
    assert told["torch"] is None and told["native"]["built"] is False
    plain = without_packages_text(copied)
    assert "torch is missing (all tensors and models): pip install 'torch>=2.11'" in plain


def without_packages_text(folder: Path) -> str:
    (folder / "sparseworks-0.1.0.dist-info" / "METADATA").unlink()
    (folder / "sparseworks-0.1.0.dist-info").rmdir()
    ran = without_packages(folder)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    return ran.stdout


@NEEDS_NATIVE
def test_native_code_is_found_without_torch(copied: Path) -> None:
    module = native.module()
    assert module is not None
    file = Path(str(module.__file__))
    (copied / "sparseworks" / "kernels" / file.name).write_bytes(file.read_bytes())
    told = json.loads(without_packages(copied, "--json").stdout)
    assert told["native"]["built"] and told["torch"] is None
    assert told["native"]["instruction_set"] == native.instruction_set()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (None, "it was not built when sparseworks was installed"),
        ("_native.cpython-27-vax.so", "is of another Python"),
        (None if native.module() is None else Path(str(native.module().__file__)).name,
         "cannot be loaded"),
    ],
)  # fmt: skip
def test_why_there_is_no_native_code(copied: Path, file: str | None, said: str) -> None:
    if file is not None:
        (copied / "sparseworks" / "kernels" / file).write_bytes(b"no library")
    told = json.loads(without_packages(copied, "--json").stdout)
    assert said in told["native"]["why_not"] and "torch" not in told["native"]["why_not"]
    [note] = [n for n in told["notes"] if n.startswith("native code")]
    assert "torch serves in its place" in note
