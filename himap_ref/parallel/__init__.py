"""A decoder larger than one device: put into a model from outside, so that the reading path knows nothing of it.

`Llava.from_pretrained(..., mesh=...)` calls `split` and reads with `own_part`.
"""

from .split import own_part, split

__all__ = ["own_part", "split"]
