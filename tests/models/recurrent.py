"""Recurrent networks in every form, and the plain loop that says what each weight multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

KINDS = {"rnn": nn.RNN, "relu": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 3, "batch_first": True, "dropout": 0.5},
    "both": {"bidirectional": True, "num_layers": 2},
    "bare": {"bidirectional": True, "bias": False, "batch_first": True},
}
CASES = [(k, f) for k in KINDS for f in FORMS] + [("lstm", "projected"), ("lstm", "narrow")]
FORMS["projected"] = {"proj_size": 3, "num_layers": 2, "bidirectional": True, "batch_first": True}
FORMS["narrow"] = {"proj_size": 2, "bias": False}


class Tagger(nn.Module):
    """Linear, recurrent layer, Linear: `[n, t, 5]` or `[t, n, 5]` -> scores of 3 per step."""

    def __init__(self, kind: str, form: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        options = {**FORMS[form], **({"nonlinearity": "relu"} if kind == "relu" else {})}
        self.before = nn.Linear(5, 8)
        self.core = KINDS[kind](8, 6, **options)
        width = options.get("proj_size") or 6
        self.after = nn.Linear(width * (2 if options.get("bidirectional") else 1), 3)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.core(torch.tanh(self.before(x)))[0])


def in_one_buffer(model: Tagger) -> Tagger:
    """The weights of the recurrent layer in one storage, as they are on CUDA."""
    flat = torch.cat([p.detach().flatten() for p in model.core.parameters()])
    start = 0
    for parameter in model.core.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    return model


class Packed(Tagger):
    """The same over sequences of given lengths, in any order."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        first = self.core.batch_first
        y = torch.tanh(self.before(x))
        packed = pack_padded_sequence(y, lengths, batch_first=first, enforce_sorted=False)
        return self.after(pad_packed_sequence(self.core(packed)[0], batch_first=first)[0])


class Steps(nn.Module):
    """The three cells one after the other, unrolled in Python."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(5, 8)
        self.lstm, self.gru = nn.LSTMCell(8, 6), nn.GRUCell(6, 7)
        self.rnn, self.after = nn.RNNCell(7, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = g = r = None
        for step in torch.tanh(self.before(x)).unbind(0):
            state = self.lstm(step, state)
            g = self.gru(state[0], g)
            r = self.rnn(g, r)
        assert r is not None
        return self.after(r)


def plain_inputs(core: nn.RNNBase, samples: list[Tensor]) -> tuple[dict[str, list[Tensor]], Any]:
    """What each weight of a recurrent layer multiplies, and the outputs, in fp64.

    Args:
        samples: inputs `[steps, in]`, one sample each.
    """
    seen: dict[str, list[Tensor]] = {}
    weights = {n: p.detach().double() for n, p in core.named_parameters()}
    outputs = []
    for sample in samples:
        x = list(sample.double())
        for layer in range(core.num_layers):
            made = []
            for end in ["", "_reverse"][: 1 + core.bidirectional]:
                tail = f"_l{layer}{end}"
                order = x[::-1] if end else x
                found = _one_way(core, {n[:-len(tail)]: w for n, w in weights.items()
                                        if n.endswith(tail)}, order, tail, seen)  # fmt: skip
                made.append(found[::-1] if end else found)
            x = [torch.cat(parts) for parts in zip(*made)]
        outputs.append(torch.stack(x))
    return seen, outputs


def _one_way(
    core: nn.RNNBase, w: dict[str, Tensor], xs: list[Tensor], tail: str, seen: dict[str, Any]
) -> list[Tensor]:
    h = torch.zeros(w["weight_hh"].shape[1], dtype=torch.float64)
    c = torch.zeros(core.hidden_size, dtype=torch.float64)
    outputs = []
    for x in xs:
        seen.setdefault("weight_ih" + tail, []).append(x)
        seen.setdefault("weight_hh" + tail, []).append(h)
        a = w["weight_ih"] @ x + w.get("bias_ih", 0)
        b = w["weight_hh"] @ h + w.get("bias_hh", 0)
        if core.mode == "LSTM":
            i, f, g, o = (a + b).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif core.mode == "GRU":
            (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
            n, z = (an + (ar + br).sigmoid() * bn).tanh(), (az + bz).sigmoid()
            h = (1 - z) * n + z * h
        else:
            h = (a + b).relu() if core.mode == "RNN_RELU" else (a + b).tanh()
        if "weight_hr" in w:
            seen.setdefault("weight_hr" + tail, []).append(h)
            h = w["weight_hr"] @ h
        outputs.append(h)
    return outputs
