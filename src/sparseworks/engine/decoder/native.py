"""A packed `ModelSpec` as the native program that runs it, and the memory of keys and values."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.decoder.spec import (
    LinearSpec,
    MixtureSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
)
from sparseworks.kernels.native import instruction_set, module
from sparseworks.kernels.panels import Panels

__all__ = ["CACHES", "Memory", "NativeDecoder"]

_ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 3, "gelu_tanh": 4, "silu": 5}
_NORMS = {"none": 0, "rms": 1, "layer": 2}
CACHES = {"fp32": (0, torch.float32), "fp16": (1, torch.float16), "int8": (2, torch.int8)}
_FIRST_TABLE = 512  # positions of a table of rotations, doubled as texts grow
_CHUNK = 512  # tokens of one native step


class Memory:
    """Keys and values of some texts, in the order in which the native code reads them.

    Args:
        decoder: whose layers it serves.
        texts: how many.
        capacity: tokens a text, rounded up to 16; grows by `reserve`.
    """

    def __init__(self, decoder: NativeDecoder, texts: int, capacity: int) -> None:
        self.decoder, self.texts = decoder, texts
        self.capacity = -(-capacity // 16) * 16
        self.workspace = decoder.code.Workspace()
        _, dtype = CACHES[decoder.cache]
        self.tensors: list[list[Tensor]] = []
        for heads, size in decoder.heads:
            wide = -(-size // 16) * 16
            shape = (texts, heads, self.capacity // 16, wide * 16)
            layer = [torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)]
            if dtype == torch.int8:
                layer += [torch.zeros(texts, heads, self.capacity // 16, 16) for _ in range(2)]
            self.tensors.append(layer)
        self._bind()

    def _bind(self) -> None:
        self.order = torch.arange(self.texts, dtype=torch.int32).numpy()
        kind, _ = CACHES[self.decoder.cache]
        self.native = self.decoder.code.Cache(kind, self.texts, self.capacity)
        for (heads, size), layer in zip(self.decoder.heads, self.tensors, strict=True):
            scales: list[Any] = [t.view(-1) for t in layer[2:]] or [None, None]
            flat = [t.view(-1) for t in layer[:2]]
            self.native.add_layer(heads, size, *flat, *scales)

    def reserve(self, tokens: int) -> None:
        """Make room for texts of so many tokens."""
        if tokens <= self.capacity:
            return
        grown = max(tokens, self.capacity + self.capacity // 2)
        grown = min(-(-grown // 16), -(-self.decoder.spec.max_positions // 16)) * 16
        for layer in self.tensors:
            for i, old in enumerate(layer):
                new = torch.zeros(*old.shape[:2], grown // 16, old.shape[3], dtype=old.dtype)
                new[:, :, : old.shape[2]] = old
                layer[i] = new
        self.capacity = grown
        self._bind()

    def select(self, texts: Tensor) -> None:
        """Keep these texts, in this order; one may be taken several times."""
        for layer in self.tensors:
            layer[:] = [t.index_select(0, texts) for t in layer]
        self.texts = int(texts.numel())
        self._bind()

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self.tensors for t in layer)


class NativeDecoder:
    """Runs steps of a packed model.

    Args:
        spec: with every matrix packed.
        cache: dtype of keys and values, a key of `CACHES`.
        threads: of the native code.
        gated: apply the rules for active inputs; False: all inputs count.

    Raises:
        ModelError: no native code here, or parts that do not fit together.
    """

    def __init__(
        self, spec: ModelSpec, cache: str = "fp16", threads: int | None = None, gated: bool = True
    ) -> None:
        code = module()
        if code is None:
            raise ModelError("the native kernels are not built here")
        if cache not in CACHES:
            raise InvalidArgument(f"cache={cache!r}: use one of {', '.join(CACHES)}")
        instruction_set()
        self.code: Any = code.decoder
        self.spec, self.cache, self.gated = spec, cache, gated
        self.threads = torch.get_num_threads() if threads is None else threads
        if self.threads < 1:
            raise InvalidArgument(f"threads={threads} must be at least 1")
        self.heads = [(x.attention.kv_heads, x.attention.size) for x in spec.layers]
        self._held: list[Tensor] = []  # what the native model points into
        self._tables: list[Tensor] = []
        self._special = any(r.long is not None for r in spec.rotary)
        self._lock = threading.Lock()
        self._length = min(_FIRST_TABLE, spec.max_positions)
        self._native = self._build()

    def _build(self) -> Any:
        spec, code = self.spec, self.code
        model = code.Model(spec.width)
        model.set_embedding(self._table(spec.embedding))
        if spec.positions is not None:
            model.set_positions(self._table(spec.positions), spec.position_offset)
        for rotary in spec.rotary:
            self._tables.append(self._hold(rotary.table(0, self._length)))
            model.add_rotary(self._tables[-1])
        for layer in spec.layers:
            a, made = layer.attention, code.Attention()
            made.qkv, made.out = self._linear(a.qkv), self._linear(a.out)
            made.query_norm = self._norm(a.query_norm, a.size)
            made.key_norm = self._norm(a.key_norm, a.size)
            made.heads, made.kv_heads, made.size = a.heads, a.kv_heads, a.size
            made.scale, made.softcap = a.scale, a.softcap
            made.window, made.rotary = a.window, a.rotary
            block = code.Layer()
            block.attention = made
            for name in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
                setattr(block, name, self._norm(getattr(layer, name), spec.width))
            block.parallel, block.residual = layer.parallel, layer.residual
            if isinstance(layer.mlp, MixtureSpec):
                x = layer.mlp
                block.mixture = code.Mixture(
                    self._linear(x.router), [self._mlp(e) for e in x.experts], x.chosen, x.shared,
                    x.normalized,
                )  # fmt: skip
            else:
                block.mlp = self._mlp(layer.mlp)
            model.add_layer(block)
        model.final_norm = self._norm(spec.final_norm, spec.width)
        model.head = self._linear(spec.head)
        model.embedding_scale = spec.embedding_scale
        model.logit_softcap, model.logit_scale = spec.logit_softcap, spec.logit_scale
        try:
            model.check()
        except ValueError as error:
            raise ModelError(str(error)) from None
        return model

    def _hold(self, tensor: Tensor) -> Tensor:
        kept = tensor.detach().contiguous()
        self._held.append(kept)
        return kept

    def _table(self, tensor: Tensor) -> Tensor:
        seen = {torch.float32: torch.float32, torch.bfloat16: torch.uint16,
                torch.float16: torch.int16}  # fmt: skip
        if tensor.dtype not in seen:
            tensor = tensor.float()
        return self._hold(tensor).view(seen[tensor.dtype])

    def _linear(self, linear: LinearSpec) -> Any:
        assert isinstance(linear.weight, Panels)
        bias = linear.bias
        if bias is not None:
            bias = self._hold(torch.nn.functional.pad(bias.float(), (0, -bias.numel() % 16)))
        made = self.code.Linear(linear.weight.native, bias)
        rule = linear.active
        if rule is not None and self.gated:
            weight = None if rule.weight is None else self._hold(rule.weight)
            made.set_active(rule.threshold, rule.keep, weight)
        return made

    def _norm(self, norm: NormSpec, size: int) -> Any:
        parts = [None if t is None else self._hold(t.float()) for t in (norm.weight, norm.bias)]
        return self.code.Norm(_NORMS[norm.kind], size, *parts, norm.eps)

    def _mlp(self, mlp: MlpSpec) -> Any:
        kind = _ACTIVATIONS[mlp.activation]
        return self.code.Mlp(self._linear(mlp.up), self._linear(mlp.down), mlp.gated, kind)

    def _reach(self, first: int, length: int) -> None:
        """Tables of rotations for positions first .. length - 1 of a text of `length` tokens."""
        if length > self._length:
            self._length = min(max(2 * self._length, length), self.spec.max_positions)
            for i, rotary in enumerate(self.spec.rotary):
                self._tables[i] = self._hold(rotary.table(0, self._length))
                self._native.set_rotary(i, self._tables[i])
        for rotary, table in zip(self.spec.rotary, self._tables, strict=True):
            if rotary.long is not None:
                table[first:length] = rotary.table(first, length, length)

    @torch.no_grad()
    def step(
        self, memory: Memory, token: Tensor, text: Tensor, position: Tensor, want: Tensor
    ) -> Tensor:
        """Take tokens in, and give logits `[wanted, vocabulary]`, fp32.

        Args:
            memory: of the texts.
            token, text, position: `[tokens]`; the tokens of a text side by side and in order,
                positions following those that are in `memory`.
            want: indices of the tokens for which logits are asked, ascending.

        Raises:
            InvalidArgument: a text grows longer than the model has positions, or tokens that are
                not in the vocabulary.
        """
        self._prepare(memory, int(position.min()), int(position.max()) + 1)
        logits = torch.empty(want.numel(), self.spec.head.weight.rows)
        parts = [t.to(torch.int32).contiguous() for t in (token, text, position)]
        want = want.to(torch.int32)
        try:
            for begin in range(0, token.numel(), _CHUNK):
                end = min(begin + _CHUNK, token.numel())
                low, high = torch.searchsorted(want, torch.tensor([begin, end])).tolist()
                self.code.run(
                    self._native, memory.native, memory.workspace, *(t[begin:end] for t in parts),
                    want[low:high] - begin, logits[low:high], self.threads,
                )  # fmt: skip
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
        return logits

    def step_each(self, memory: Memory, token: Tensor, position: Tensor) -> Tensor:
        """`step` with one token for each text and logits of all; `position` int32.

        Arrays go to the native code through numpy, whose exchange is cheaper than torch's: what a
        step costs beside its products is a twentieth of a millisecond.
        """
        places = position.numpy()
        self._prepare(memory, int(places.min()), int(places.max()) + 1)
        logits = torch.empty(token.numel(), self.spec.head.weight.rows)
        try:
            self.code.run(
                self._native, memory.native, memory.workspace, token.numpy().astype("int32"),
                memory.order, places, memory.order, logits.numpy(), self.threads,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidArgument(str(error)) from None
        return logits

    def _prepare(self, memory: Memory, first: int, last: int) -> None:
        """Room and rotations for positions first .. last - 1.

        Raises:
            InvalidArgument: there are not so many positions.
        """
        if last > self.spec.max_positions:
            raise InvalidArgument(
                f"the cache is full: a text of {last} tokens, the model has positions for "
                f"{self.spec.max_positions}"
            )
        memory.reserve(last)
        if self._special or last > self._length:
            with self._lock:
                self._reach(first, last)
