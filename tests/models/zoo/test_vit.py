"""The vision transformer against torch's own encoder layer with the same weights."""

import pytest
import torch
from torch import nn

from sparseworks.core.errors import InvalidArgument
from sparseworks.models.zoo.vit import ViT


def test_logits_are_those_of_torch_encoder_layers_with_the_same_weights():
    torch.manual_seed(0)
    ours = ViT(8, 2, 1, dim=16, depth=3, heads=4, hidden=20, classes=5)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(6, 1, 8, 8)
    patches = x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(6, 16, 4)
    t = patches @ ours.patches.weight.view(16, 4).T + ours.patches.bias
    t = torch.cat([ours.token.expand(6, -1, -1), t], 1) + ours.positions
    for block in ours.blocks:
        layer = nn.TransformerEncoderLayer(
            16, 4, 20, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        a = block.attention
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat(
                    [a.query.weight, a.key.weight, a.value.weight]
                ),
                "self_attn.in_proj_bias": torch.cat([a.query.bias, a.key.bias, a.value.bias]),
                **{f"self_attn.out_proj.{k}": v for k, v in a.out.state_dict().items()},
                **{f"linear1.{k}": v for k, v in block.fc1.state_dict().items()},
                **{f"linear2.{k}": v for k, v in block.fc2.state_dict().items()},
                **{f"norm1.{k}": v for k, v in block.norm1.state_dict().items()},
                **{f"norm2.{k}": v for k, v in block.norm2.state_dict().items()},
            }
        )
        t = layer(t)
    torch.testing.assert_close(ours(x), ours.head(ours.norm(t[:, 0])), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"size": 9, "patch": 2}, {"dim": 10, "heads": 4}])
def test_sizes_that_do_not_divide_are_refused(options):
    with pytest.raises(InvalidArgument, match="must divide"):
        ViT(**options)
