"""Tensor parallelism: each of N processes has 1/N of the decoder's heads, MLP channels and vocabulary on its device.

PyTorch's own (`torch.distributed.tensor.parallel`): a linear layer split by columns computes this process's heads or
channels, the one by rows after it adds up everybody's share, so between them all processes hold the same residual.
The layer loop runs in each of them as it stands, over fewer heads. The encoder is small and whole everywhere.

A ranking is over *all* heads: queries, keys and values of the ranked layer are gathered first. So every score function
sees what it sees on one device, and the first process's scores count, so that all keep the same tokens even by a score
that draws lots."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import broadcast
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..config import TextConfig
from ..decoder import DecoderOutput, LlamaDecoder
from ..errors import HimapError
from ..pruning import LayerView, Stage, Stages, stages_by_layer


def plan(config: TextConfig) -> dict[str, Any]:
    """Which layer is split how."""
    layer = {
        "self_attn.q_proj": ColwiseParallel(), "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel(),
        "mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel(),
    }  # fmt: skip
    head = {} if config.tie_word_embeddings else {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    embedding = {"embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    return embedding | {f"layers.*.{name}": style for name, style in layer.items()} | head


def split(decoder: LlamaDecoder, mesh: DeviceMesh) -> None:
    """Over a one-dimensional mesh, in place; raises HimapError if it does not divide. On the meta device it is free."""
    config, number = decoder.config, mesh.size()
    parts = {
        "key/value heads": config.num_key_value_heads, "MLP channels": config.intermediate_size,
        "tokens of vocabulary": config.vocab_size,
    }  # fmt: skip  # the query heads are a multiple of the key/value heads
    for what, count in parts.items():
        if count % number:
            most = math.gcd(*parts.values())
            fit = ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
            raise HimapError(f"{count} {what} do not divide among {number} processes: --nproc-per-node may be {fit}")
    parallelize_module(decoder, mesh, plan(config))
    decoder.embed_tokens.register_forward_hook(lambda *args: args[2].clone())  # waits: the last token's nobody reads
    decoder.__class__, decoder.mesh = SplitDecoder, mesh  # type: ignore[assignment]


def own_part(stored: Any, like: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What this process needs of a tensor in a file (safetensors' slice) as parameter `like`; only that is read."""
    if not isinstance(like, DTensor):
        return stored[:].to(device, dtype)
    mesh, placement, place = like.device_mesh, like.placements[0], [slice(None)] * like.ndim
    if isinstance(placement, Shard):
        size = like.shape[placement.dim] // mesh.size()
        place[placement.dim] = slice(mesh.get_local_rank() * size, (mesh.get_local_rank() + 1) * size)
    part = stored[tuple(place)].to(device, dtype, copy=True, memory_format=torch.contiguous_format)  # lets the file go
    return DTensor.from_local(part, mesh, like.placements)


@dataclass(frozen=True)
class SplitStage(Stage):
    """A stage that ranks by the heads of all processes."""

    mesh: DeviceMesh

    def evaluate(self, view: LayerView) -> Tensor:
        view.q, view.k, view.v = (gathered(t, 2, self.mesh) for t in (view.q, view.k, view.v))
        scores = super().evaluate(view).clone(memory_format=torch.contiguous_format)
        broadcast(scores, int(self.mesh.mesh[0]), self.mesh.get_group())
        return scores


def gathered(part: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """Every process's part, side by side."""
    whole: Any = DTensor.from_local(part.contiguous(), mesh, [Shard(dim)])
    return whole.full_tensor()


class SplitDecoder(LlamaDecoder):
    """What `split` makes of one."""

    mesh: DeviceMesh

    def logits(self, hidden: Tensor) -> Tensor:
        if not self.config.tie_word_embeddings:
            return super().logits(hidden)
        part: Any = super().logits(DTensor.from_local(hidden, self.mesh, [Replicate()]))  # of this process's tokens
        return part.full_tensor()

    def forward(
        self, inputs_embeds: Tensor, image_span: tuple[int, ...] | None = None, stages: Stages = (), *rest: Any,
        **more: Any,
    ) -> DecoderOutput:  # fmt: skip
        each = stages_by_layer(stages, len(self.layers)).values()
        split_stages = [SplitStage(stage.layer, stage.keep, stage.score, self.mesh) for stage in each]
        return super().forward(inputs_embeds, image_span, split_stages, *rest, **more)
