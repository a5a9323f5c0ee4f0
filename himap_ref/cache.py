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
    """All tokens that ever entered a layer: k and v (B, m, g, c), k rotated, and their positions (B, m)."""

    k: Tensor
    v: Tensor
    positions: Tensor
    room: list | None = field(default=None, init=False)  # buffers that k and v begin, and how far they are filled

    def then(self, k: Tensor, v: Tensor, positions: Tensor) -> "LayerCache":
        """With further tokens. This one stays as it is, for others to go on from, too; with B = 1, for any B."""
        (B, n, g, c), m, room = k.shape, self.k.shape[1], self.room
        if not (room and room[2] == m and room[0][:, m : m + n].shape == k.shape and not torch.is_grad_enabled()):
            # No room, or others have gone on from here. Memory in SDPA's order, in which a single row attends faster.
            room = [k.new_empty(B, g, m + n + ROOM, c).transpose(1, 2) for _ in range(2)] + [m]
            room[0][:, :m], room[1][:, :m] = self.k, self.v
        room[0][:, m : m + n], room[1][:, m : m + n], room[2] = k, v, m + n
        positions = torch.cat((self.positions.expand(B, -1), positions), dim=1)
        longer = LayerCache(room[0][:, : m + n], room[1][:, : m + n], positions)
        longer.__dict__["room"] = room
        return longer

    def item(self, b: int) -> "LayerCache":
        """Prompt `b`'s alone, without padding."""
        real = self.positions[b] < PADDING
        return LayerCache(self.k[b : b + 1, real], self.v[b : b + 1, real], self.positions[b : b + 1, real])
