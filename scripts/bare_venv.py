"""Install a wheel into an empty venv with links to its dependencies, and nothing else.

    python scripts/bare_venv.py VENV WHEEL

The dependencies are those of this interpreter, so that no second torch is fetched or copied.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path


def needed(wheel: Path) -> set[str]:
    """The packages that the wheel needs, and those that they need, without extras."""
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        [metadata] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    waiting = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    found: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if "extra ==" in requirement:
            continue
        [name] = re.findall(r"^[\w.-]+", requirement)
        try:
            again = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            if ";" not in requirement:  # else of another system or Python
                raise SystemExit(f"bare_venv: {name} is not installed here") from None
            continue
        if name not in found:
            found.add(name)
            waiting += again
    return found


def link(name: str, site: Path) -> None:
    """Links to all that a package has installed."""
    distribution = importlib.metadata.distribution(name)
    for file in distribution.files or ():
        top = file.parts[0]
        if top in ("..", "__pycache__") or (site / top).exists():
            continue
        (site / top).symlink_to(Path(str(distribution.locate_file(top))))


def main() -> None:
    venv, wheel = Path(sys.argv[1]), Path(sys.argv[2])
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = venv / "lib" / version / "site-packages"
    for name in sorted(needed(wheel)):
        link(name, site)
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python",
         str(venv / "bin" / "python"), "install", "--quiet", "--no-deps", str(wheel)],
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
