"""Write a method of your own to start from: a file that registers it, and its test.

Both run as they are: `pytest test_NAME.py`, and `--plugin NAME.py` in every command that runs
methods. Then change the score, the docstring and the test.
"""

from __future__ import annotations

import importlib.util
import json
import keyword
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sparseworks.core.errors import InvalidArgument

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks new-method`."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """Of the method: small letters, digits and hyphens (my-method)."""
    kind: Literal["one-shot", "hooked", "transform", "structured"] = "one-shot"
    """one-shot: a score, for `prune`; hooked: masks beside any training, for `train`; transform:
    layers that compute otherwise while they train; structured: a score of whole channels, for
    `slim`."""
    out: Path = Path(".")
    """Folder of the two files; nothing there is replaced."""
    json: bool = False
    """Print the paths as JSON."""


def run(options: Options) -> dict[str, str]:
    """Write the two files, or neither."""
    from sparseworks.core import registry
    from sparseworks.core.kinds import KINDS
    from sparseworks.io.atomic import atomic_files, check_place

    name = options.name
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise InvalidArgument(
            f"name {name!r}: use small letters, digits and hyphens, a letter first; for example: "
            "sparseworks new-method my-method --kind one-shot"
        )
    if name in registry.names():
        raise InvalidArgument(f"name {name!r}: a method has it already (`sparseworks methods`)")
    if module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None:
        raise InvalidArgument(f"name {name!r}: {module}.py would hide the Python module {module}")
    paths = {"method": options.out / f"{module}.py", "test": options.out / f"test_{module}.py"}
    for path in paths.values():
        if path.exists():
            raise InvalidArgument(f"{path}: already exists; choose another name, or another --out")
    check_place(paths["method"])
    texts = {what: _filled(options.kind, what, name) for what in paths}
    with atomic_files(paths["method"]) as folder:
        for what, text in texts.items():
            (folder / paths[what].name).write_text(text, encoding="utf-8")
    written = {what: str(path) for what, path in paths.items()}
    if options.json:
        print(json.dumps(written, indent=1))
        return written
    command = KINDS[options.kind].command.format(name=name, data="")
    print(f"wrote {written['method']} and {written['test']}; now:")
    print(f"  pytest {written['test']}")
    print(f"  {command} --plugin {written['method']}")
    return written


def _filled(kind: str, what: str, name: str) -> str:
    """A template in the user's name."""
    from importlib.resources import files

    ending = "_test" if what == "test" else ""
    file: Any = files("sparseworks.cli.templates") / f"{kind.replace('-', '_')}{ending}.py"
    text: str = file.read_text(encoding="utf-8")
    title = "".join(word.capitalize() for word in name.split("-"))
    for old, new in (
        ("own_method", name.replace("-", "_")), ("own-method", name), ("OwnMethod", title)
    ):  # fmt: skip
        text = text.replace(old, new)
    return text
