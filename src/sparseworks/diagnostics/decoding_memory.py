"""The process of `decoding_runtimes.peak_memory`: opens one runtime, prints its bytes."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

_LIBRARIES = {
    "sparseworks": ("sparseworks", "sparseworks.engine.decoder.generating"),
    "llama.cpp": ("llama_cpp", "numpy"),
    "onnxruntime-genai": ("onnxruntime_genai", "numpy"),
    "transformers": ("transformers", "transformers.models.auto.modeling_auto"),
}


def main(runtime: str, path: str, config: str, threads: str) -> None:
    """Arguments as text, as the command line gives them."""
    import torch

    from sparseworks.diagnostics.decoding_runtimes import reopen
    from sparseworks.diagnostics.memory import kilobytes

    for name in _LIBRARIES[runtime]:
        importlib.import_module(name)
    torch.set_num_threads(int(threads))
    before = kilobytes("VmRSS")
    opened = reopen(runtime, path, SimpleNamespace(**json.loads(config)), int(threads))
    opened.prompt(list(range(3, 67)))
    for token in range(3, 19):
        opened.step(token)
    print(1024 * (kilobytes("VmHWM") - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
