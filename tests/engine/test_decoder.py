"""The native decoder is the model it was made from, and generates as transformers does."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from decoders import FAMILIES, family
from torch import nn

import sparseworks as sw
from sparseworks.core.errors import CheckpointError, InvalidArgument, ModelError
from sparseworks.kernels.native import available

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not available(), reason="the native kernels are not built")


def exact(model, **options):
    decoder = sw.compile_decoder(model, dtype="fp32", cache="fp32", **options)
    assert type(decoder).__name__ == "Decoder", decoder.notes
    return decoder


def batch():
    """Texts of different lengths, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 97, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :1] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def pair():
    model = family("llama")
    return model, exact(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_generates_the_same_tokens(name):
    model = family(name)
    decoder = exact(model)
    given = batch()
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(**given, **options)
    assert torch.equal(decoder.generate(**given, **options), wanted)
    assert wanted.unique().numel() > 6  # it does not say one word for ever


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-neox", "qwen2 moe"])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
def test_logits_are_those_of_the_packed_weights(name, dtype):
    """Against the model with its matrices replaced by what the panels say."""
    from sparseworks.engine.decoder.reading import read_model
    from sparseworks.kernels.panel_products import unpack_panels

    model = family(name)
    sw.prune(model, "magnitude", sparsity=0.6)
    decoder = sw.compile_decoder(model, dtype=dtype, cache="fp32")
    spec = read_model(model)
    for mine, packed in zip(spec.linears(), decoder.native.spec.linears(), strict=True):
        dense = unpack_panels(packed.weight)
        reference = mine.weight.make().float()
        assert float((dense - reference).norm() / reference.norm()) < 0.12
        mine.weight = sw_pack(dense)
    from sparseworks.engine.decoder.native import Memory, NativeDecoder

    ids = torch.randint(2, 97, (3,), generator=torch.Generator().manual_seed(0))
    steps = []
    for native in (decoder.native, NativeDecoder(spec, "fp32")):
        memory = Memory(native, 1, 16)
        zero = torch.zeros(3, dtype=torch.int64)
        steps.append(native.step(memory, ids, zero, torch.arange(3), torch.arange(3)))
    assert float((steps[0] - steps[1]).norm() / steps[1].norm()) < 1e-3


def sw_pack(dense):
    from sparseworks.kernels.panel_packing import pack_panels
    from sparseworks.kernels.panels import Format

    return pack_panels(dense, Format.FLOAT).panels


@pytest.mark.parametrize("options", [
    {"num_beams": 3}, {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"num_return_sequences": 2,
     "do_sample": True}, {"use_cache": False}, {"min_new_tokens": 5, "eos_token_id": 5},
], ids=str)  # fmt: skip
def test_generation_options(pair, options):
    model, decoder = pair
    options = {"do_sample": False} | options
    found = []
    for m in (model, decoder):
        torch.manual_seed(3)
        found.append(m.generate(**batch(), max_new_tokens=12, pad_token_id=0, **options))
    assert torch.equal(*found)


def test_streamers_and_stopping_criteria(pair):
    model, decoder = pair

    class Stream:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.flatten().tolist())

        def end(self):
            self.seen.append("end")

    ids = batch()["input_ids"][1:2]
    streams = [Stream(), Stream()]
    stop = [lambda ids, scores: torch.full((ids.shape[0],), ids.shape[1] >= 14)]
    for m, s in zip((model, decoder), streams, strict=True):
        m.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, streamer=s,
                   stopping_criteria=stop)  # fmt: skip
    assert streams[0].seen == streams[1].seen and streams[0].seen[-1] == "end"
    assert len(streams[0].seen) == 14 - 9 + 2


def test_an_assistant_changes_nothing(pair):
    model, decoder = pair
    draft = copy.deepcopy(model)
    with torch.no_grad():
        draft.lm_head.weight.add_(0.02 * torch.randn_like(draft.lm_head.weight))
    ids = batch()["input_ids"][1:2]
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    assert torch.equal(decoder.generate(ids, assistant_model=exact(draft), **options), wanted)


def test_prompts_in_pieces_and_long_ones():
    model = family("llama", max_position_embeddings=1600)
    decoder = exact(model)
    ids = torch.randint(2, 97, (1, 1200), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(ids).logits
    found = decoder(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    past, parts = None, []
    for part in ids.split([1, 2, 300, 5, 892], 1):
        out = decoder(part, cache=past, use_cache=True)
        past = out.get("cache", out.get("past_key_values"))
        parts.append(out.logits)
    assert float((torch.cat(parts, 1) - wanted).norm() / wanted.norm()) < 1e-5
    last = decoder(ids, logits_to_keep=3).logits
    assert last.shape == (1, 3, 97) and torch.allclose(last, found[:, -3:], atol=1e-4)


@pytest.mark.parametrize("cache,limit", [("fp16", 2e-3), ("int8", 3e-2)])
def test_smaller_caches_stay_close(cache, limit):
    model = family("qwen3")
    decoder = sw.compile_decoder(model, dtype="fp32", cache=cache)
    ids = torch.randint(2, 97, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = model(ids).logits
    assert float((decoder(ids).logits - wanted).norm() / wanted.norm()) < limit


def test_labels_give_the_loss(pair):
    model, decoder = pair
    ids = batch()["input_ids"][1:2]
    with torch.no_grad():
        assert float(decoder(ids, labels=ids).loss) == pytest.approx(
            float(model(ids, labels=ids).loss), rel=1e-5
        )


def test_concurrent_texts(pair):
    _, decoder = pair
    prompts = [torch.randint(2, 97, (1, 5 + i), generator=torch.Generator().manual_seed(i))
               for i in range(6)]  # fmt: skip
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
    wanted = [decoder.generate(p, **options) for p in prompts]
    found: list = [None] * len(prompts)

    def work(i):
        found[i] = decoder.generate(prompts[i], **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_full_cache_says_so(pair):
    _, decoder = pair
    ids = torch.randint(2, 97, (1, 97))
    with pytest.raises(InvalidArgument, match="cache is full"):
        decoder(ids)


def test_misuse_is_refused(pair):
    model, decoder = pair
    with pytest.raises(ModelError, match="not a causal language model"):
        sw.compile_decoder(nn.Linear(2, 2))
    for options in ({"dtype": "int5"}, {"head": "x"}, {"cache": "bf16"}, {"threads": 0}):
        with pytest.raises(InvalidArgument):
            sw.compile_decoder(model, **options)
    for ids in (torch.zeros(3, dtype=torch.long), torch.zeros(1, 0).long()):
        with pytest.raises(InvalidArgument, match="at least one token"):
            decoder(ids)
    with pytest.raises(InvalidArgument, match="not there"):
        decoder(torch.tensor([[5, 97]]))
    with pytest.raises(InvalidArgument, match="pad on the left"):
        decoder(torch.tensor([[5, 6]]), attention_mask=torch.tensor([[1, 0]]))
    with pytest.raises(InvalidArgument, match="attention_mask"):
        decoder(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 3))
    with pytest.raises(InvalidArgument, match="position_ids"):
        decoder(torch.tensor([[5, 6]]), position_ids=torch.tensor([[1, 2]]))
    with pytest.raises(InvalidArgument, match="own cache"):
        decoder(torch.tensor([[5, 6]]), past_key_values=object())
    with pytest.raises(ModelError, match="cannot be trained"):
        decoder.train()
    broken = family("llama")
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"lm_head: NaN"):
        sw.compile_decoder(broken)


def test_another_family_is_named_and_runs_layer_by_layer():
    config = transformers.BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(config).eval()
    decoder = sw.compile_decoder(model)
    assert "bloom" in decoder.notes[0] and "bloom" in decoder.explain()
    ids = batch()["input_ids"][1:2]
    found = decoder.generate(ids, max_new_tokens=4, do_sample=False)
    assert found.shape == (1, 13)
    with pytest.raises(ModelError, match="runs layer by layer and has no plan"):
        decoder.save("x")


def test_a_model_that_is_read_wrongly_is_not_used(monkeypatch):
    """A family that looks like Llama but computes something else."""
    model = family("llama")
    layer = model.model.layers[0].mlp
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward(x) * 3)
    decoder = sw.compile_decoder(model, dtype="fp32")
    assert "something else" in decoder.notes[0]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "phi3, long rotations", "opt"])
def test_saved_and_loaded(tmp_path, name):
    model = family(name)
    sw.prune(model, "magnitude", sparsity=0.5)
    decoder = sw.compile_decoder(model, dtype="int8", head="int4")
    path = tmp_path / "decoder.safetensors"
    decoder.save(path)
    again = sw.load_decoder(path)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    given = batch()
    assert torch.equal(again.generate(**given, **options), decoder.generate(**given, **options))
    assert again.explain() == decoder.explain()
    assert type(again.config) is type(decoder.config)


def test_damaged_files_are_refused(tmp_path):
    decoder = sw.compile_decoder(family("llama"), dtype="int4")
    path = tmp_path / "decoder.safetensors"
    decoder.save(path)
    good = path.read_bytes()
    sw.save(family("llama"), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a decoder"):
        sw.load_decoder(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        sw.load_decoder(tmp_path / "nothing")
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        data = bytearray(good)
        at = int(torch.randint(0, min(len(data), 30_000), (1,), generator=generator))
        data[at] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        path.write_bytes(bytes(data[: len(data) - int(torch.randint(0, 2, (1,)))]))
        with contextlib.suppress(CheckpointError, InvalidArgument):
            sw.load_decoder(path)(torch.tensor([[3, 4]]))


def test_a_pipeline_takes_it(pair, data_root):
    folder = data_root / "models" / "novel-llama-6m"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    decoder = exact(model)
    found = [
        transformers.pipeline("text-generation", model=m, tokenizer=tokenizer)(
            "It was a dark night", max_new_tokens=8, do_sample=False
        )
        for m in (model, decoder)
    ]
    assert found[0] == found[1]


def test_memory_is_that_of_the_packed_weights(pair):
    model = family("llama", hidden_size=256, intermediate_size=512, vocab_size=500)
    decoder = sw.compile_decoder(model, dtype="int4")
    matrices = [x.weight for x in decoder.native.spec.linears()]
    held = sum(m.data.untyped_storage().nbytes() + m.offset.nbytes for m in matrices)
    assert held <= 1.01 * decoder.report.nbytes + 1000 * len(matrices)


def gated(name, **rule):
    """A model whose matrices all read only their largest inputs."""
    from sparseworks.models.active import ActiveInputs, InputGate

    model = family(name)
    heads = {id(model.get_output_embeddings())}
    for module in model.modules():
        if (
            type(module) in (nn.Linear, transformers.pytorch_utils.Conv1D)
            and id(module) not in heads
        ):
            InputGate(ActiveInputs(**rule)).attach(module)
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("rule", [{"threshold": 0.4}, {"keep": 20}], ids=["threshold", "top-k"])
def test_inputs_that_do_not_count_are_not_used(name, rule):
    """One token after the other and all at once; a rare input lies at the edge of its rule."""
    model = gated(name, **rule)
    decoder = exact(model)
    ids = batch()["input_ids"][1:2]
    with torch.no_grad():
        wanted = model(ids).logits[0]
    assert not torch.allclose(wanted, family(name)(ids).logits[0], atol=1e-2)
    for found in (decoder(ids).logits[0], torch.cat(one_by_one(decoder, ids))):
        close = (found - wanted).abs().amax(1) < 2e-3 * wanted.abs().amax()
        assert int(close.sum()) >= len(wanted) - 1


def one_by_one(decoder, ids):
    from sparseworks.engine.decoder.generating import DecoderCache

    past = DecoderCache(decoder.native)
    return [decoder(ids[:, i : i + 1], cache=past).logits[0] for i in range(ids.shape[1])]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_columns_are_gathered_where_inputs_are_sparse(dtype, tmp_path, monkeypatch):
    """As the same weights without gathering; also after saving."""
    from sparseworks.engine.decoder import packing

    def seconds(panels, *rest):  # whichever is faster on the processor of the tests
        return 1.0 if panels.format in packing.GATHERED.values() else 2.0

    monkeypatch.setattr(packing, "_seconds", seconds)
    model = gated("llama", keep=20, share=20 / 64)
    decoder = sw.compile_decoder(model, dtype=dtype)
    assert type(decoder).__name__ == "Decoder", decoder.notes
    assert f"column-{dtype}" in {x.format for x in decoder.report.lines[:-1]}
    assert decoder.report.lines[-1].format == dtype
    assert decoder.report.read < decoder.report.nbytes
    held = dict(packing.GATHERED)
    packing.GATHERED.clear()
    try:
        plain = sw.compile_decoder(model, dtype=dtype)
    finally:
        packing.GATHERED.update(held)
    assert {x.format for x in plain.report.lines} == {dtype}
    ids = batch()["input_ids"][1:2]
    wanted = torch.cat(one_by_one(plain, ids))
    found = torch.cat(one_by_one(decoder, ids))
    close = (found - wanted).abs().amax(1) < 1e-2 * wanted.abs().amax()
    assert int(close.sum()) >= len(wanted) - 2
    decoder.save(tmp_path / "d.safetensors")
    again = sw.load_decoder(tmp_path / "d.safetensors")
    assert torch.equal(torch.cat(one_by_one(again, ids)), found)


def test_zeros_of_relu_are_skipped():
    decoder = sw.compile_decoder(family("opt"), dtype="int8")
    for layer in decoder.native.spec.layers:
        assert layer.mlp.up.active is None and layer.mlp.down.active.threshold == 0


def test_gates_that_a_decoder_cannot_apply_are_named():
    from sparseworks.models.active import ActiveInputs, InputGate

    model = family("llama")
    attention = model.model.layers[0].self_attn
    InputGate(ActiveInputs(threshold=0.1)).attach(attention.q_proj)
    assert "rules of their own" in sw.compile_decoder(model).notes[0]
    model = family("llama")
    InputGate(ActiveInputs(threshold=0.1)).attach(model.model.layers[0].mlp)
    assert "cannot apply" in sw.compile_decoder(model).notes[0]
