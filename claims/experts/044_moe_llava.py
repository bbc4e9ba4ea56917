"""Staged tuning of a mixture that answers questions on images, against one stage and no experts.

A frozen residual network gives 16 tokens of a CIFAR-10 image, a projector puts them before the
words of a question, and a decoder of novels answers with one letter. Every fifth batch is text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparseworks as sw
from sparseworks.data.images import read_images
from sparseworks.data.text import read_text, token_ids
from sparseworks.diagnostics.claims import Claim, Promise, Setting, data_root
from sparseworks.diagnostics.subjects import language_model_subject
from sparseworks.experts.chunks import token_information
from sparseworks.models.zoo import load_resnet

QUESTIONS = ("Which thing is this?", "An animal or not?", "Where is the light?", "Which colour?")
BATCH = 8
RATES = {"projector": 1e-3, "decoder": 3e-4}
IMAGES, HELD = 1500, 150


@cache
def _pictures() -> tuple[Tensor, Tensor]:
    """Features `[images, 16, 64]` and the answers `[images, questions]`; the last HELD are test."""
    root = data_root()
    train = read_images(root / "cifar10" / "train.parquet", limit=IMAGES)
    test = read_images(root / "cifar10" / "test.parquet", limit=HELD)
    tower: Any = load_resnet(root / "models" / "resnet20-cifar10.safetensors").eval()
    seen: list[Tensor] = []
    tower.layer3.register_forward_hook(lambda m, a, y: seen.append(F.avg_pool2d(y, 2)))
    answers = []
    for part in (train, test):
        for rows in torch.arange(len(part)).split(125):
            with torch.no_grad():
                tower(part.normalized(rows))
            pixels = part.pixels[rows].float()
            quadrant = F.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten(1).argmax(1)
            colour = pixels.mean((2, 3)).argmax(1)
            label = part.labels[rows].long()
            animal = ((label >= 2) & (label <= 7)).long()
            answers.append(torch.stack([label, animal, quadrant, colour], 1))
    return torch.cat(seen).flatten(2).transpose(1, 2), torch.cat(answers)


class Reader(nn.Module):
    """Projector and decoder."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        width = decoder.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, width))
        with torch.no_grad():
            self.projector[2].weight.mul_(0.1)  # about as large as words
        self.decoder = decoder

    def forward(self, image: Tensor, question: Tensor) -> Tensor:
        words = self.decoder.get_input_embeddings()(question).expand(len(image), -1, -1)
        tokens = torch.cat([self.projector(image), words], 1)
        logits: Tensor = self.decoder(inputs_embeds=tokens).logits[:, -1]
        return logits


class Subject:
    """Data of a seed, training and evaluation."""

    def __init__(self, seed: int) -> None:
        decoder, _, _ = language_model_subject(seed, "quick")
        from transformers import AutoTokenizer

        root = data_root()
        tokenizer = AutoTokenizer.from_pretrained(root / "models" / "novel-llama-6m")
        self.questions = [torch.tensor(tokenizer(q)["input_ids"]) for q in QUESTIONS]
        self.letters = torch.tensor([tokenizer(c)["input_ids"][-1] for c in "ABCDEFGHIJ"])
        assert len(set(self.letters.tolist())) == 10
        text = read_text(root / "text" / "novels-train.txt")[:200_000]
        self.text = token_ids(text, tokenizer)
        self.features, self.answers = _pictures()
        torch.manual_seed(seed)
        self.base = Reader(decoder)
        self.generator = torch.Generator().manual_seed(seed)

    def fit(
        self, model: Reader, trained: Iterable[nn.Parameter], steps: range, penalty: Any = None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Steps of one training, each with a batch of its own number."""
        own = {id(p) for p in trained}
        parts = (model.projector, model.decoder)
        groups = [
            {"params": [p for p in part.parameters() if id(p) in own], "lr": lr}
            for part, lr in zip(parts, RATES.values())
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
        model.train()
        for step in steps:
            g = torch.Generator().manual_seed(self.generator.initial_seed() * 10_000 + step)
            if step % 5 == 4:
                first = torch.randint(0, len(self.text) - 32, (BATCH,), generator=g)
                ids = self.text[first[:, None] + torch.arange(32)]
                loss = model.decoder(input_ids=ids, labels=ids).loss
            else:
                question = step % len(QUESTIONS)
                rows = torch.randint(0, IMAGES, (BATCH,), generator=g)
                logits = model(self.features[rows], self.questions[question])
                loss = F.cross_entropy(logits, self.letters[self.answers[rows, question]])
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            model.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            advance()

    @torch.no_grad()
    def score(self, model: Reader) -> tuple[float, float]:
        """Mean loss of the answers to held-out images, and the share of right ones."""
        model.eval()
        losses, right = 0.0, 0.0
        for question, words in enumerate(self.questions):
            logits = model(self.features[IMAGES:], words)
            answers = self.letters[self.answers[IMAGES:, question]]
            losses += float(F.cross_entropy(logits, answers))
            right += float((logits.argmax(1) == answers).double().mean())
        return losses / len(QUESTIONS), right / len(QUESTIONS)


def _information(run: Any, subject: Subject, model: Reader, seed: int) -> tuple[float, float]:
    """Of modality and first expert, mean over layers; and with the tokens shuffled."""
    with torch.no_grad():
        model.eval()(subject.features[IMAGES:], subject.questions[0])
    own, shuffled = [], []
    g = torch.Generator().manual_seed(seed)
    for layer in run.layers.values():
        first = layer.routing.weights.argmax(-1)
        words = (torch.arange(first.shape[1]) >= 16).long().expand_as(first)
        mixed = words.flatten()[torch.randperm(words.numel(), generator=g)]
        own.append(token_information(words, first))
        shuffled.append(token_information(mixed, first.flatten()))
    return sum(own) / len(own), sum(shuffled) / len(shuffled)


def measure(seed: int, setting: Setting) -> Mapping[str, float]:
    steps = 900 if setting == "full" else 72
    one, two = range(steps // 6), range(steps // 6, steps * 2 // 3)
    three = range(steps * 2 // 3, steps)
    subject = Subject(seed)
    staged = copy.deepcopy(subject.base)
    subject.fit(staged, staged.projector.parameters(), one)
    subject.fit(staged, staged.parameters(), two)
    dense = copy.deepcopy(staged)
    with torch.no_grad():
        before = staged.eval()(subject.features[IMAGES:], subject.questions[0])
    run = sw.upcycle(staged.decoder, "moe-llava", seed=seed)
    with torch.no_grad():
        after = staged.eval()(subject.features[IMAGES:], subject.questions[0])
    apart = float((after - before).abs().max() / before.abs().max())
    staged.projector.requires_grad_(False)
    subject.fit(staged, [p for p in staged.parameters() if p.requires_grad], three,
                run.penalty, run.advance)  # fmt: skip
    mlps = [p for n, p in dense.decoder.named_parameters() if ".mlp." in n]
    subject.fit(dense, mlps, three)
    joint = copy.deepcopy(subject.base)
    at_once = sw.upcycle(joint.decoder, "moe-llava", trains="all", seed=seed)
    subject.fit(joint, joint.parameters(), range(steps), at_once.penalty, at_once.advance)
    found = {"apart at the start": apart}
    for name, model in (("staged", staged), ("joint", joint), ("dense", dense)):
        found[f"{name} loss"], found[f"{name} right"] = subject.score(model)
    found["information"], found["information, shuffled"] = _information(
        run, subject, staged, seed
    )  # fmt: skip
    found["over joint"] = found["joint loss"] - found["staged loss"]
    found["over dense"] = found["dense loss"] + 0.01 - found["staged loss"]
    found["same start"] = 1e-5 - apart
    return found


CLAIM = Claim(
    card="044",
    method="moe-llava",
    title="a mixture tuned in three stages answers better than one tuned at once",
    model="frozen ResNet-20, a projector, and a 6M-parameter Llama with 4 experts in every second "
    "layer (two MLPs a token there)",
    data="CIFAR-10 with four questions answered by a letter, every fifth batch plain text of "
    "novels; 72 steps of 8 (full: 900)",
    baseline="all parameters and experts from the first step; the stages with dense MLPs in the "
    "last",
    metric="loss of the answers to 150 test images and four questions, nats",
    promises=(
        Promise("over joint", "three stages below one"),
        Promise("over dense", "at most 0.01 above dense MLPs in the last stage"),
        Promise("same start", "the last stage starts from the dense function, to 1e-5", exact=True),
    ),
    measure=measure,
)
