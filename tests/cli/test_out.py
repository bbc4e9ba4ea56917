"""Where commands write: folders that are missing are made, a file is never taken for one."""

from __future__ import annotations

import pytest

from sparseworks.cli import main

COMMANDS = {
    "activations": ["m"],
    "audit": ["r"],
    "bench": ["m"],
    "compare": ["m", "--methods", "magnitude"],
    "compile": ["m"],
    "curve": ["m", "--methods", "magnitude"],
    "evaluate": ["m", "--tasks", "arc_easy"],
    "export": ["m", "--to", "onnx"],
    "new-method": ["mine"],
    "prune": ["m", "--method", "magnitude", "--sparsity", "0.5"],
    "quantize": ["m"],
    "recipe": ["m"],
    "slim": ["m", "--flops", "0.5"],
    "upcycle": ["m"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_the_place_of_a_folder_is_said_before_anything_else(command, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out = str(tmp_path / "file" / "out")
    assert main([command, *COMMANDS[command], "--out", out]) == 1
    error = capsys.readouterr().err
    assert "file is not a folder; choose another place" in error and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_folders_are_made_when_there_is_something_to_write(tmp_path):
    out = tmp_path / "a" / "b"
    assert main(["compile", "no-such-model", "--out", str(out / "plan")]) == 1
    assert not list(tmp_path.iterdir())
    assert main(["new-method", "mine", "--out", str(out)]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["mine.py", "test_mine.py"]
