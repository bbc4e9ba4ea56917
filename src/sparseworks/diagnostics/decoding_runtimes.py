"""Runtimes that decode language models, ours among them, as candidates of `measure_decoding`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.core.errors import MissingDependency, ModelError
from sparseworks.diagnostics.decoding import Candidate
from sparseworks.diagnostics.memory import told

__all__ = [
    "DECODERS", "decoding_peers", "llama_cpp_candidate", "onnxruntime_candidate", "our_candidate",
    "peak_memory", "reopen", "transformers_candidate",
]  # fmt: skip

DECODERS = ("llama.cpp", "onnxruntime-genai", "transformers")
_GGUF = ("F16", "Q8_0", "Q4_0")
_CONTEXT = 4096  # tokens, at most


def our_candidate(name: str, decoder: Any, folder: Path | None = None) -> Candidate:
    """A compiled decoder; saved into `folder` where one is given."""
    from sparseworks.engine.decoder.generating import DecoderCache

    state: dict[str, Any] = {}
    saved = None
    if folder is not None:
        saved = "sparseworks", str(folder / f"{name}.safetensors".replace("/", "-"))
        decoder.save(saved[1])

    def prompt(ids: list[int]) -> Tensor:
        past = DecoderCache(decoder.native)
        past.start(1, len(ids) + 1024)
        state["past"] = past
        return _next(decoder(torch.tensor([ids]), cache=past, logits_to_keep=1))

    def step(token: int) -> Tensor:
        return _next(decoder(torch.tensor([[token]]), cache=state["past"]))

    def losses(ids: Tensor) -> Tensor:
        return _losses(decoder(ids[None]).logits[0], ids)

    return Candidate(name, decoder.report.nbytes, prompt, step, losses, saved)


def transformers_candidate(
    model: nn.Module, dtype: torch.dtype = torch.bfloat16, folder: Path | None = None
) -> Candidate:
    """The model itself, eager; saved into `folder` where one is given."""
    import copy

    twin: Any = copy.deepcopy(model).to(dtype).eval()
    state: dict[str, Any] = {}
    saved = None
    if folder is not None:
        saved = "transformers", str(folder / "transformers")
        twin.save_pretrained(saved[1])

    @torch.no_grad()
    def feed(ids: Tensor, past: Any) -> Tensor:
        out = twin(input_ids=ids, use_cache=True, logits_to_keep=1,
                   **({} if past is None else {state["name"]: past}))  # fmt: skip
        state["name"] = "cache" if out.get("cache") is not None else "past_key_values"
        state["past"] = out[state["name"]]
        return _next(out)

    @torch.no_grad()
    def losses(ids: Tensor) -> Tensor:
        return _losses(twin(input_ids=ids[None]).logits[0].float(), ids)

    table = twin.get_input_embeddings().weight
    shared = twin.get_output_embeddings().weight is table
    size = sum(p.nbytes for p in twin.parameters()) - (0 if shared else table.nbytes)
    kind = str(dtype).removeprefix("torch.")
    return Candidate(
        f"transformers {kind}", size, lambda ids: feed(torch.tensor([ids]), None),
        lambda token: feed(torch.tensor([[token]]), state["past"]), losses, saved,
    )  # fmt: skip


def llama_cpp_candidate(model: nn.Module, type: str, threads: int, folder: Path) -> Candidate:
    """llama.cpp through llama-cpp-python, on a GGUF file of the model.

    Raises:
        MissingDependency: llama-cpp-python or gguf is not installed.
        ModelError: a family that is not written as GGUF here.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingDependency("llama.cpp: pip install llama-cpp-python gguf")
    from sparseworks.io.gguf import export_gguf

    config: Any = model.config
    path = folder / f"{type}.gguf"
    export_gguf(model, path, type)
    table = model.get_input_embeddings().weight.numel() * 2  # type: ignore[operator]
    return _llama_cpp(path, os.path.getsize(path) - table, config, threads)


def _llama_cpp(path: Path, nbytes: int, config: Any, threads: int) -> Candidate:
    import llama_cpp
    import numpy as np

    context = min(_CONTEXT, config.max_position_embeddings)
    engine: Any = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip

    def logits() -> Any:
        found = llama_cpp.llama_get_logits(engine._ctx.ctx)
        return np.ctypeslib.as_array(found, shape=(config.vocab_size,))

    def prompt(ids: list[int]) -> Any:
        engine.reset()
        engine.eval(ids)
        return logits()

    def step(token: int) -> Any:
        engine.eval([token])
        return logits()

    name = f"llama.cpp {path.stem}"
    return Candidate(name, nbytes, prompt, step, _by_steps(prompt, step), ("llama.cpp", str(path)))


def onnxruntime_candidate(
    model: nn.Module, type: str, threads: int, folder: Path, tokenizer: Any = None
) -> Candidate:
    """onnxruntime-genai, on a model that its own builder writes.

    Args:
        type: int4 or fp32, as the builder names them.
        tokenizer: what the builder copies; None: one without words, as it refuses a model alone.

    Raises:
        MissingDependency: onnxruntime-genai is not installed.
        ModelError: its builder does not take the model.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise MissingDependency("onnxruntime-genai: pip install onnxruntime-genai onnx onnx-ir")
    source, made = folder / "source", folder / f"onnxruntime-genai {type}"
    if not source.exists():
        model.save_pretrained(source)  # type: ignore[operator]
        (_no_words() if tokenizer is None else tokenizer).save_pretrained(source)
    command = ["-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(made),
               "-p", type, "-e", "cpu", "-c", str(folder / "cache")]  # fmt: skip
    built = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    settings = made / "genai_config.json"
    if not settings.exists():
        said = built.stderr.strip().splitlines()
        raise ModelError(f"its builder: {said[-1] if said else built.returncode}")
    about = json.loads(settings.read_text())
    options = about["model"]["decoder"].setdefault("session_options", {})
    options["intra_op_num_threads"] = threads
    settings.write_text(json.dumps(about))
    config: Any = model.config
    return _onnxruntime(made, config)


def _no_words() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made: Any = PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return made(tokenizer_object=words, unk_token="<unk>", bos_token="<unk>", eos_token="<unk>")


def _onnxruntime(made: Path, config: Any) -> Candidate:
    import numpy as np
    import onnxruntime_genai

    engine = onnxruntime_genai.Model(str(made))
    state: dict[str, Any] = {}

    def feed(ids: list[int]) -> Any:
        state["run"].append_tokens(np.array([ids], dtype=np.int32))
        return state["run"].get_logits()[0, -1]

    def prompt(ids: list[int]) -> Any:
        settings = onnxruntime_genai.GeneratorParams(engine)
        settings.set_search_options(
            max_length=min(len(ids) + 1024, config.max_position_embeddings), do_sample=False
        )
        state["run"] = onnxruntime_genai.Generator(engine, settings)
        return feed(ids)

    def step(token: int) -> Any:
        return feed([token])

    size = sum(f.stat().st_size for f in made.glob("model.onnx*"))
    return Candidate(made.name, size, prompt, step, _by_steps(prompt, step),
                     ("onnxruntime-genai", str(made)))  # fmt: skip


def decoding_peers(
    model: nn.Module, names: Sequence[str], threads: int, folder: Path, notes: list[str],
    tokenizer: Any = None,
) -> list[Candidate]:  # fmt: skip
    """The other runtimes that are there; `notes` says why one is not."""
    makers: dict[str, list[Callable[[], Candidate]]] = {
        "llama.cpp": [
            lambda t=t: llama_cpp_candidate(model, t, threads, folder)  # type: ignore[misc]
            for t in _GGUF
        ],
        "onnxruntime-genai": [
            lambda: onnxruntime_candidate(model, "int4", threads, folder, tokenizer)
        ],
        "transformers": [lambda: transformers_candidate(model, folder=folder)],
    }
    found: list[Candidate] = []
    for name in names:
        try:
            found += [make() for make in makers[name]]
        except (MissingDependency, ModelError) as error:
            notes.append(f"{name}: {error}")
    return found


def reopen(runtime: str, path: str, config: Any, threads: int) -> Candidate:
    """What `Candidate.saved` names, opened in this process."""
    if runtime == "sparseworks":
        from sparseworks.engine.decoder.loading import load_decoder

        return our_candidate(runtime, load_decoder(path, threads=threads))
    if runtime == "llama.cpp":
        return _llama_cpp(Path(path), 0, config, threads)
    if runtime == "onnxruntime-genai":
        return _onnxruntime(Path(path), config)
    from transformers import AutoModelForCausalLM

    return transformers_candidate(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


def peak_memory(candidate: Candidate, config: Any, threads: int) -> int | None:
    """Bytes at most in a fresh process that opens a candidate, reads 64 tokens and writes 16,
    beyond what the libraries take; None where it cannot be told."""
    if candidate.saved is None or not told():
        return None
    about = {"vocab_size": config.vocab_size,
             "max_position_embeddings": config.max_position_embeddings}  # fmt: skip
    command = [sys.executable, "-m", "sparseworks.diagnostics.decoding_memory", *candidate.saved,
               json.dumps(about), str(threads)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def _by_steps(prompt: Callable[[list[int]], Any], step: Callable[[int], Any]) -> Any:
    """Losses of a runtime that gives the logits of the last token alone."""

    def losses(ids: Tensor) -> Tensor:
        rows = [torch.from_numpy(prompt(ids[:1].tolist()).copy())]
        rows += [torch.from_numpy(step(t).copy()) for t in ids[1:-1].tolist()]
        return _losses(torch.stack([*rows, rows[-1]]), ids)

    return losses


def _next(output: Any) -> Tensor:
    found: Tensor = output.logits[0, -1]
    return found


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
