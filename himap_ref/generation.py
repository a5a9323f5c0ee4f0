"""Generation: prefill once, then token by token from the cache; or, with reprune, the whole prompt for every token.

Knows the decoder, and nothing of pictures or text. Prompts of a batch may differ in length: shorter ones end in
padding, which no token sees, and a prompt whose answer has ended goes on as padding."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .cache import PADDING, LayerCache
from .decoder import DecoderOutput, LlamaDecoder
from .errors import HimapError
from .flops import Trace
from .pruning import Stages
from .sampling import Sampling, choose


@dataclass
class Generated:
    """A batch of answers as ids, and all that is known of how they came about."""

    token_ids: list[list[int]]  # per prompt, an EOS that ended it included
    finish: list[str]  # per prompt: "eos", "length" (max_new_tokens) or "context" (no position left)
    first_logits: Tensor = field(repr=False)  # (B, vocab)
    traces: list[Trace] = field(repr=False)  # one for every token: the prefill's, then each step's
    cache: list[LayerCache] = field(repr=False)  # of all tokens but each answer's last: where a new turn goes on
    seconds: dict[str, float]  # prefill (first token), decode (all later ones)


def clock(device: torch.device) -> float:
    """Seconds, once all that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.no_grad()
def generate(
    decoder: LlamaDecoder, prompts: Tensor | Sequence[Tensor], image_span: tuple[int, ...] | None = None,
    stages: Stages = (), max_new_tokens: int = 128, eos_token_ids: Collection[int] = (),
    sampling: Sampling = Sampling(), reprune: bool = False, on_token: Callable[[int], None] | None = None,
    cache: Sequence[LayerCache] | None = None, start: int = 0,
) -> Generated:  # fmt: skip
    """(B, n, d), or B prompts of (n, d) each, of any lengths -> ids.

    Image tokens are ranked once, in the prefill, and the cache stays pruned. reprune=True computes the prompt and ranks
    anew for every token, generated tokens among the text rows: what the official code does. on_token is called with
    each id of prompt 0 as it is chosen. cache: of the `start` tokens before every prompt. image_span: positions, see
    `LlamaDecoder.forward`. Raises HimapError if a prompt does not fit the context.
    """
    prompts, eos = list(prompts), set(eos_token_ids)
    if not prompts or not all(map(len, prompts)):
        raise HimapError(f"{len(prompts)} prompts, or one of them without tokens: there is nothing to go on from")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise HimapError(f"max_new_tokens {max_new_tokens}: must be a whole number of at least 1")
    lengths, device = [start + len(prompt) for prompt in prompts], prompts[0].device
    context = decoder.config.max_position_embeddings
    limits = [min(max_new_tokens, context - n + 1) for n in lengths]  # the last token is never fed back: no position
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    done, traces, begun = [False] * len(prompts), [], clock(device)

    def run_prompts() -> DecoderOutput:
        each = [torch.arange(start, start + len(prompt), device=device) for prompt in prompts]
        positions = pad_sequence(each, batch_first=True, padding_value=PADDING)
        return decoder(pad_sequence(prompts, batch_first=True), image_span, stages, positions=positions, cache=cache)

    out = run_prompts()  # the prefill
    first_logits = out.logits
    while True:
        traces.append(out.trace)
        ids = choose(out.logits, sampling, generators)  # (B,)
        tokens = decoder.embed_tokens(ids)  # (B, d)
        for b, token_id in enumerate(ids.tolist()):
            if not done[b]:
                answers[b].append(token_id)
                done[b] = token_id in eos or len(answers[b]) == limits[b]
                if reprune and not done[b]:
                    prompts[b] = torch.cat((prompts[b], tokens[b : b + 1]))
                if b == 0 and on_token:
                    on_token(token_id)
        if len(traces) == 1:
            prefilled = clock(device)
        if all(done):
            break
        ended = torch.tensor(done, device=device)[:, None]  # they go on as padding
        positions = torch.tensor(lengths, device=device)[:, None].add(len(traces) - 1).masked_fill(ended, PADDING)
        tokens = tokens.masked_fill(ended, 0.0)[:, None]
        out = run_prompts() if reprune else decoder(tokens, positions=positions, cache=out.cache)
    seconds = {"prefill": prefilled - begun, "decode": clock(device) - prefilled}
    cut = ["length" if limit == max_new_tokens else "context" for limit in limits]
    finish = ["eos" if ids[-1] in eos else reason for ids, reason in zip(answers, cut, strict=True)]
    return Generated(answers, finish, first_logits, traces, out.cache, seconds)
