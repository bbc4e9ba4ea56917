"""What tests of the engine share."""

from __future__ import annotations

import pytest

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument
from sparseworks.engine import compiling, layers
from sparseworks.kernels.native import instruction_set


@pytest.fixture
def force_isa(monkeypatch):
    """Run on an instruction set by its name; the test is skipped where the processor lacks it."""

    def forced(name):
        monkeypatch.setenv("SPARSEWORKS_ISA", name)
        try:
            instruction_set()
        except InvalidArgument as reason:
            pytest.skip(str(reason))

    return forced


def _times(*runs, repeats=1):
    for run in runs:
        run()
    return [2.0, 1.0, 3.0][: len(runs)]


@pytest.fixture
def program_wins(monkeypatch):
    """Prefer the program wherever there is one, as a quiet machine would."""
    monkeypatch.setattr(compiling, "interleaved_ms", _times)


@pytest.fixture
def layers_win(monkeypatch):
    """Prefer sparse layers one by one, as for a model that cannot be captured."""
    monkeypatch.setattr(compiling, "interleaved_ms", lambda *runs: [2.0, 1.0][: len(runs)])
    monkeypatch.setattr(compiling, "_captured", lambda *given: None)
    monkeypatch.setattr(layers, "interleaved_ms", lambda *runs: [2.0, 1.0])


@pytest.fixture(scope="session")
def minilm(minilm_path):
    """MiniLM at 70 % zeros, its tokenizer, an example, and the model compiled to a program."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(minilm_path).eval()
    sw.prune(model, "magnitude", sparsity=0.7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    example = tokenizer(["a text", "a longer one"], padding=True, return_tensors="pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "interleaved_ms", _times)
        made = sw.compile(model, example)
    assert made.kind == "program", made.notes
    return model, tokenizer, example, made
