"""Tokens and their positions: who sees whom, and the keys and values that a layer has seen so far.

Every row bears its position in the whole prompt, and sees the keys at or before it: that one rule is the causal mask,
whatever was pruned, cached or padded. Shapes: B prompts, n rows, m keys, g key/value heads, c head size."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

PADDING = 2**30  # position of a row that only fills up a batch: beyond everything, so that no token ever sees it
ROOM = 128  # tokens a cache grows by: copying all for every token took 5 to 10 % of a step at 7B's shape


def causal_mask(positions: Tensor, key_positions: Tensor) -> Tensor:
    """(B, n), (B, m) -> (B, 1, n, m), True where the row sees the key."""
    return (positions[:, :, None] >= key_positions[:, None, :])[:, None]


def last_rows(positions: Tensor) -> Tensor:
    """(B, n) -> (B, 1): each prompt's last row before the padding."""
    return ((positions < PADDING).sum(dim=1, keepdim=True) - 1).clamp(min=0)


def take(t: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of t (B, n, ...): a slice, the same for all prompts, or (B, r) indices -> (B, r, ...)."""
    return t[:, rows] if isinstance(rows, slice) else t.take_along_dim(rows.view(*rows.shape, *[1] * (t.ndim - 2)), 1)


@dataclass(frozen=True)
class LayerCache:
    """All tokens that ever entered a layer: k and v (B, m, g, c), k rotated, and their positions (B, m). A value."""

    k: Tensor
    v: Tensor
    positions: Tensor
    buffers: tuple[Tensor, ...] = ()  # k and v are the beginnings of these, which have room for later tokens
    used: list[int] = field(default_factory=lambda: [0])  # tokens in the buffers, whoever added the last ones

    def then(self, k: Tensor, v: Tensor, positions: Tensor) -> "LayerCache":
        """With further tokens. This one stays as it is, for others to go on from, too; with B = 1, for any B."""
        m, stop, buffers, used = self.k.shape[1], self.k.shape[1] + k.shape[1], self.buffers, self.used
        if used[0] == m and stop <= buffers[0].shape[1] and len(buffers[0]) == len(k) and not torch.is_grad_enabled():
            buffers[0][:, m:stop], buffers[1][:, m:stop] = k, v  # nobody else has gone on from here
        else:
            used, room = [0], k.new_empty(len(k), ROOM, *k.shape[2:])
            pieces = ((old.expand(len(k), -1, -1, -1), new, room) for old, new in ((self.k, k), (self.v, v)))
            # Memory in SDPA's own order (B, g, m, c), in which a single row attends faster.
            buffers = tuple(torch.cat([t.transpose(1, 2) for t in three], dim=2).transpose(1, 2) for three in pieces)
        used[0] = stop
        positions = torch.cat((self.positions.expand(len(k), -1), positions), dim=1)
        return LayerCache(buffers[0][:, :stop], buffers[1][:, :stop], positions, buffers, used)

    def item(self, b: int) -> "LayerCache":
        """Prompt `b`'s alone, without padding."""
        real = self.positions[b] < PADDING
        return LayerCache(self.k[b : b + 1, real], self.v[b : b + 1, real], self.positions[b : b + 1, real])
