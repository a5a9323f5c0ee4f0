"""CLIP vision encoder: a picture becomes one feature vector per patch (source: `CLIPVisionModel`).

Differs from a textbook ViT: a LayerNorm *before* the first layer (the checkpoint spells it `pre_layrnorm`), QuickGELU,
and LLaVA takes the features of an inner layer (-2), so later layers and `post_layernorm` are never built.

Shapes: B pictures, S pixels a side, P patches, T = P + 1 tokens (class token first), d width, h heads of size c."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import LlavaConfig, VisionConfig

# By their names in config.json; the second is OpenAI CLIP's approximation of the first.
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        channels, d, side = config.num_channels, config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(d))
        # A convolution whose stride is its kernel: one matrix product per non-overlapping patch.
        self.patch_embedding = nn.Conv2d(channels, d, side, stride=side, bias=False)
        # Filled by hand: nn.Embedding's own init on the meta device would import torch's compiler, which takes seconds.
        positions = torch.zeros(config.num_patches + 1, d)
        self.position_embedding = nn.Embedding.from_pretrained(positions, freeze=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values)  # (B, d, S/patch, S/patch)
        patches = patches.flatten(2).transpose(1, 2)  # (B, P, d), row by row from the top left
        cls = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((cls, patches), dim=1) + self.position_embedding.weight  # (B, T, d)


class Attention(nn.Module):
    """Every token attends to every token; all four projections have biases."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        d, self.num_heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.out_proj = nn.Linear(d, d)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, T, d) -> (B, h, T, c)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, T, d)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionTower(nn.Module):
    """(B, channels, S, S) normalised pixels -> (B, N, d) features, of L layers (B, N, L * d); N = P, "full" T."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.taken, self.first = config.feature_layers, 0 if config.vision_feature_select_strategy == "full" else 1
        self.embeddings = Embeddings(config.vision_config)
        self.pre_layrnorm = nn.LayerNorm(config.vision_config.hidden_size, eps=config.vision_config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config.vision_config) for _ in range(config.vision_layers_used))

    def hidden_states(self, pixel_values: Tensor) -> Iterator[Tensor]:
        """(B, T, d) as they enter layer 1, then as they leave layer 1, 2, ...; pixels of any dtype, from any device."""
        yield (x := self.pre_layrnorm(self.embeddings(pixel_values.to(self.pre_layrnorm.weight))))
        for layer in self.layers:
            yield (x := layer(x))

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = {i: x for i, x in enumerate(self.hidden_states(pixel_values)) if i in self.taken}
        return torch.cat([states[i][:, self.first :] for i in self.taken], dim=-1)
