"""What asking gives: an answer, its FLOPs beside those of no pruning, and where a next turn goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..cache import LayerCache
from ..config import LlavaConfig, TextConfig
from ..flops import LayerTrace, Trace, pass_flops


@dataclass(frozen=True)
class Flops:
    """Of one answer. decode: per step after the first token."""

    vision: int
    projector: int
    prefill: int
    decode: tuple[int, ...]
    vanilla: Flops | None = None  # same prompt and number of steps, cached, nothing pruned; None: it is that itself

    @property
    def decoder(self) -> int:
        return self.prefill + sum(self.decode)

    @property
    def total(self) -> int:
        return self.vision + self.projector + self.decoder

    @property
    def macs(self) -> int:
        """Multiply-accumulates: half of `total`."""
        return self.total // 2

    @property
    def ratio(self) -> float:
        return self.total / (self.vanilla or self).total

    @property
    def decoder_ratio(self) -> float:
        """Prefill and decode only: the part that pruning in the decoder can touch."""
        return self.decoder / (self.vanilla or self).decoder


def vanilla_passes(config: TextConfig, n: int, cached: int, tokens: int) -> list[list[LayerTrace]]:
    """What generating `tokens` tokens takes without stages: a prefill of n behind `cached` ones, then one by one."""
    sizes = [(n, cached + n), *((1, cached + n + step) for step in range(1, tokens))]
    inner = config.num_hidden_layers - 1
    return [[LayerTrace(rows, 0, rows, keys)] * inner + [LayerTrace(rows, 0, 1, keys)] for rows, keys in sizes]


def count_flops(
    config: LlavaConfig, traces: Sequence[Trace], n: int, cached: int, image: tuple[int, int], own: tuple[int, int]
) -> Flops:
    """Of an answer's traces, one per token, beside an unpruned run, which computes n tokens behind `cached` ones.

    image, own: (encoder, projector) FLOPs of the picture as executed, and as the model itself makes its image tokens.
    """
    text = config.text_config
    first, *later = (pass_flops(text, trace.layers) for trace in traces)
    plain, *steps = (pass_flops(text, layers) for layers in vanilla_passes(text, n, cached, len(traces)))
    return Flops(*image, first, tuple(later), Flops(*own, plain, tuple(steps)))


def kv_cache_bytes(config: TextConfig, layers: Sequence[LayerTrace], bytes_per_number: int = 2) -> int:
    """Keys and values cached after the pass that `layers` describes; bf16 by default."""
    return 2 * config.num_key_value_heads * config.head_dim * bytes_per_number * sum(layer.keys for layer in layers)


@dataclass(frozen=True)
class Past:
    """Tokens computed already, for later prompts to go on from: a prefix, or a conversation so far.

    It knows its ids, and by whose weights it was computed, so that it cannot be used where it does not belong.
    """

    ids: list[int] = field(repr=False)  # image tokens expanded; a conversation ends in its last answer
    cache: list[LayerCache] = field(repr=False)  # of all ids, but of that answer's last one
    weights: list = field(repr=False)  # `Llava.fingerprint` at the time
    length: int  # tokens computed
    image_span: tuple[int, ...] | None = None  # in ids, see `LlamaDecoder.forward`
    pruned_before: int = 0  # image tokens that a reducer left out, and an unpruned run has

    @property
    def is_conversation(self) -> bool:
        return self.length < len(self.ids)


@dataclass(repr=False)
class Answer:
    """What `Llava.generate` returns for one prompt. `past` keeps the batch's keys and values alive."""

    text: str
    token_ids: list[int]  # generated, an EOS included
    prompt_ids: list[int]  # image tokens expanded; in a later turn, all that was said before included
    image_span: tuple[int, ...] | None  # in prompt_ids: (start, stop), (start, stop, start, stop, ...) if several
    finish: str  # "eos", "length" (max_new_tokens) or "context" (no position left)
    first_logits: Tensor  # (vocab,)
    traces: list[Trace]  # one for each token, the prefill's first
    flops: Flops  # what this prompt would cost alone
    batch_flops: int  # the decoder's for its whole batch, as executed: with padding, and to the longest answer's end
    seconds: dict[str, float]  # vision (reading the picture, too), prefill, decode; of the whole batch
    make_past: Callable[[], Past]

    @property
    def trace(self) -> Trace:
        """Of the prefill."""
        return self.traces[0]

    @property
    def past(self) -> Past:
        """Where a next turn goes on: `generate(None, question, past=answer.past)`."""
        return self.make_past()

    def __repr__(self) -> str:
        kept = [len(stage.kept) for stage in self.trace.stages]
        return f"Answer({self.text!r}, {len(self.token_ids)} tokens, kept {kept}, {self.flops.ratio:.1%} of the FLOPs)"
