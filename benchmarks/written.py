"""Everything that sparseworks writes and reads again, in small: how it is written, and what reading
it gives, as bytes to compare.

Of each there are two versions (other weights of the same model), so that one can take the place of
the other. What is written is made once a process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.masks import Masks

__all__ = ["FORMATS", "OTHERS", "Format", "files", "plain"]


@dataclass(frozen=True)
class Format:
    """A file or folder that is written and read again.

    Args:
        write: `(path, version)`.
        read: what is at the path, as tensors and plain values; `use` is part of it: what a model
            that was read computes.
        name: of the file or folder.
    """

    write: Callable[[Path, int], Any]
    read: Callable[[Path], Any]
    name: str = "file.safetensors"


def plain(value: Any) -> Any:
    """Tensors as (dtype, shape, bytes), for comparing with ==."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), raw
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def net(version: int) -> nn.Module:
    torch.manual_seed(version)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 24),
        nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip
    return model.eval()


@cache
def sparse(version: int) -> nn.Module:
    """Of three layouts: bits and values, codes and values, dense; some zeros that no mask has."""
    model = net(version)
    sw.prune(model, "magnitude", sparsity=0.8, include="4.weight")
    sw.prune(model, "magnitude", pattern="2:4", include="6.weight")
    with torch.no_grad():
        model[4].weight[0, :9] = -0.0
    return model


def layers(version: int) -> nn.Module:
    torch.manual_seed(version)
    sizes = (64, 48, 96, 48, 5)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))).double().eval()


@cache
def quantized(version: int) -> nn.Module:
    """Integers under masks inside of their groups: bits for all, bits for live groups, codes."""
    model = layers(version)
    sw.prune(model, "magnitude", sparsity=0.5, include="0.weight")
    sw.prune(model, "magnitude", sparsity=0.92, include="1.weight")
    sw.prune(model, "magnitude", pattern="2:4", include="2.weight")
    sw.quantize(model, "rounding", bits=5, group=4)
    return model


def _integers(path: Path, version: int) -> None:
    sw.save(quantized(version), path)


def _read_integers(path: Path) -> Any:
    model = sw.load(path, layers(9))
    kept = {n: [q.grid.codes, q.grid.scale, q.grid.zero, q.live, q.bits]
            for n, q in (sw.grids(model) or {}).items()}  # fmt: skip
    return [of_model(model, torch.ones(2, 64).double()), plain(kept)]


def pictures() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def of_model(model: nn.Module, use: Tensor | dict[str, Tensor] | None = None) -> Any:
    found = sw.masks(model)
    given = use if isinstance(use, dict) else {}
    out = model(**given) if given else model(pictures() if use is None else use)
    return plain([model.state_dict(), of_masks(found), getattr(out, "logits", out)])


def of_masks(record: Masks | None) -> Any:
    if record is None:
        return None
    return [record.method, {n: [record[n], record.entry(n).pattern] for n in sorted(record)}]


def language_model(version: int, **more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(version)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
             "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1,
             "eos_token_id": 2, "max_position_embeddings": 64}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **more})).eval()
    sw.prune(model, "magnitude", sparsity=0.6)
    return model


def ids() -> Tensor:
    return torch.arange(3, 15)[None]


@cache
def llama(version: int) -> nn.Module:
    return language_model(version)


def _folder(path: Path, version: int) -> None:
    sw.save(llama(version), path)


def _read_folder(path: Path) -> Any:
    model = sw.from_pretrained(path)
    model.config._name_or_path = model.name_or_path = ""
    configs = [model.config.to_dict(), model.generation_config.to_dict()]
    return [of_model(model, {"input_ids": ids()}), plain(configs)]


def _packed(path: Path, version: int) -> None:
    sw.save(sparse(version), path)


def _masks(path: Path, version: int) -> None:
    sw.save_masks(sparse(version), path)


@cache
def _compiled(version: int) -> Any:
    from sparseworks.engine.compiled import Compiled
    from sparseworks.engine.graph import capture
    from sparseworks.engine.plan import make_plan

    plan = make_plan(capture(sparse(version), (pictures(),), {}), 1)
    return Compiled(plan, "program", 1e-7, {"torch": 2.0, "program": 1.0})


def _plan(path: Path, version: int) -> None:
    _compiled(version).save(path)


def _read_plan(path: Path) -> Any:
    made = sw.load_compiled(path, threads=1)
    return plain([made(pictures()), made.error, made.times])


@cache
def _made(version: int) -> Any:
    return sw.compile_decoder(llama(version), threads=1)


def _decoder(path: Path, version: int) -> None:
    _made(version).save(path)


def _read_decoder(path: Path) -> Any:
    made = sw.load_decoder(path, threads=1)
    said = made.generate(
        ids(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return plain(said.logits)


@cache
def _gated(version: int) -> Any:
    generator = torch.Generator().manual_seed(3)
    data = [torch.randint(0, 64, (2, 8), generator=generator) for _ in range(2)]
    model = language_model(0)
    return sw.sparse_activations(model, "wina", sparsity=(0.5, 0.7)[version], data=data)


def _gates(path: Path, version: int) -> None:
    _gated(version).save(path)


def _read_gates(path: Path) -> Any:
    model = language_model(0)
    run = sw.load_activations(path, model)
    with torch.no_grad():
        return plain([model(ids()).logits, run.method, str(run.options)])


@cache
def _training(version: int) -> dict[str, Any]:
    model = net(version)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(pictures()).square().mean().backward()
    optimizer.step()
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    return {**state, "step": 3 + version, "rate": 0.1}


def _state(path: Path, version: int) -> None:
    from sparseworks.training.checkpointing import save_state

    save_state(path, _training(version))


def _read_state(path: Path) -> Any:
    from sparseworks.training.checkpointing import load_state

    return plain(load_state(path))


def _slim(path: Path, version: int) -> None:
    from sparseworks.weights.structured import save_slim

    save_slim(_slimmed(version), path)


@cache
def _slimmed(version: int) -> Any:
    return sw.slim(net(version), pictures(), flops=0.8)


def _read_slim(path: Path) -> Any:
    from sparseworks.weights.structured import load_slim

    return of_model(load_slim(path, net(9)))


def _certificate(path: Path, version: int) -> None:
    from sparseworks.weights.tickets.ownership import Certificate

    Certificate(f"A. Owner, {version}", 29, "layer1.0.conv1.weight", 3, 7).save(path)


def _read_certificate(path: Path) -> Any:
    from sparseworks.weights.tickets.ownership import Certificate

    return vars(Certificate.load(path))


def _dense(path: Path, version: int) -> None:
    sw.export_dense(sparse(version), path)


FORMATS: dict[str, Format] = {
    "packed file": Format(_packed, lambda p: of_model(sw.load(p, net(9)))),
    "packed integers": Format(_integers, _read_integers),
    "packed folder": Format(_folder, _read_folder, "folder"),
    "masks": Format(_masks, lambda p: plain(of_masks(sw.load_masks(p, net(9))))),
    "compiled model": Format(_plan, _read_plan),
    "compiled decoder": Format(_decoder, _read_decoder),
    "activation gates": Format(_gates, _read_gates),
    "training state": Format(_state, _read_state),
    "slimmed folder": Format(_slim, _read_slim, "folder"),
    "ownership certificate": Format(_certificate, _read_certificate, "certificate.json"),
}  # fmt: skip
OTHERS: dict[str, Format] = {
    "dense export": Format(_dense, lambda p: of_model(sw.load(p, net(9)))),
}


def files(path: Path) -> list[Path]:
    """The files of a format, in order."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
