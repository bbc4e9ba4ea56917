"""Every path that a GPU takes, checked and timed, in some minutes on one GPU.

    python scripts/check_cuda.py [--out benchmarks/results/cuda.json] [--device cuda]

Each part is compared with the CPU or with dense products in the same run. A part that fails says
why in the result, and the exit status is 1. `--device cpu` tries the script itself where there is
no GPU; what only a GPU has is then left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparseworks as sw
from sparseworks.diagnostics.claims import machine

Part = Callable[[torch.device], dict[str, Any]]
_NEED_GPU = {"semi_structured"}


def llama(layers: int = 4, width: int = 512) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=11 * width // 4,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def texts(count: int = 8, length: int = 128) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 4096, (4, length), generator=generator)}
            for _ in range(count)]  # fmt: skip


def seconds(call: Callable[[], Any], device: torch.device, repeat: int = 20) -> float:
    """Median of single calls, each waited for."""
    taken = []
    for turn in range(repeat + 3):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if turn >= 3:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def prune(device: torch.device) -> dict[str, Any]:
    """Masks found with the model streamed through the device, and with the model on it."""
    found: dict[str, Any] = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        masks, times = {}, {}
        for where in ("cpu", "streamed", "on the device"):
            model = llama()
            if where == "on the device":
                model.to(device)
            start = time.perf_counter()
            data = None if method == "magnitude" else texts()
            sw.prune(model, method, sparsity=0.5, data=data,
                     device=device if where == "streamed" else None)  # fmt: skip
            times[where] = time.perf_counter() - start
            masks[where] = {n: p.detach().cpu() != 0 for n, p in model.named_parameters()}
        for where in ("streamed", "on the device"):
            same = [float((masks[where][n] == m).float().mean()) for n, m in masks["cpu"].items()]
            # other roundings change which of nearly equal scores is the larger
            assert min(same) > 0.98, f"{method}, {where}: masks agree on {min(same):.1%} only"
            found[f"{method}, {where}"] = {"seconds": times[where], "least_agreement": min(same)}
        found[f"{method}, cpu"] = {"seconds": times["cpu"]}
    return found


def training(device: torch.device) -> dict[str, Any]:
    """RigL under autocast: zeros stay zeros, and what a step costs."""
    found: dict[str, Any] = {}
    batch = texts(1)[0]["input_ids"].to(device)
    for sparse in (False, True):
        model = llama().to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = None
        if sparse:
            run = sw.sparsify(model, optimizer, "rigl", sparsity=0.9, steps=40)
        losses: list[float] = []

        def step(model: Any = model, optimizer: Any = optimizer) -> float:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss)

        taken = seconds(lambda: losses.append(step()), device, 37)  # noqa: B023
        found["sparse" if sparse else "dense"] = {"step_seconds": taken, "loss": losses[-1]}
        assert losses[-1] < losses[0], "the loss does not fall"
        if run is not None:
            run.finish()
            result = [p for p in model.parameters() if p.ndim == 2]
            zeros = sum(int((p == 0).sum()) for p in result) / sum(p.numel() for p in result)
            assert zeros > 0.5, f"only {zeros:.1%} zeros are left"
            found["sparse"]["zeros"] = zeros
    return found


def files(device: torch.device) -> dict[str, Any]:
    """A pruned model on the device, saved and loaded into another one there: bit for bit."""
    model = llama().to(device)
    sw.prune(model, "magnitude", sparsity=0.7)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "model.safetensors"
        sw.save(model, path)
        twin = llama().to(device)
        sw.load(path, twin)
        size = path.stat().st_size
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b) and b.device.type == device.type
    return {"bytes": size, "dense_bytes": sum(p.nbytes for p in model.parameters())}


def slim(device: torch.device) -> dict[str, Any]:
    """A slimmer model on the device computes what the zeroed one did, and is faster."""
    model = llama(width=1024).to(device)
    example = {"input_ids": texts(1)[0]["input_ids"].to(device)}
    before = seconds(lambda: model(**example), device)
    result = sw.slim(copy.deepcopy(model), example, flops=0.5)
    after = seconds(lambda: result.model(**example), device)
    return {"dense_seconds": before, "slim_seconds": after}


def semi_structured(device: torch.device) -> dict[str, Any]:
    """2:4 weights as torch's semi-structured tensors: the same products, timed in fp16."""
    from torch.sparse import to_sparse_semi_structured

    found: dict[str, Any] = {}
    for width in (2048, 4096):
        layer = nn.Linear(width, 4 * width, bias=False, device=device, dtype=torch.float16)
        sw.prune(layer, "magnitude", pattern="2:4")
        x = torch.randn(2048, width, device=device, dtype=torch.float16)
        dense, wanted = seconds(lambda: layer(x), device), layer(x)  # noqa: B023
        layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()))
        off = float((layer(x) - wanted).abs().max() / wanted.abs().max())
        assert off < 1e-2, f"products differ by {off:.1e}"
        sparse = seconds(lambda: layer(x), device)  # noqa: B023
        found[str(width)] = {"dense_seconds": dense, "sparse_seconds": sparse, "off": off}
    return found


def mixture(device: torch.device) -> dict[str, Any]:
    """The layer of experts in bf16: grouped products against the loop, forward and backward."""
    from sparseworks.experts.banks import Experts
    from sparseworks.experts.layers import MoE
    from sparseworks.experts.routers import TopK

    generator = torch.Generator(device).manual_seed(0)
    made: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    layer = MoE(TopK(8, 512, k=2, **made), Experts(8, 512, 1408, **made))
    x = torch.randn(4096, 512, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        fast = layer(x)
    layer.dense = True
    with torch.no_grad():
        plain = layer(x)
    off = float((fast - plain).float().norm() / plain.float().norm())
    assert off < 2e-2, f"outputs differ by {off:.1e}"
    layer.dense = False

    def both() -> None:
        layer.zero_grad()
        layer(x).float().square().mean().backward()

    return {"off": off, "forward_backward_seconds": seconds(both, device)}


def sharded(device: torch.device) -> dict[str, Any]:
    """FSDP2 on one rank: a sparse run over sharded parameters."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29511")
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh

        model = llama().to(device).train()
        sw.prune(model, "magnitude", sparsity=0.5)
        mesh = init_device_mesh(device.type, (1,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = sw.sparsify(model, optimizer, "fixed")
        ids = texts(1)[0]["input_ids"].to(device)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        run.finish()
        weights = [p.full_tensor() for n, p in model.named_parameters() if "proj" in n]
        zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
        assert abs(zeros - 0.5) < 1e-3, f"{zeros:.2%} zeros instead of 50 %"
        return {"zeros": zeros}
    finally:
        distributed.destroy_process_group()


PARTS: tuple[Part, ...] = (
    prune, training, files, slim, semi_structured, mixture, sharded,
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="*", help="only these")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here; --device cpu tries the script itself", file=sys.stderr)
        return 2
    result: dict[str, Any] = {"machine": machine(), "torch": torch.__version__}
    if device.type == "cuda":
        result["gpu"] = torch.cuda.get_device_name(device)
    failed = 0
    for part in PARTS:
        name = part.__name__
        if (options.parts and name not in options.parts) or (
            name in _NEED_GPU and device.type != "cuda"
        ):
            continue
        start = time.perf_counter()
        try:
            found: dict[str, Any] = part(device)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"}
            failed += 1
        found["part_seconds"] = time.perf_counter() - start
        result[name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
