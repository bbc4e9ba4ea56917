"""Tasks of lm-evaluation-harness: scores are those that the model's own logits give."""

from __future__ import annotations

import json

import pytest
import torch

import sparseworks as sw
from sparseworks.cli import main
from sparseworks.core.errors import DataError, InvalidArgument
from sparseworks.diagnostics.harness import evaluate
from sparseworks.kernels.native import available

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

BEGINNINGS = [
    "It was a dark night and the", "She looked at him with", "The old man said that he",
    "They walked along the", "In the morning he", "There was no", "He had never", "The door was",
]  # fmt: skip
ENDINGS = [" house", " nothing of it", " great eyes", " other"]
CHOICE = """
task: endings
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{beginning}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
SAID = """
task: said
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{beginning}}}}"
doc_to_target: "{{{{said}}}}"
target_delimiter: ""
generation_kwargs: {{until: ["@@"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def small():
    """A byte-level model, sure of nothing but not the same everywhere."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {chr(c): c - 32 for c in range(32, 127)} | {"<end>": 95}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>"
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, eos_token_id=95, pad_token_id=95,
        bos_token_id=None, initializer_range=0.3,
    )).eval()  # fmt: skip
    return model, tokenizer


@pytest.fixture(scope="module")
def pruned():
    model, tokenizer = small()
    sw.prune(model, "magnitude", sparsity=0.5)
    return model, tokenizer


def likelihood(model, tokenizer, text, ending):
    """log p(ending | text), a token at a time."""
    ids = tokenizer(text + ending, return_tensors="pt").input_ids
    start = len(tokenizer(text).input_ids)
    with torch.no_grad():
        logits = model(ids).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def greedy(model, tokenizer, text, tokens):
    given = tokenizer(text, return_tensors="pt").input_ids
    ids = given
    while ids.shape[1] < given.shape[1] + tokens and int(ids[0, -1]) != tokenizer.eos_token_id:
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, given.shape[1] :], skip_special_tokens=True)


def written(folder, template, documents):
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents))
    task = folder / "task.yaml"
    task.write_text(template.format(data=data, cache=folder / "cache"))
    return str(task)


@pytest.fixture
def endings(pruned, tmp_path):
    """A task, and the share of its labels that the likelihoods choose."""
    model, tokenizer = pruned
    labels = [i % len(ENDINGS) for i in range(len(BEGINNINGS))]
    task = written(tmp_path, CHOICE, [
        {"beginning": b, "endings": ENDINGS, "label": n} for b, n in zip(BEGINNINGS, labels)
    ])  # fmt: skip
    chosen = []
    for text in BEGINNINGS:
        scores = [likelihood(model, tokenizer, text, e) for e in ENDINGS]
        chosen.append(max(range(len(ENDINGS)), key=scores.__getitem__))
    return task, [c == n for c, n in zip(chosen, labels)]


def test_choices_are_those_of_the_likelihoods(pruned, endings):
    model, tokenizer = pruned
    task, right = endings
    before = {n: p.clone() for n, p in model.named_parameters()}
    [score] = evaluate(model, tokenizer, [task])
    assert (score.task, score.metric, score.samples) == ("endings", "acc", len(BEGINNINGS))
    assert score.higher_is_better and score.value == pytest.approx(sum(right) / len(right))
    [first] = evaluate(model, tokenizer, [task], limit=3, batch_size=2)
    assert first.samples == 3 and first.value == pytest.approx(sum(right[:3]) / 3)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.skipif(not available(), reason="the native kernels are not built")
def test_a_decoder_scores_as_its_model(pruned, endings):
    model, tokenizer = pruned
    task, right = endings
    decoder = sw.compile_decoder(model, dtype="fp32", cache="fp32")
    [score] = evaluate(decoder, tokenizer, [task])
    assert score.value == pytest.approx(sum(right) / len(right))


@pytest.mark.skipif(not available(), reason="the native kernels are not built")
@pytest.mark.parametrize("compiled", [False, True])
def test_generated_text_is_that_of_the_model(pruned, tmp_path, compiled):
    model, tokenizer = pruned
    said = [greedy(model, tokenizer, b, 6) for b in BEGINNINGS]
    said[2] = said[5] = "something else"
    task = written(tmp_path, SAID, [
        {"beginning": b, "said": s} for b, s in zip(BEGINNINGS, said)
    ])  # fmt: skip
    run = sw.compile_decoder(model, dtype="fp32", cache="fp32") if compiled else model
    [score] = evaluate(run, tokenizer, [task])
    assert score.metric.startswith("exact_match") and score.value == pytest.approx(6 / 8)


def test_misuse_is_refused(pruned, endings, tmp_path):
    model, tokenizer = pruned
    task, _ = endings
    for options, message in (({"limit": 0}, "limit=0"), ({"fewshot": -1}, "fewshot=-1"),
                             ({"batch_size": 0}, "batch_size=0")):  # fmt: skip
        with pytest.raises(InvalidArgument, match=message):
            evaluate(model, tokenizer, [task], **options)
    with pytest.raises(InvalidArgument, match="no task given"):
        evaluate(model, tokenizer, [])
    with pytest.raises(InvalidArgument, match="no such task"):
        evaluate(model, tokenizer, ["no-such-task-anywhere"])
    with pytest.raises(InvalidArgument, match="no such file"):
        evaluate(model, tokenizer, ["nowhere.yaml"])
    (tmp_path / "documents.jsonl").unlink()
    with pytest.raises(DataError, match=r"task\.yaml: cannot be loaded"):
        evaluate(model, tokenizer, [task])


@pytest.mark.skipif(not available(), reason="the native kernels are not built")
def test_the_command_scores_folders_and_decoders(pruned, endings, tmp_path, capsys):
    model, tokenizer = pruned
    task, right = endings
    folder, file = tmp_path / "pruned", tmp_path / "decoder.safetensors"
    sw.save(model, folder, tokenizer=tokenizer)
    sw.compile_decoder(model, dtype="fp32", cache="fp32").save(file)
    runs = (
        [str(folder)], [str(folder), "--decode", "fp32"], [str(file), "--tokenizer", str(folder)],
    )  # fmt: skip
    for words in runs:
        out = tmp_path / "scores.json"
        assert main(["evaluate", *words, "--tasks", task, "--out", str(out), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told == json.loads(out.read_text())
        assert told["scores"][0]["value"] == pytest.approx(sum(right) / len(right))
    assert main(["evaluate", str(folder), "--tasks", task, "--limit", "2"]) == 0
    assert "endings" in capsys.readouterr().out
    for words, message in (
        ([str(folder)], "give a model and --tasks"),
        ([str(file), "--decode", "int8", "--tasks", task], "a decoder has its weights"),
        ([str(folder), "--decode", "int8", "--dtype", "bf16", "--tasks", task], "not both"),
        ([str(folder), "--tasks", task, "--out", str(tmp_path / "no" / "s.json")], "create it"),
    ):  # fmt: skip
        assert main(["evaluate", *words]) == 1
        assert message in capsys.readouterr().err
