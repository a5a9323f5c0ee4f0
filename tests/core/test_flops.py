"""The count of FLOPs against torch's own counter, and against the numbers in print."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from himap_ref import HIMAP, HIMAP_CAPTION, HimapError, Stage, image_to_image, text_to_image
from himap_ref.assistant.answer import count_flops, kv_cache_bytes, vanilla_passes
from himap_ref.config import LLAVA_1_5_7B, LLAVA_1_5_13B
from himap_ref.flops import LayerTrace, layer_flops, pass_flops, projector_flops, vision_flops
from himap_ref.generation import generate
from himap_ref.methods.plan import plan_prefill, tokens_per_layer
from himap_ref.methods.schedules import FASTV
from himap_ref.methods.scores import all_to_image, last_to_image, random
from himap_ref.studies.accuracy.literature import definitions, lm_head_flops, paper_flops, three_matrix_layer

CONFIG_7B, CONFIG_13B = LLAVA_1_5_7B.text_config, LLAVA_1_5_13B.text_config


def counted(function, *args):
    """Its FLOPs by torch's counter (which sees attention only as plain matrix products), and its result."""
    forgotten = {torch.ops.aten.mv: lambda matrix, vector, **_: 2 * matrix[0] * matrix[1]}
    with FlopCounterMode(display=False, custom_mapping=forgotten) as counter, sdpa_kernel(SDPBackend.MATH):
        result = function(*args)
    return counter.get_total_flops(), result


def both_ways(view):
    """A score of a user's own that looks at the attention twice."""
    return text_to_image(view) - view.attention(view.last)[:, 0]


TWO = Stage(1, 0.5, text_to_image), Stage(3, 0.25, image_to_image)
CASES = {
    "plain, no stage": ({}, ()),
    "two stages": ({}, TWO),
    "grouped-query": ({"text": {"num_key_value_heads": 2}}, TWO),
    "one kv head": ({"text": {"num_key_value_heads": 1}}, (Stage(2, 5, last_to_image),)),
    "tied embeddings": ({"text": {"tie_word_embeddings": True}}, TWO),
    "linear projector": ({"projector_type": "linear"}, (Stage(4, 3, all_to_image),)),
    "full strategy": ({"vision_feature_select_strategy": "full"}, (*TWO, Stage(4, 1, last_to_image))),
    "last vision layer": ({"vision_feature_layer": -1}, (Stage(1, 9, random), Stage(2, 4, all_to_image))),
    "first vision layer": ({"vision_feature_layer": 1, "vision": {"patch_size": 4}}, (Stage(2, 0.5, both_ways),)),
    "several vision layers": ({"vision_feature_layer": (-3, 2, 0)}, TWO),
    "several, class token, linear": ({
        "vision_feature_layer": (-1, 1), "vision_feature_select_strategy": "full", "projector_type": "linear",
    }, TWO),
    "longer contexts": ({"text": {"rope_type": "llama3", "factor": 8.0}}, TWO),
    "no vision layer": ({"vision_feature_layer": 0}, (Stage(1, 1, image_to_image), Stage(4, 1, text_to_image))),
    "wide heads": ({"text": {"head_dim": 12, "num_hidden_layers": 3}}, (Stage(2, 16, image_to_image),)),
    "the whole picture": ({}, (Stage(2, 9, text_to_image), Stage(3, 0, None))),
    "one layer": ({"text": {"num_hidden_layers": 1}}, ()),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equal_to_torchs_counter(tiny_llava, embeddings, case):
    """Any matrix product forgotten, counted twice, or with another number of rows."""
    changes, stages = CASES[case]
    model = tiny_llava(**changes)
    config, decoder = model.config, model.language_model
    flops, features = counted(model.vision_tower, embeddings(3, 20, 20)[None])
    assert flops == vision_flops(config)
    flops, image = counted(model.multi_modal_projector, features)
    assert flops == projector_flops(config)
    x = torch.cat((embeddings(1, 3), image, embeddings(1, 6)), dim=1)
    span, n = (3, 3 + config.num_image_tokens), x.shape[1]
    flops, out = counted(decoder, x, span, stages)
    plan = plan_prefill(config.text_config, span, n, stages)
    assert plan == out.trace.layers and flops == pass_flops(config.text_config, plan)
    for step in (n, n + 1):
        next_token = partial(decoder, positions=torch.tensor([[step]]), cache=out.cache)
        flops, out = counted(next_token, embeddings(1, 1, seed=step))
        assert out.trace.layers == [LayerTrace(1, 0, 1, layer.keys + step - n + 1) for layer in plan]
        assert flops == pass_flops(config.text_config, out.trace.layers)


@pytest.mark.parametrize("reprune", [False, True])
def test_whole_answer(tiny_llava, embeddings, reprune):
    """Steps left out of an answer's sum, or compared with an unpruned run of another length."""
    model, span = tiny_llava(), (3, 19)
    config, text, x = model.config, model.config.text_config, embeddings(1, 25)
    flops, out = counted(lambda: generate(model.language_model, x, span, TWO, 4, reprune=reprune))
    vanilla, _ = counted(lambda: generate(model.language_model, x, span, (), 4))
    image = vision_flops(config), projector_flops(config)
    answer = count_flops(config, out.traces, 25, 0, image, image)
    assert len(answer.decode) == 3
    assert answer.total == flops + vision_flops(config) + projector_flops(config) == answer.macs * 2
    assert answer.vanilla.total == vanilla + vision_flops(config) + projector_flops(config)
    assert answer.decoder_ratio == flops / vanilla and answer.ratio == answer.total / answer.vanilla.total
    assert [pass_flops(text, layers) for layers in vanilla_passes(text, 25, 0, 4)] == [
        answer.vanilla.prefill, *answer.vanilla.decode
    ]  # fmt: skip
    blind = count_flops(config, generate(model.language_model, x, max_new_tokens=2).traces, 25, 0, (0, 0), (0, 0))
    assert blind.total == blind.vanilla.total and blind.prefill == pass_flops(text, plan_prefill(text, (25, 25), 25))


def test_parts_of_a_layer():
    """Parts that add up though two of them are swapped."""
    d, m, n = 4096, 11008, 622
    layer = plan_prefill(CONFIG_7B, (36, 612), n, HIMAP)[1]
    left = n - 288
    assert layer_flops(CONFIG_7B, layer) == {
        "q_proj": 2 * n * d * d, "k_proj": 2 * n * d * d, "v_proj": 2 * n * d * d, "ranking": 2 * 10 * n * d,
        "scores": 2 * left * n * d, "weighted_sum": 2 * left * n * d, "o_proj": 2 * left * d * d,
        "mlp": 6 * left * d * m,
    }  # fmt: skip
    assert pass_flops(CONFIG_7B, []) == lm_head_flops(CONFIG_7B, 1) == 2 * 4096 * 32064


def test_scores_that_need_data():
    """A plan made up for a score whose cost cannot be known without running it."""

    def depends(view):
        if view.attention(view.last).max() > 0.5:
            return view.attention(view.all).sum(1)
        return view.attention(view.last).sum(1)

    with pytest.raises(HimapError, match="needs data"):
        plan_prefill(CONFIG_7B, (36, 612), 622, (Stage(2, 0.5, depends),))


@pytest.mark.parametrize("stages", [(), TWO])
def test_kv_cache_bytes(tiny_decoder, embeddings, stages):
    """A cache taken for smaller than it is: the layer that ranks still holds what it drops."""
    decoder = tiny_decoder(num_key_value_heads=2)

    prefill = decoder(embeddings(1, 25), (3, 19), stages)
    for out in (prefill, decoder(embeddings(1, 1), positions=torch.tensor([[25]]), cache=prefill.cache)):
        held = sum(t.nbytes for layer in out.cache for t in (layer.k, layer.v))
        assert kv_cache_bytes(decoder.config, out.trace.layers, 4) == held
        assert kv_cache_bytes(decoder.config, out.trace.layers) * 2 == held


# ---------------------------------------------------------------- numbers in print (LLaVA-1.5)


@pytest.mark.parametrize(
    "tokens, two, three", [(576, 2.986, 3.817), (192, 0.976, 1.253), (128, 0.649, 0.833), (64, 0.323, 0.416)]
)
def test_table_of_the_literature(tokens, two, three):
    """One definition under the name of the other, or not the one that papers print (T, 7B, image tokens only)."""
    assert paper_flops(CONFIG_7B, [tokens] * 32) / 1e12 == pytest.approx(two, abs=5e-4)
    assert paper_flops(CONFIG_7B, [tokens] * 32, three_matrix_layer) / 1e12 == pytest.approx(three, abs=5e-4)


def test_whole_prompts_of_the_literature():
    """The definitions that count text too: 3.23 T for 36 + 576 + 10 tokens, and VTW's 8.48 T for a usual prompt."""
    assert paper_flops(CONFIG_7B, [622] * 32) / 1e12 == pytest.approx(3.23, abs=5e-3)
    fits = []
    for others in range(200):
        every_row = 2 * paper_flops(CONFIG_7B, [576 + others] * 32, three_matrix_layer)
        if abs(every_row + lm_head_flops(CONFIG_7B, 576 + others) - 8.48e12) < 0.01e12:
            fits.append(others)
    assert fits and all(35 <= others <= 60 for others in fits)
    named = definitions(CONFIG_7B, (), 36, 576, fits[0] - 36)
    (vtw,) = (value for name, value in named.items() if "VTW" in name)
    assert vtw == pytest.approx(8.48e12, abs=0.01e12)


@pytest.mark.parametrize("config, text, ratio", [
    (CONFIG_7B, 0, 0.246), (CONFIG_13B, 0, 0.222), (CONFIG_7B, 40, 0.294), (CONFIG_7B, 64, 0.319),
    (CONFIG_7B, 100, 0.355), (CONFIG_7B, 150, 0.398),
])  # fmt: skip
def test_himaps_ratio(config, text, ratio):
    """Stages that take effect a layer early or late: the paper's ratio (its eq. 10) would change; text as prunable."""
    tokens = tokens_per_layer(HIMAP, 576, config.num_hidden_layers)
    assert tokens[:9] == [576] * 2 + [288] * 6 + [72] and tokens[-1] == 72
    vanilla = paper_flops(config, [text + 576] * config.num_hidden_layers)
    got = paper_flops(config, [text + n for n in tokens]) / vanilla
    assert got == pytest.approx(ratio, abs=5e-4)
    (named,) = (v for k, v in definitions(config, HIMAP, 36, 576, 10).items() if "the paper's" in k)
    assert (named == got) is (text == 0)


@pytest.mark.parametrize("stages, mean", [(HIMAP, 144.0), (HIMAP_CAPTION, 191.25), (FASTV, 306.0), ((), 576.0)])
def test_mean_image_tokens(stages, mean):
    """The literature's budget ("192 tokens") computed in another way."""
    tokens = tokens_per_layer(stages, 576, 32)
    assert sum(tokens) / 32 == mean == definitions(CONFIG_7B, stages, 36, 576, 10)["mean image tokens per layer"]


def test_vision_and_projector():
    """All 24 layers counted, though the features are those of layer 23; MACs taken for FLOPs."""
    assert vision_flops(LLAVA_1_5_7B) / 1e12 == pytest.approx(0.37, abs=5e-3)
    assert projector_flops(LLAVA_1_5_7B) / 1e12 == pytest.approx(0.024, abs=5e-4)


def test_executed_is_below_the_papers_order():
    """The saving of the layer that ranks (its losers skip the MLP) lost, or taken for more than it is."""
    span, n, one = (36, 612), 622, 6 * 4096 * 11008 + 2 * 4096**2
    for stages in (HIMAP, HIMAP_CAPTION):
        whole = [46 + tokens for tokens in tokens_per_layer(stages, 576, 32)]
        plan = plan_prefill(CONFIG_7B, span, n, stages)
        assert [layer.keys for layer in plan] == whole
        assert [layer.rows for layer in plan] == [*whole[1:], 1]
        full = [LayerTrace(n, layer.ranking, n, n) for layer, n in zip(plan, whole, strict=True)]
        skipped = sum(a.rows - b.rows for a, b in zip(full, plan, strict=True))
        saved = pass_flops(CONFIG_7B, full) - pass_flops(CONFIG_7B, plan)
        pairs = sum((a.rows - b.rows) * a.keys for a, b in zip(full, plan, strict=True))
        assert saved == skipped * one + pairs * 4 * 4096


def test_executed_share_of_the_papers_order():
    """What the early drop and the prefix are said to save at 35 + 576 + 60 tokens."""
    n, span = 671, (35, 611)
    paper = sum(pass_flops(CONFIG_7B, [LayerTrace(95 + N, 0, 95 + N, 95 + N)]) - pass_flops(CONFIG_7B, [])
                for N in tokens_per_layer(HIMAP, 576, 32)) + pass_flops(CONFIG_7B, [])  # fmt: skip
    assert pass_flops(CONFIG_7B, plan_prefill(CONFIG_7B, span, n, HIMAP)) / paper <= 0.935
    assert pass_flops(CONFIG_7B, plan_prefill(CONFIG_7B, span, n, HIMAP, cached=35)) / paper <= 0.80
