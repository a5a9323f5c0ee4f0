"""The assembled model: embeddings of picture and text put together, angles, activations, batches, devices."""

import math

import pytest
import torch
from torch.testing import assert_close

from himap_ref import HimapError, LayerView, LlamaDecoder, Stage, TextConfig
from himap_ref.cache import LayerCache
from himap_ref.decoder import rope
from himap_ref.generation import generate
from himap_ref.methods.scores import SCORES
from himap_ref.sampling import Sampling
from himap_ref.vision import ACTIVATIONS

IDS = [1, 5, *[96] * 16, 7, 8]  # 96 is the image token of tiny_llava


def test_image_token_beyond_the_vocabulary(tiny_llava):
    """The original LLaVA has 32000 words and image token 32000: looking its own vector up is out of range."""
    small, large = tiny_llava(text={"vocab_size": 96}), tiny_llava()
    large.language_model.embed_tokens.weight.data[:96] = small.language_model.embed_tokens.weight
    image = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    x, expected = small.embed(IDS, image), large.embed(IDS, image)
    assert_close(x, expected)
    assert_close(x[2:18], image)


def test_picture_and_ids_must_agree(tiny_llava):
    """Image tokens without a picture taken for words, or a picture that the prompt has no place for dropped."""
    image = torch.zeros(16, 32)
    with pytest.raises(HimapError, match="16 image tokens, the picture 0"):
        tiny_llava().embed(IDS, None)
    with pytest.raises(HimapError, match="0 image tokens, the picture 16"):
        tiny_llava().embed([1, 2], image)
    with pytest.raises(HimapError, match="same places"):
        tiny_llava()(torch.tensor([IDS, [*IDS[1:], 1]]), torch.zeros(2, 3, 20, 20))


@pytest.mark.parametrize("images, prompts", [([], []), ([None], ["a", "b"]), (["x.png", None], ["a", "b"])])
def test_batches_that_do_not_pair_up(tiny_llava, images, prompts):
    """Questions answered about another question's picture."""
    with pytest.raises(HimapError, match="as many pictures"):
        tiny_llava().generate(images, prompts)


def test_every_weight_is_trained(tiny_decoder):
    """Embeddings frozen, as `from_pretrained` has them unless it is told otherwise."""
    assert all(p.requires_grad for p in LlamaDecoder(tiny_decoder().config).parameters())


def test_forward_of_the_whole_model(tiny_llava, embeddings):
    """all_rows forgotten on its way; a prompt with no picture, or no word to look up; more prompts than pictures."""
    model, pixels, ids = tiny_llava(), embeddings(2, 60, 20).view(2, 3, 20, 20), torch.tensor([IDS] * 2)
    last, every = model(ids, pixels), model(ids, pixels, all_rows=True)
    assert last.hidden.shape == (2, 1, 32) and every.hidden.shape == (2, 20, 32)
    assert_close(last.hidden, every.hidden[:, -1:])
    words = torch.tensor([[1, 5, 7], [1, 8, 2]])
    assert_close(model(words).logits, model.language_model(model.language_model.embed_tokens(words)).logits)
    assert model(torch.full((1, 16), 96), pixels[:1]).logits.shape == (1, 97)
    with pytest.raises(ValueError):
        model(ids, pixels[:1])


@pytest.mark.parametrize("reprune", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
def test_tensors_are_made_on_the_models_device(tiny_decoder, embeddings, sampling, reprune):
    """A model that is not on torch's default device: torch's own error in the middle of its work."""
    stages = [Stage(layer, 16 - layer, score) for layer, score in enumerate(SCORES.values(), start=1)]
    decoder, prompts = tiny_decoder(num_hidden_layers=9), [embeddings(1, n)[0] for n in (22, 25)]

    def work():
        answer = generate(decoder, prompts, (4, 20), stages, 4, sampling=sampling, reprune=reprune)
        return answer.token_ids, answer.first_logits, decoder(prompts[0][None], (4, 20), stages).logits

    want = work()
    with torch.device("meta"):
        got = work()
    assert got[0] == want[0] and torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])


def test_inputs_move_to_the_models_device(tiny_llava):
    """Pixels, ids or random scores left where they were made."""
    model = tiny_llava().to("meta")
    assert model.embed([1, 5, 7], None).device.type == "meta"
    devices = []
    model.vision_tower.embeddings.register_forward_pre_hook(lambda module, args: devices.append(args[0].device.type))
    assert model.embed_image(torch.zeros(1, 3, 20, 20)).device.type == devices[0] == "meta"
    q, positions = torch.zeros(2, 9, 1, 8, device="meta"), torch.zeros(2, 9, dtype=torch.long, device="meta")
    view = LayerView(q, LayerCache(q, q, positions), q[:, :, 0], positions, slice(2, 7))
    assert SCORES["random"](view).device.type == "meta"


def test_activations():
    """Another GELU than CLIP's in the encoder, or than the exact one in the projector: close enough to answer with."""
    x = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    quick = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]
    exact = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]
    assert_close(ACTIVATIONS["quick_gelu"](x), torch.tensor(quick, dtype=torch.float64))
    assert_close(ACTIVATIONS["gelu"](x), torch.tensor(exact, dtype=torch.float64))


def turned(position, channel, config):
    """The angle of a channel at a position, by the words of the published rules, a number at a time."""
    angle = position * config.rope_theta ** (-2 * channel / config.head_dim)
    if config.rope_type == "default":
        return angle
    if config.rope_type == "linear":
        return angle / config.factor
    wavelength = 2 * math.pi * config.rope_theta ** (2 * channel / config.head_dim)  # LLaMA-3.1's
    turns = config.original_max_position_embeddings / wavelength
    if turns >= config.high_freq_factor:
        return angle
    if turns <= config.low_freq_factor:
        return angle / config.factor
    smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    return (1 - smooth) * angle / config.factor + smooth * angle


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_angles(kind, dtype):
    """Channels that turn the wrong way for a longer context, or no mixture; rounded in bf16: other tokens are kept."""
    changes = {"rope_type": kind, "factor": 8.0, "original_max_position_embeddings": 200}
    config = TextConfig(hidden_size=64, num_attention_heads=1, **changes)
    places = (0, 1, 7, 300, 601, 1025, 2049, 4095)
    angles = torch.tensor([[turned(place, channel, config) for channel in range(32)] * 2 for place in places])
    near = {"rtol": 0, "atol": 2 * torch.finfo(dtype).eps + 3e-4}
    for got, want in zip(rope(torch.tensor([places]), config, dtype), (angles.cos(), angles.sin()), strict=True):
        assert got.dtype == dtype
        assert_close(got[0, :, 0], want.to(dtype), **near)
