"""Every block of a tutorial runs in order: Python in one namespace, commands in its folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tutorial"}
    blocks = BLOCK.findall(page.read_text())
    assert {language for language, _ in blocks} == {"python", "sh"}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, f"{page.name}", "exec"), names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "sparseworks"
            done = subprocess.run(
                [sys.executable, "-m", "sparseworks", *arguments], capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stderr}"
