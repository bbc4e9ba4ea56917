"""Models that every method can be tried on in a second: 8 x 8 images in one channel, ten classes.

The tests of methods import them; those of commands name them as FILE.py:FACTORY.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseworks.models.zoo import DDIM, SuperNetwork, TextToImage, ViT


def net() -> nn.Module:
    """Two convolutions under batch norm and two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def pointwise() -> nn.Module:
    """With 1 x 1 convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1),
        nn.Flatten(), nn.Linear(288, 10),
    ).eval()  # fmt: skip


def supernet() -> nn.Module:
    """All operations of a cell at once."""
    torch.manual_seed(0)
    return SuperNetwork(nodes=1, cells=1, channels=4, in_channels=1).eval()


def vit() -> nn.Module:
    """With attention probabilities that a module makes."""
    torch.manual_seed(0)
    return ViT(8, 4, 1, dim=16, depth=1, heads=2).eval()


def diffusion() -> nn.Module:
    """Noise from noisy images, times and words."""
    torch.manual_seed(0)
    return TextToImage(width=16, depth=1, heads=2, text_depth=1).eval()


class GatedBlock(nn.Module):
    """An MLP as language models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 32), nn.Linear(16, 32)
        self.down_proj, self.act_fn = nn.Linear(32, 16), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return x + hidden


def gated() -> nn.Module:
    """With gated MLPs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), GatedBlock(), GatedBlock(), nn.Linear(16, 10)
    ).eval()


DECODER_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48,
}  # fmt: skip


def language_model(kind: str = "Llama", **more: int) -> nn.Module:
    """A decoder of two blocks as transformers has it."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**DECODER_SIZES, **more})
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.eval()


def letters(**special: str) -> Any:
    """A tokenizer of transformers to which every letter is a token; 28 of them, 0 unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["[UNK]", *"abcdefghijklmnopqrstuvwxyz "])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", **special)


def mixture() -> nn.Module:
    """With experts that a router chooses."""
    return language_model("Mixtral", num_local_experts=4, num_experts_per_tok=2)


def texts() -> list[dict[str, Tensor]]:
    """Batches of token ids."""
    g = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, 64, (3, 20), generator=g)} for _ in range(2)]


def odd_texts() -> list[dict[str, Tensor]]:
    """Batches of different lengths, one of them padded; they do not halve."""
    g = torch.Generator().manual_seed(2)
    batches = []
    for length in (20, 14, 20, 9, 17):
        ids = torch.randint(3, 64, (3, length), generator=g)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    batches[1]["attention_mask"][0, :5] = 0
    return batches


sampler = DDIM(steps=2)


def chains() -> list[tuple[Tensor, Tensor]]:
    """(noise, words), the start of one sampling chain."""
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 1, 8, 8, generator=g), torch.randint(0, 27, (2, 5), generator=g))]


FACTORIES = {
    "activation-gate": language_model,
    "ast": gated,
    "bdwp": gated,
    "blockffn": language_model,
    "cast": gated,
    "cats": gated,
    "cfsp": language_model,
    "chess": gated,
    "comet": language_model,
    "dass": supernet,
    "ecodiff": diffusion,
    "evomoe": language_model,
    "fast-sparse-convnets": pointwise,
    "cptquant": language_model,
    "gqsa": language_model,
    "graph-of-tokens": language_model,
    "hecate": language_model,
    "lazy-neuron": gated,
    "maskllm": gated,
    "moe-llava": language_model,
    "pat": language_model,
    "rounding": language_model,
    "slicegpt": language_model,
    "slorb": gated,
    "spark": gated,
    "sparse-then-prune": vit,
    "sparsing-law": gated,
    "ss-moe": language_model,
    "stun": mixture,
    "upcycling": language_model,
}
"""The methods that `net` has nothing for."""
