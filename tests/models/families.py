"""Small random models of many families, with a batch each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, list[Any]]


def _ids(vocabulary: int = 64, length: int = 12, **more: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(2):
        ids = torch.randint(3, vocabulary, (2, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **more})
    return batches


def _images(channels: int = 3, size: int = 32) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, channels, size, size, generator=generator) for _ in range(2)]


def bert() -> Made:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    batches = _ids()
    batches[0]["attention_mask"] = batches[0]["attention_mask"].clone()
    batches[0]["attention_mask"][0, 8:] = 0
    return BertModel(config), batches


def gpt2() -> Made:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    ), _ids()


def opt() -> Made:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=32,
            word_embed_proj_dim=32,
        )
    ), _ids()


def llama() -> Made:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
        )
    ), _ids()


def gemma3() -> Made:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            head_dim=8,
            num_key_value_heads=2,
            intermediate_size=48,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    ), _ids()


def t5() -> Made:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    batches = _ids()
    for batch in batches:
        batch["decoder_input_ids"] = batch["input_ids"][:, :7]
    return T5ForConditionalGeneration(config), batches


def mixtral() -> Made:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ), _ids()


def gpt_oss() -> Made:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=8,
            num_key_value_heads=2,
            intermediate_size=32,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ), _ids()


def vit() -> Made:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config), _images()


def swin() -> Made:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
    )
    return SwinForImageClassification(config), _images()


def convnext() -> Made:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[8, 16],
        depths=[2, 2],
        num_stages=2,
        image_size=32,
        patch_size=4,
        num_labels=5,
    )
    return ConvNextForImageClassification(config), _images()


def torch_encoder() -> Made:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    batches = [torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), batches


class GroupedCNN(nn.Module):
    """Grouped, dilated, strided convolutions with a skip; nothing repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4)
        self.down = nn.Conv2d(16, 24, (3, 2), stride=(2, 1))
        self.wide = nn.Conv2d(24, 24, 5, padding="same", groups=24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (x + self.grouped(x)).relu()
        x = self.wide(self.down(x)).relu()
        return self.head(x.mean(dim=(2, 3)))


def grouped_cnn() -> Made:
    return GroupedCNN(), _images(4, 16)


def conv1d3d() -> Made:
    model = nn.Sequential(
        nn.Conv3d(4, 8, (1, 3, 2), padding=(0, 1, 1)),
        nn.Flatten(2),
        nn.Conv1d(8, 8, 3, stride=2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    return model, [torch.randn(2, 4, 3, 5, 6)]


class Shared(nn.Module):
    """One layer used three times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


def shared() -> Made:
    return Shared(), [torch.randn(5, 16), torch.randn(3, 16)]


def resnet() -> Made:
    def block(width: int) -> nn.Module:
        return _Residual(width)

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(block(8), block(8)),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.Sequential(block(16), block(16)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    return model, _images(3, 12)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.bn1(self.conv1(x)))))


FAMILIES: dict[str, Callable[[], Made]] = {
    f.__name__: f
    for f in (
        bert,
        gpt2,
        opt,
        llama,
        gemma3,
        t5,
        mixtral,
        gpt_oss,
        vit,
        swin,
        convnext,
        torch_encoder,
        grouped_cnn,
        conv1d3d,
        shared,
        resnet,
    )
}


def make(name: str) -> Made:
    torch.manual_seed(0)
    model, batches = FAMILIES[name]()
    return model.eval(), batches
