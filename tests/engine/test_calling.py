"""A compiled model is called as its model is, and stands wherever its model stood."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import sparseworks as sw
from sparseworks.core.errors import InvalidArgument, ModelError
from sparseworks.engine.compiled import Compiled
from sparseworks.kernels.native import available
from sparseworks.models.calls import Arguments

pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")
WAYS = ("program_wins", "layers_win", None)


class Net(nn.Module):
    """Several inputs, defaults, and what else a model has."""

    classes = ("cat", "dog")

    def __init__(self):
        super().__init__()
        self.width, self.config = 12, {"hidden": 16}
        self.inner, self.outer = nn.Linear(12, 16), nn.Linear(16, 12)

    @property
    def labels(self):
        return len(self.classes)

    @classmethod
    def kinds(cls):
        return cls.classes

    def doubled(self, x):
        return self(x + x)

    def forward(self, x, mask=None, shift=None, scale=1.0, *, flip=False):
        y = self.outer(F.relu(self.inner(x)))
        y = y if mask is None else y * mask
        y = (y if shift is None else y + shift) * scale
        return y.flip(0) if flip else y


class Rest(nn.Module):
    """Arguments by place alone, any number of them, and any keyword."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x, /, scale=1.0, *others, **named):
        y = self.layer(x) * scale
        for other in (*others, *named.values()):
            y = y + other
        return y


def sparse(model, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p)
    sw.prune(model, "magnitude", sparsity=0.6, include="*")
    return model.eval()


X, MASK, SHIFT = (
    torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)
)


def same(found, wanted):
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-4, atol=1e-4)


@pytest.fixture(params=WAYS)
def fast_and_model(request):
    """A compiled model of every kind, on one input."""
    if request.param is not None:
        request.getfixturevalue(request.param)
    model = sparse(Net())
    made = sw.compile(model, X)
    kinds = {"program_wins": "program", "layers_win": "layers"}
    assert made.kind == kinds.get(request.param, made.kind), made.notes
    return made, model


# an example in every form, and calls that say the same
ONE = [X, (X,), [X], {"x": X}, (X, None), {"scale": 1.0, "x": X, "flip": False}]
TWO = [(X, MASK), [X, MASK], {"mask": MASK, "x": X}, (X, MASK, None), (X, MASK, None, 1.0)]
THREE = [(X, MASK, SHIFT), {"shift": SHIFT, "x": X, "mask": MASK}]
GAP = [{"x": X, "shift": SHIFT}, (X, None, SHIFT)]
CONSTANT = [(X, None, None, 2.0), {"x": X, "scale": 2.0}]
ALIKE = [ONE, TWO, THREE, GAP, CONSTANT]


def calls(example):
    """Every way to write the call of an example."""
    given = (example,) if isinstance(example, torch.Tensor) else example
    names = ("x", "mask", "shift", "scale")
    if not isinstance(given, dict):
        for split in range(len(given) + 1):
            yield given[:split], dict(zip(names[split:], given[split:], strict=False))
        return
    yield (), given
    yield (), dict(reversed(given.items()))
    yield (given["x"],), {k: v for k, v in given.items() if k != "x"}
    yield (), {"mask": None, "shift": None, "scale": 1.0, "flip": False} | given


@pytest.mark.parametrize("examples", ALIKE, ids=["one", "two", "three", "gap", "constant"])
def test_calls_bind_by_the_models_signature_whatever_the_examples_form(examples, program_wins):
    model = sparse(Net())
    for example in examples:
        made = sw.compile(model, example)
        assert made.kind == "program", made.notes
        for other in examples:
            for args, kwargs in calls(other):
                same(made(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize(
    "args, kwargs, what",
    [
        ((), {}, "x is missing"),
        ((X,), {}, "mask is missing: the model was compiled for the arguments x, mask"),
        ((X, None), {}, "mask"),
        ((X, MASK, SHIFT), {}, "shift is given"),
        ((X, MASK), {"scale": 2.0}, r"scale is given \(2.0\)"),
        ((X, MASK), {"scale": 1}, r"scale is given \(1\)"),
        ((X, MASK), {"flip": True}, "flip is given"),
        ((X, MASK), {"x": X}, "multiple values"),
        ((X, MASK), {"unknown": None}, "unexpected keyword"),
        ((X, MASK, None, 1.0, False), {}, "too many positional"),
        ((X, [MASK]), {}, "mask: a tensor"),
    ],
)
def test_other_arguments_are_refused_by_name(args, kwargs, what, program_wins):
    made = sw.compile(sparse(Net()), (X, MASK))
    assert made.kind == "program"
    for _ in range(2):  # what is known of a call must not let it through
        with pytest.raises(InvalidArgument, match=what):
            made(*args, **kwargs)
    same(made(X, mask=MASK), made(X, MASK))


@pytest.mark.parametrize(
    "args, kwargs",
    [((X,), {}), ((X, 1.0, MASK, SHIFT), {}), ((X,), {"one": MASK, "two": SHIFT}),
     ((X, 1.0, MASK), {"two": SHIFT}), ((X, 1.0), {"two": SHIFT})],
)  # fmt: skip
def test_any_number_of_arguments_binds(args, kwargs, program_wins):
    args = tuple(a[..., :6] if isinstance(a, torch.Tensor) else a for a in args)
    kwargs = {k: v[..., :6] for k, v in kwargs.items()}
    model = sparse(Rest())
    made = sw.compile(model, Arguments(args, kwargs))
    assert made.kind == "program", made.notes
    same(made(*args, **kwargs), model(*args, **kwargs))
    same(made(*args, **dict(reversed(kwargs.items()))), model(*args, **kwargs))
    with pytest.raises(InvalidArgument, match="is given"):
        made(*args, **kwargs, more=X[..., :6])
    if len(args) > 2:
        with pytest.raises(InvalidArgument, match=r"\*args\[\d\] is missing"):
            made(*args[:-1], **kwargs)


class Wrapped(nn.Module):
    """As users wrap a model: with a signature that tells no names."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **batch):
        return self.inner(*args, **batch)[0]


def test_token_ids_and_a_mask_are_two_arguments(program_wins):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
    )  # fmt: skip
    model = sparse(transformers.BertModel(config))
    ids = torch.randint(3, 64, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    named = {"attention_mask": mask, "input_ids": ids}
    wanted = model(**named)[0]
    for example in ((ids, mask), [ids, mask], named, (ids, mask, None)):
        made = sw.compile(model, example)
        assert made.kind == "program", made.notes
        for found in (made(ids, mask), made(**named), made(ids, attention_mask=mask),
                      made(ids, mask, None, return_dict=True)):  # fmt: skip
            same(found[0], wanted)
    whole = Wrapped(model).eval()
    for example in ((ids, mask), named):
        made = sw.compile(whole, example)
        assert made.kind == "program", made.notes
        other = {k: v[:2, :9] for k, v in named.items()}  # another size
        if isinstance(example, dict):
            same(made(**other), whole(**other))
        else:
            same(made(ids[:2, :9], mask[:2, :9]), whole(**other))
    assert "forward" not in vars(whole)


def test_nested_arguments_bind_whatever_the_order_of_their_keys(program_wins):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, both, pair):
            return self.layer(both["a"]) + both["b"] * pair[0] + pair[1]

    model = sparse(Nested())
    both, pair = {"a": X, "b": MASK}, (SHIFT, X)
    made = sw.compile(model, (both, pair))
    assert made.kind == "program", made.notes
    same(made(both, pair), model(both, pair))
    same(made(pair=pair, both={"b": MASK, "a": X}), model(both, pair))
    for odd in ({"a": X}, X, {"a": X, "b": MASK, "c": X}):
        with pytest.raises(InvalidArgument, match="nested"):
            made(odd, pair)
    one = sw.compile(model, ({"a": X, "b": 1.0}, [1.0, 0.0]))
    same(one({"a": X, "b": 1.0}, [1.0, 0.0]), model.layer(X) + 1)
    with pytest.raises(InvalidArgument, match="nested"):
        one(X, [1.0, 0.0])
    with pytest.raises(InvalidArgument, match=r"compiled for 1\.0"):
        one({"a": X, "b": 2.0}, [1.0, 0.0])


def test_an_argument_of_the_model_that_is_called_out_is_the_models(program_wins):
    class Out(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x, out):
            return self.layer(x) + out

    model = sparse(Out())
    made = sw.compile(model, (X, MASK))
    assert made.kind == "program"
    for run in (made, Compiled(model, "torch")):
        same(run(X, out=MASK), model(X, MASK))


def test_an_example_that_is_none_or_does_not_fit_is_refused():
    model = sparse(Net())
    for call in (sw.compile, lambda m, e: sw.slim(m, e, flops=0.5)):
        with pytest.raises(InvalidArgument, match="an example is a tensor, a tuple or list"):
            call(model, 3)
        with pytest.raises(InvalidArgument, match=r"does not fit Net.*'x'"):
            call(model, {"y": X})
        with pytest.raises(InvalidArgument, match=r"does not fit Sequential.*the inputs"):
            call(nn.Sequential(nn.Linear(12, 12)), (X, torch.zeros(3)))
    assert model.inner.weight.shape == (16, 12)


def test_slim_takes_an_example_in_every_form():
    dense = sparse(Net())
    for examples in (ONE[:4], TWO, GAP):
        shapes = set()
        for example in examples:
            small = sw.slim(dense, example, flops=0.5, copy=True).model
            shapes.add(small.inner.weight.shape)
            for args, kwargs in calls(example):
                assert small(*args, **kwargs).shape == X.shape
        assert len(shapes) == 1 and shapes.pop() < dense.inner.weight.shape


def test_the_signature_is_the_models(fast_and_model):
    made, model = fast_and_model
    for found in (made, made.forward):
        wanted = inspect.signature(model.forward)
        assert str(inspect.signature(found)) == str(wanted)


def test_it_stands_in_another_module(fast_and_model):
    made, model = fast_and_model
    head = nn.Linear(12, 4)
    whole = nn.Sequential(made, nn.ReLU(), head)
    y = whole(X)
    same(y, head(F.relu(model(X))))
    y.sum().backward()
    assert head.weight.grad is not None
    assert set(whole.state_dict()) == {"2.weight", "2.bias"}
    whole.load_state_dict(whole.state_dict())
    assert sum(p.numel() for p in whole.parameters()) == 12 * 4 + 4
    assert made in list(whole.modules()) and "Compiled(Net" in repr(whole)
    seen = []
    made.register_forward_hook(lambda module, args, output: seen.append(output))
    whole(X)
    assert len(seen) == 1 and not made.training


def test_it_stays_as_it_is(fast_and_model):
    made, _ = fast_and_model
    whole, wanted = nn.Sequential(made), made(X)
    for module in (made, whole):
        assert module.eval() is module
        assert module.to("cpu") is module and module.cpu() is module and module.float() is module
        assert module.to(torch.float32) is module
        with pytest.raises(ModelError, match="no weights to train"):
            module.train()
        for move in (lambda m: m.to("cuda"), lambda m: m.cuda(), lambda m: m.half(),
                     lambda m: m.to("meta"), lambda m: m.to(dtype=torch.bfloat16),
                     lambda m: m.to_empty(device="meta")):  # fmt: skip
            with pytest.raises(ModelError, match=r"stays on the CPU in torch\.float32"):
                move(module)
    with pytest.raises(ModelError, match="`save` writes its plan"):
        made.state_dict()
    with pytest.raises(ModelError, match="takes no weights"):
        whole.load_state_dict({"0.inner.weight": torch.zeros(16, 12)})
    assert torch.equal(made(X), wanted) and not made.training


def test_it_shows_the_models_attributes(fast_and_model):
    made, model = fast_and_model
    assert made.dtype == torch.float32 and made.device == torch.device("cpu")
    first = next(made.parameters())
    assert first.dtype == made.dtype and first.device == made.device and not first.requires_grad
    assert made.config == model.config and made.width == 12 and made.classes == model.classes
    assert made.labels == 2 and made.kinds() == model.kinds()
    same(made.doubled(X), model.doubled(X))  # a method calls what was compiled
    assert not hasattr(made, "missing")
    assert sw.masks(made) is None and sw.masks(model) is not None  # masks of weights it has not
    with pytest.raises(AttributeError, match="'inner' is a part of the Net"):
        _ = made.inner
    made.config = "another"
    assert made.config == "another" and model.config == {"hidden": 16}


def test_it_copies_and_pickles(fast_and_model):
    made, _ = fast_and_model
    wanted = made(X)
    for again in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)),
                  copy.deepcopy(nn.Sequential(made))[0]):  # fmt: skip
        assert torch.equal(again(X), wanted)
        assert again.kind == made.kind and again.times == made.times
        assert again.width == 12 and again.labels == 2 and not again.training
        assert inspect.signature(again.forward) == inspect.signature(made.forward)


def test_a_pickle_of_another_process_leaves_the_memory_of_programs_where_it_is(program_wins):
    model = sparse(Net())
    made = sw.compile(model, X)
    assert made.kind == "program"
    constants = [t for part in made.plan.parts for op in part.ops for t in vars(op).values()]
    weights = [t for t in constants if isinstance(t, torch.Tensor)]
    wanted, places = made(X), [t.data_ptr() for t in weights]
    content = io.BytesIO()
    ForkingPickler(content).dump(made)
    assert not any(t.is_shared() for t in weights)
    assert [t.data_ptr() for t in weights] == places and torch.equal(made(X), wanted)


def test_what_cannot_be_pickled_is_left_out_of_its_pickle(program_wins):
    class Local(Net):
        pass

    model = sparse(Local())
    model.act = lambda x: x
    made = sw.compile(model, X)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again(X), made(X)) and again.width == 12 and not hasattr(again, "act")
    assert copy.deepcopy(made).labels == 2


class Embedded:
    """Data whose items a compiled model makes."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.model(self.x[i : i + 1])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_run_it(start, program_wins):
    made = sw.compile(sparse(Net()), X, threads=2)
    assert made.kind == "program"
    x = torch.randn(4, 300, 12)
    wanted = made(x)  # with all threads, before the fork
    loader = DataLoader(
        Embedded(made, x), batch_size=2, num_workers=1, multiprocessing_context=start
    )
    same(torch.cat(list(loader)), wanted)


def changed(model):
    with torch.no_grad():
        model.outer.bias.add_(1)


def replaced(model):
    model.inner.weight = nn.Parameter(model.inner.weight.detach().clone())


def loaded(model):
    model.load_state_dict(model.state_dict())


def stepped(model):
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("change", [changed, replaced, loaded, stepped])
def test_weights_that_changed_are_told_once(fast_and_model, change):
    made, model = fast_and_model
    twin = copy.deepcopy(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = made(X)
        model(X)
    change(model)
    with pytest.warns(UserWarning, match="of the Net has changed since it was compiled") as seen:
        found = [run(X) for run in (twin, made, made)]
    assert len(seen) == 1 and seen[0].filename == __file__
    assert all(torch.equal(y, wanted) for y in found)


def test_a_model_of_many_tensors_is_looked_at_now_and_then(program_wins, monkeypatch):
    now = 0.0
    monkeypatch.setattr("sparseworks.engine.origin.time.perf_counter", lambda: now)
    model = sparse(nn.Sequential(*(nn.Linear(12, 12) for _ in range(6))))
    made = sw.compile(model, X)
    now = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(X)
        with torch.no_grad():
            model[5].weight.add_(1)
        made(X)  # too early
    now = 2.0
    with pytest.warns(UserWarning, match=r"5\.weight"):
        made(X)


def test_a_model_that_is_gone_has_not_changed(program_wins):
    model = sparse(Net())
    made = sw.compile(model, X)
    assert made.kind == "program"
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None, "the compiled model keeps its model alive"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(X)


def test_what_is_loaded_is_the_same_kind_of_module(program_wins, tmp_path):
    model = sparse(Net())
    made = sw.compile(model, (X, MASK))
    made.save(tmp_path / "plan")
    again = sw.load_compiled(tmp_path / "plan")
    assert isinstance(again, nn.Module) and type(again) is type(made)
    for args, kwargs in calls((X, MASK, None, 1.0)):
        assert torch.equal(again(*args, **kwargs), made(X, MASK))
    assert str(inspect.signature(again.forward)) == str(inspect.signature(model.forward))
    assert again.width == 12 and again.config == model.config and again.dtype == made.dtype
    with pytest.raises(AttributeError, match="is a part of the Net"):
        _ = again.inner
    with pytest.raises(InvalidArgument, match="flip is given"):
        again(X, MASK, flip=True)
    with pytest.raises(ModelError, match="no weights to train"):
        nn.Sequential(again).train()
    assert torch.equal(pickle.loads(pickle.dumps(again))(X, MASK), made(X, MASK))
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "plan").read_bytes()


TEXTS = ["zeros are free", "a sentence of some more words", "x"]


def test_a_pipeline_of_transformers_runs_it(minilm, tmp_path):
    from transformers import pipeline

    model, tokenizer, example, made = minilm
    made.save(tmp_path / "plan")
    options = {"tokenizer": tokenizer, "device": "cpu"}
    wanted = pipeline("feature-extraction", model=model, **options)(TEXTS)
    for run in (made, sw.load_compiled(tmp_path / "plan")):
        assert run.config.to_dict() == model.config.to_dict() | {"use_cache": False}
        assert run.main_input_name == "input_ids" and not run.can_generate()
        found = pipeline("feature-extraction", model=run, **options)(TEXTS)
        for a, b in zip(found, wanted, strict=True):
            same(torch.tensor(a), torch.tensor(b))
        values = [example[k] for k in ("input_ids", "attention_mask", "token_type_ids")]
        by_place = run(*values, return_dict=True, output_attentions=None, use_cache=False)
        assert type(by_place) is type(model(*values))
        assert torch.equal(by_place[0], run(**example)[0])
        with pytest.raises(InvalidArgument, match="output_hidden_states is given"):
            run(**example, output_hidden_states=True)
        with pytest.raises(ModelError, match="`save` writes its plan"):
            run.save_pretrained(tmp_path / "folder")


def test_sentence_transformers_run_it(minilm, minilm_path):
    library = pytest.importorskip("sentence_transformers")
    model, _, _, made = minilm
    encoder = library.SentenceTransformer(minilm_path, device="cpu")
    encoder[0].model = model
    wanted = encoder.encode(TEXTS, convert_to_tensor=True)
    encoder[0].model = made
    same(encoder.encode(TEXTS, convert_to_tensor=True), wanted)
    assert encoder.device == torch.device("cpu")
    same(copy.deepcopy(encoder).encode(TEXTS, convert_to_tensor=True), wanted)
