"""What a user would run instead: the same model in other runtimes, ready to be called."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparseworks.engine.measuring import tensors_of
from sparseworks.io.onnx import onnx_session, write_onnx
from sparseworks.models.calls import Arguments, call

__all__ = ["PEERS", "peer"]

PEERS = ("torch", "torch.compile", "onnxruntime", "openvino")


class _Flat(nn.Module):
    """Tensors in, the last of them by name, the first tensor out, for export."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        count = len(tensors) - len(self.names)
        named = dict(zip(self.names, tensors[count:], strict=True))
        return tensors_of(self.model(*tensors[:count], **named))[0]


def peer(
    name: str, model: nn.Module, example: Any, dtype: torch.dtype, threads: int, place: Path
) -> Callable[[], Any] | str:
    """A call of the model on the example in another runtime.

    Args:
        name: one of `PEERS`.
        model: in evaluation mode.
        example: what the model is called with.
        dtype: fp32; bf16 (autocast in torch, the hint in openvino); or int8 (dynamic quantization,
            in torch of linear layers).
        threads: of the runtime.
        place: a folder for exported files.

    Returns:
        The call, or why there is none.
    """
    given = Arguments.of(example)
    if name.startswith("torch"):
        run = model
        if dtype == torch.int8:
            if name == "torch.compile":
                return "fp32 or bf16"
            try:
                run = _quantized(model)
            except Exception as error:  # deprecated, and not for every model
                return f"no dynamic quantization: {str(error).strip().splitlines()[:1]}"
        elif name == "torch.compile":
            run = torch.compile(model)  # type: ignore[assignment]

        def eager() -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return call(run, given)

        return eager
    package = name
    if importlib.util.find_spec(package) is None:
        return "not installed"
    others = {"onnxruntime": torch.bfloat16, "openvino": torch.int8}
    if dtype == others[name]:
        return f"no {str(dtype).removeprefix('torch.')} here"
    tensors = tuple(given.values)
    try:
        path = place / "model.onnx"
        if not path.exists():
            write_onnx(_Flat(model, list(given.kwargs)), tensors, {}, path)
    except Exception as error:  # whatever the exporter raises on a model it cannot follow
        return f"no ONNX export: {str(error).strip().splitlines()[:1]}"
    arrays = [t.numpy() for t in tensors]
    if name == "onnxruntime":
        try:
            path = _quantized_onnx(path) if dtype == torch.int8 else path
            session = onnx_session(path, threads)
        except Exception as error:  # of its own kinds, for operators without int8
            return f"no session: {str(error).strip().splitlines()[:1]}"
        feed = dict(zip((i.name for i in session.get_inputs()), arrays, strict=True))
        return lambda: session.run(None, feed)
    import openvino

    hint = "bf16" if dtype == torch.bfloat16 else "f32"
    network = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads}
    )
    return lambda: network(arrays)


def _quantized(model: nn.Module) -> nn.Module:
    """Linear layers in int8, inputs scaled in each call."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    return cast(nn.Module, made)


def _quantized_onnx(path: Path) -> Path:
    """Matrix products and convolutions in int8, inputs scaled in each call."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    quantized = path.with_name("int8.onnx")
    if not quantized.exists():
        model = onnx.load(path)
        del model.graph.value_info[:]  # the quantizer infers shapes anew
        quantize_dynamic(model, quantized)
    return quantized
