"""What the core refuses in one clear line, and does not take at its word or end in torch's."""

import pytest
import torch

from himap_ref import HimapError, Stage, image_to_image, text_to_image
from himap_ref.cache import PADDING
from himap_ref.generation import generate
from himap_ref.sampling import Sampling

SPAN, D = (4, 16), 32
NAN, INF = float("nan"), float("inf")


def at(*layers):
    return [Stage(layer, 0.5, text_to_image) for layer in layers]


def behind(decoder, x, cached, last=22, start=None, **options):
    """Tokens cached..last-1 behind a cache of those before; start: the position that the first is given, if any."""
    positions = None if start is None else torch.arange(start, start + last - cached).expand(len(x), -1)
    return decoder(x[:, cached:last], positions=positions, cache=decoder(x[:, :cached]).cache, **options)


def placed(*positions):
    """Prompts of so many tokens at these positions."""
    return lambda d, x: d(x[:, : len(positions[0])], positions=torch.tensor(positions))


def ending_in_its_picture(decoder, x):
    """The first of two prompts, of 16 tokens: ranked by the padding behind it."""
    positions = torch.arange(22).repeat(2, 1)
    positions[0, 16:] = PADDING
    decoder(x, SPAN, at(2), positions=positions)


REFUSED = {  # what is wrong: (a call with a decoder of 5 layers and embeddings (2, 22), what is said)
    # stages
    "a name, to be read letter by letter": (lambda d, x: d(x, SPAN, "hymap"), "'hymap' is unknown: expected himap"),
    "stages in another order": (lambda d, x: d(x, SPAN, at(3, 1)), "ascend"),
    "two stages at one layer": (lambda d, x: d(x, SPAN, at(2, 2)), "ascend"),
    "a stage behind the last layer": (lambda d, x: d(x, SPAN, at(2, 5)), "does not exist"),
    "more to keep than there are left": (
        lambda d, x: d(x, SPAN, (Stage(1, 5, text_to_image), Stage(3, 6, image_to_image))),
        "layer 3 is to keep 6 image tokens, only 5 enter",
    ),
    # the image span
    "stages without a picture": (lambda d, x: d(x, None, at(1, 3)), "no image"),
    "no text behind the picture": (lambda d, x: d(x, (4, 22), at(1, 3)), "no text"),
    "no text in one of the prompts": (ending_in_its_picture, "no text"),
    **{f"span {span}": (lambda d, x, span=span: d(x, span, at(1, 3)), "does not lie within")
       for span in ((4, 23), (9, 4), (9, 9), (-1, 4))},
    "a picture begun in the cache": (lambda d, x: behind(d, x, 5, start=5, image_span=SPAN), "does not lie within"),
    # positions
    "no position behind a cache": (lambda d, x: behind(d, x, 6), "each with its position behind a cache"),
    "nor for one token": (lambda d, x: behind(d, x, 6, 7), "each with its position behind a cache"),
    "padding in front, seen by all": (placed([0, 1, 2, 3], [-1, 0, 1, 2]), "ascend"),
    "padding before a token": (placed([0, 1, 2, 3], [PADDING, 0, 1, 2]), "ascend"),
    "a position twice": (placed([0, 1, 2, 3], [0, 1, 1, 2]), "ascend"),
    "tokens out of order": (placed([0, 1, 3, 2], [0, 1, 2, 3]), "ascend"),
    "positions of one prompt": (placed([0, 1, 2, 3]), "position"),
    "positions of too few tokens": (lambda d, x: d(x, positions=torch.tensor([[0, 1, 2]] * 2)), "position"),
    "a position beyond the context": (placed([0, 1, 2, 256], [0, 1, 2, 3]), "context 256"),
    # generation
    "a prompt too long": (lambda d, x: generate(d, torch.zeros(1, 257, D)), "257 tokens, the model's context 256"),
    **{f"a start at {start} behind 8 tokens": (
        lambda d, x, start=start: generate(d, x[:1, 8:], cache=d(x[:1, :8]).cache, start=start),
        "behind those in the cache",
    ) for start in (0, 7)},
    "one prompt of no tokens": (lambda d, x: generate(d, [x[0], x[1, :0]]), "nothing to go on from"),
    **{f"{B} prompts of {n} tokens": (lambda d, x, B=B, n=n: d(x[:B, :n]), "at least one")
       for B, n in ((0, 5), (2, 0), (0, 0))},
    **{f"generating from {B} prompts of {n} tokens": (lambda d, x, B=B, n=n: generate(d, x[:B, :n]), "nothing to go on")
       for B, n in ((0, 5), (2, 0), (0, 0))},
    **{f"{count!r} tokens": (lambda d, x, count=count: generate(d, x, max_new_tokens=count), f"max_new_tokens {count}")
       for count in (True, 2.0, "3", None, -1, 0)},
}  # fmt: skip


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED)
def test_refused(tiny_decoder, embeddings, call, message):
    """Something else pruned, ranked or counted, silently; torch's own error in the middle of a run."""
    with pytest.raises(HimapError, match=message):
        call(tiny_decoder(), embeddings(2, 22))


@pytest.mark.parametrize("layer, keep, score", [
    *((layer, 0.5, text_to_image) for layer in (0, -1, 2.0, True, "2")),
    (3, 0, image_to_image), (3, 4, None), (3, 0.0, None), (3, 0.5, None),
])  # fmt: skip
def test_stage(layer, keep, score):
    """Layer 0, before which nothing ranks; the picture dropped by a slip, or a ranking paid that decides nothing."""
    with pytest.raises(HimapError, match="^stage layer" if layer != 3 else "^stage (keep|score)"):
        Stage(layer, keep, score)
    assert Stage(3, 0, None).name == "none"


@pytest.mark.parametrize("keep", [0, -3, 0.0, 1.5, -0.5, NAN, True, "0.5", None])
def test_stage_keep(keep):
    """A count or share that cannot be meant; advice for keep 0 given for another number, or none."""
    hint = r" \(0 drops the whole picture: only with no score\)" if keep == 0 else ""
    with pytest.raises(HimapError, match=rf"^stage keep .*: expected a count .* in \(0, 1\]{hint}$"):
        Stage(2, keep, text_to_image)


@pytest.mark.parametrize("values", [
    (-1.0,), (NAN,), (INF,), (1.0, 0.0), (1.0, 1.1), (1.0, NAN), (1.0, 1.0, -1), (1.0, 1.0, 2**63),
], ids=str)  # fmt: skip
def test_sampling(values):
    """Numbers that make every probability NaN or zero; a seed that torch refuses in mid-run, or takes for another."""
    with pytest.raises(HimapError, match=("temperature", "top_p", "seed")[len(values) - 1]):
        Sampling(*values)
    assert Sampling(1.0, seed=2**63 - 1).seed == 2**63 - 1
