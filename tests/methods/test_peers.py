"""DivPrune, VisionZip, DART and the smaller picture: each against its published rule, written out slowly."""

import pytest
import torch
from torch.testing import assert_close

from himap_ref.cache import LayerCache
from himap_ref.methods.peers import DivPrune, Downsample, VisionZip
from himap_ref.methods.reducers import last_layer
from himap_ref.methods.schedules import parse_method
from himap_ref.methods.scores import dart
from himap_ref.pruning import LayerView


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_divprune(tiny_llava, pixels):
    """Another first token, likeness in place of distance, a token chosen twice, rows mixed up, tokens out of order."""
    model = tiny_llava()
    with torch.no_grad():
        got, tokens = DivPrune(5)(model, pixels), model.embed_image(pixels)
    for b, x in enumerate(tokens):
        N = len(x)
        alone = [min(1 - cosine(x[i], x[j]) for j in range(N) if j != i) for i in range(N)]
        chosen = [max(range(N), key=alone.__getitem__)]
        while len(chosen) < 5:
            left = [i for i in range(N) if i not in chosen]
            chosen.append(max(left, key=lambda i: min(1 - cosine(x[i], x[j]) for j in chosen)))
        assert_close(got[b], x[sorted(chosen)])


def test_visionzip(tiny_llava, pixels):
    """Merged tokens that lose their own value, are summed, or go by features or to the least like; no class token."""
    model = tiny_llava()
    with torch.no_grad():
        got, (features, attention, keys) = VisionZip(10)(model, pixels), last_layer(model, pixels)
        for b in range(2):
            order = sorted(range(16), key=lambda i: -attention[b, i])
            dominant, left = sorted(order[:7]), sorted(order[7:])  # of 10 two are merged, one is the class token
            targets = left[::4][:2]
            members = {target: [] for target in targets}
            for i in left:
                if i not in targets:
                    best = max(targets, key=lambda target: cosine(keys[b, i + 1], keys[b, target + 1]))
                    members[best].append(features[b, i + 1])
            rows = [features[b, 0], *(features[b, i + 1] for i in dominant)]
            for target, others in members.items():
                rows.append(features[b, target + 1] + (sum(others) / len(others) if others else 0))
            assert_close(got[b], model.multi_modal_projector(torch.stack(rows)))


def test_last_layer(tiny_llava, pixels):
    """Keys of another layer or of one head; features other than the encoder's own."""
    model = tiny_llava()
    seen = []
    hook = model.vision_tower.layers[-1].self_attn.k_proj.register_forward_hook(lambda m, x, out: seen.append(out))
    features, _, keys = last_layer(model, pixels)
    hook.remove()
    assert_close(features[:, 1:], model.vision_tower(pixels))
    assert_close(keys, seen[0].unflatten(-1, (model.vision_tower.layers[-1].self_attn.num_heads, -1)).mean(dim=2))


def test_dart(embeddings):
    """Pivots by queries, by L2 norm, of padding or of the system text; the most alike first; another's place."""
    hidden, positions = embeddings(2, 12, 8, seed=4), torch.arange(12).expand(2, -1).clone()
    k = embeddings(2, 12, 8, seed=5).unflatten(-1, (2, 4))
    k[1, 11] = 100  # padding, whose key is the largest
    positions[1, 11] = 2**30
    scores = dart(LayerView(k, LayerCache(k, k, positions), hidden, positions, slice(2, 9)), pivots=2)
    for b, last in ((0, 12), (1, 11)):
        size = [float(k[b, i].abs().sum()) for i in range(12)]
        image, words = (sorted(rows, key=lambda i: -size[i])[:2] for rows in (range(2, 9), range(9, last)))
        pivots = [*image, *words]
        places = {i: [] for i in range(2, 9)}
        for number, pivot in enumerate(pivots):
            unlike = sorted(range(2, 9), key=lambda i: cosine(hidden[b, i], hidden[b, pivot]))
            for place, i in enumerate(unlike):
                places[i].append((place, number))
        others = sorted((i for i in places if i not in image), key=lambda i: min(places[i]))
        ranked = scores[b].argsort(descending=True, stable=True) + 2
        assert {*ranked[:2].tolist()} == {*image} and ranked[2:].tolist() == others


def test_full_size(tiny_llava, pixels):
    """A picture that is not made smaller, yet gives other tokens; patches chosen where none is."""
    model = tiny_llava()
    with torch.no_grad():
        assert_close(Downsample(4)(model, pixels), model.embed_image(pixels))
    assert Downsample(2).chosen(model, pixels) is None


def test_smaller_picture(tiny_llava):
    """Position embeddings cut off, or interpolated otherwise than transformers does for pictures of another size."""
    transformers = pytest.importorskip("transformers")
    model = tiny_llava()
    v, tower = model.config.vision_config, model.vision_tower
    theirs = transformers.CLIPVisionConfig(hidden_size=v.hidden_size, image_size=v.image_size, patch_size=v.patch_size)
    embeddings = transformers.models.clip.modeling_clip.CLIPVisionEmbeddings(theirs)
    embeddings.load_state_dict(tower.embeddings.state_dict(), strict=False)
    big, small = (torch.full((1, 3, side, side), 0.3) for side in (20, 15))  # flat, so that only the positions tell
    with torch.no_grad():
        x = tower.pre_layrnorm(embeddings(small, interpolate_pos_encoding=True))
        for layer in tower.layers:
            x = layer(x)
        assert_close(Downsample(3)(model, big), model.multi_modal_projector(x[:, 1:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", ["cls:5", "divprune:5", "visionzip:10"])
def test_chosen(tiny_llava, pixels, text):
    """A picture of kept patches that shows others than those kept."""
    model, reducer = tiny_llava(), parse_method(text, tiny_llava()).reducer
    chosen = reducer.chosen(model, pixels[:1])
    assert chosen.scores[chosen.kept].min() >= chosen.scores.topk(len(chosen.kept)).values.min()
    with torch.no_grad():
        got, all_tokens = reducer(model, pixels[:1])[0], model.embed_image(pixels[:1])[0]
    start = 1 if text.startswith("visionzip") else 0  # behind the class token
    assert_close(got[start : start + len(chosen.kept)], all_tokens[chosen.kept])
