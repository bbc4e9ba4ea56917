"""The encoder and the ResNet of the README through `sparseworks bench`, fp32, bf16 and int8.

    python benchmarks/speed.py [--out FOLDER] [--repeat 25] [--case NAME ...]

The cases of `--avx2` are those of a processor without AVX-512: our kernels and torch are held to
AVX2, onnxruntime has no such switch and runs as it is.

Needs onnxruntime and openvino beside the package, and the trained ResNet-56 of SPARSEWORKS_DATA.
Writes one JSON a case.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from sparseworks.cli.bench import Options, run
from sparseworks.diagnostics.claims import data_root

AVX2 = {
    "SPARSEWORKS_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
PEERS = ("torch", "onnxruntime", "openvino")


def cases() -> dict[str, Options]:
    resnet = str(data_root() / "models" / "resnet56-cifar10.safetensors")
    return {
        "resnet56": Options(resnet, sparsity=(0.8, 0.9), batch=(1, 64), peers=PEERS),
        "resnet56-onnxruntime": Options(
            resnet, sparsity=(0.8, 0.9), batch=(1, 64), peers=("onnxruntime",)
        ),
        "minilm": Options("minilm", sparsity=(0.8, 0.9), batch=(1, 16), peers=PEERS),
        "minilm-blocks-bf16": Options(
            "minilm", sparsity=(0.75,), pattern="block16x32", batch=(16,), dtype="bf16", peers=PEERS
        ),
        "minilm-int8": Options(
            "minilm", sparsity=(0.75,), pattern="block16x32", batch=(1, 16), dtype="int8",
            peers=("torch", "onnxruntime"),
        ),
    }  # fmt: skip


def avx2_cases() -> dict[str, Options]:
    found = cases()
    peers = ("torch", "onnxruntime")
    return {
        f"{name}-avx2": Options(**{**vars(found[name]), "peers": peers})
        for name in ("resnet56", "minilm")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeat", type=int, default=25)
    parser.add_argument("--case", nargs="*", help="only these")
    parser.add_argument("--avx2", action="store_true")
    given = parser.parse_args()
    if given.avx2 and not AVX2.items() <= os.environ.items():  # torch reads them as it is loaded
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
    for name, options in (avx2_cases() if given.avx2 else cases()).items():
        if not given.case or name in given.case:
            result = run(Options(**{**vars(options), "repeat": given.repeat}))
            (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
