"""LLaVA-NeXT against transformers: tiny random ones of its own making, and pictures of many shapes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from toys import IMAGE_TOKEN, noise

from himap_ref import Llava, LlavaConfig
from himap_ref.anyres import best_size, most_image_tokens, num_image_tokens
from himap_ref.checkpoint.config import PINPOINTS, read_config
from himap_ref.config import VICUNA_7B, VIT_L_14_336

from .tiny import PATCH, edit_config, make_processor, randomised, renamed

transformers = pytest.importorskip("transformers")
select_best_resolution = pytest.importorskip("transformers.image_processing_utils").select_best_resolution

SIDE = 28  # pixels, 4 x 4 patches: a twelfth of the real models'
SMALL = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]  # the real models' by a twelfth
QUESTION = "What is in the picture?"
SHAPES = {  # width, height
    "square": (60, 60), "wide": (200, 70), "tall": (61, 150), "tiny": (3, 2), "one pixel": (1, 1),
    "huge": (1501, 1103), "fits two tiles": (56, 28), "fits three tiles": (28, 84), "fits four tiles": (56, 56),
    "one row less": (84, 20), "no patch of the tiles left": (600, 30), "extreme and tall": (9, 160), "odd": (37, 41),
    "nearly twice as wide": (111, 55), "half a pixel": (333, 250),
    "no pixel of the tiles left": (200, 2), "nor of any": (1, 3000),
}  # fmt: skip
TEXTS = {
    "vicuna": (transformers.LlamaConfig, {"rms_norm_eps": 1e-5}),
    "mistral": (transformers.MistralConfig, {
        "num_key_value_heads": 2, "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }),
}  # fmt: skip


def as_on_the_hub(data: dict) -> None:
    """llava-hf's config.json: by transformers 4.39, which left out what the classes have."""
    text, vision = data["text_config"], data["vision_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    defaults = transformers.LlamaConfig if text["model_type"] == "llama" else transformers.MistralConfig
    for part, like in ((text, defaults().to_dict()), (vision, transformers.CLIPVisionConfig().to_dict())):
        for name in [name for name in part if name in like and like[name] == part[name] and name != "model_type"]:
            del part[name]
    data |= {"use_image_newline_parameter": True, "ignore_index": -100, "projector_hidden_act": "gelu"}


def build(folder: Path, text: str, layout: str = "as saved", pinpoints: list | None = SMALL):
    """(transformers' model, its processor, ours from the folder that they wrote)."""
    tokenizer = make_processor().tokenizer
    points = {} if pinpoints is None else {"image_grid_pinpoints": pinpoints}
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **points
    )
    processor = transformers.LlavaNextProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    shape = {
        "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": len(tokenizer) + 5, "max_position_embeddings": 512,
    }  # fmt: skip
    kind, more = TEXTS[text]
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    config = transformers.LlavaNextConfig(
        text_config=kind(**shape, **more), vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), **points,
    )  # fmt: skip
    model = randomised(transformers.LlavaNextForConditionalGeneration, config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if layout != "as saved":
        (folder / "model.safetensors").unlink()
        prefix = "" if layout == "hub" else "model."
        tensors = renamed(model, layout) | {f"{prefix}image_newline": model.model.image_newline.data}
        save_file(tensors, folder / "model.safetensors")
    if layout == "hub":
        edit_config(folder, as_on_the_hub)
    ours = Llava.from_pretrained(folder)
    ours.eos_token_ids = ()
    return model, processor, ours


@pytest.fixture(scope="module", params=[("vicuna", "hub"), ("mistral", "hub"), ("mistral", "as saved")], ids="-".join)
def pair(request, tmp_path_factory):
    return build(tmp_path_factory.mktemp("next"), *request.param)


def batch_of(pair, images, questions):
    _, processor, ours = pair
    texts = [ours.template.replace("{question}", question) for question in questions]
    return processor(images=images, text=texts, return_tensors="pt")


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_equals_transformers(pair, size):
    """Another best size, tiles in another order, padding that stays or a patch too much that goes, newlines elsewhere:
    all as transformers has them, up to the answer."""
    model, processor, ours = pair
    image = noise(*size)
    batch = batch_of(pair, image, [QUESTION])
    sizes, N = batch.image_sizes.tolist(), num_image_tokens(size[::-1], ours.config)
    assert ours.encode(QUESTION, N) == batch.input_ids[0].tolist()
    assert 16 <= N <= most_image_tokens(ours.config) == 16 + 64 + 8
    pixels = ours.preprocess(image)
    torch.testing.assert_close(pixels, batch.pixel_values[0], atol=1e-6, rtol=0)

    features = model.get_image_features(batch.pixel_values, batch.image_sizes).pooler_output
    torch.testing.assert_close(ours.embed_image(pixels, sizes)[0], features[0], atol=1e-4, rtol=0)
    expected = model(**batch).logits
    out = ours(batch.input_ids, pixels, all_rows=True, image_sizes=sizes)
    torch.testing.assert_close(ours.language_model.logits(out.hidden), expected, atol=1e-4, rtol=0)

    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch.input_ids.shape[1] :].tolist()
    answer = ours.generate(image, QUESTION, max_new_tokens=12)
    assert answer.token_ids == tokens and len(set(tokens)) >= 4
    assert answer.image_span[1] - answer.image_span[0] == N


def test_shapes_differ(pair):
    """Shapes that all get the same tiles would be one test run many times."""
    assert len({num_image_tokens(size[::-1], pair[2].config) for size in SHAPES.values()}) >= 8
    assert len({len(pair[2].preprocess(noise(*size))) for size in SHAPES.values()}) == 3


def test_real_sizes():
    """Rounding that differs at some size only: the real models' tiles and numbers, for sizes of pictures at random and
    around those where something changes."""
    pictures = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    processor = transformers.LlavaNextProcessor(
        pictures, make_processor().tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    draw, near = random.Random(0), [1, 2, 27, 167, 168, 169, 335, 336, 337, 671, 672, 673, 1007, 1008, 1009, 4000]
    sizes = [(height, width) for height in near for width in near]
    sizes += [(draw.randint(1, most), draw.randint(1, most)) for most in (40, 700, 1100, 5000) for _ in range(1000)]
    expected = processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
    config = LlavaConfig(VIT_L_14_336, VICUNA_7B, image_grid_pinpoints=PINPOINTS)
    assert [num_image_tokens(size, config) for size in sizes] == expected and len({*expected}) > 100
    best = [select_best_resolution(size, pictures.image_grid_pinpoints) for size in sizes]
    assert [best_size(size, PINPOINTS) for size in sizes] == best and len({*best}) == 5


@torch.inference_mode()
def test_batch(pair):
    """Pictures of a batch exchanged, or one's tiles taken for the other's."""
    model, _, ours = pair
    images = [noise(50, 41), noise(100, 82, seed=1)]  # the same tiles, and another number of pixels
    batch = batch_of(pair, images, [QUESTION] * 2)
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch.input_ids.shape[1] :].tolist()
    assert [answer.token_ids for answer in ours.generate(images, [QUESTION] * 2, max_new_tokens=12)] == tokens
    assert tokens[0] != tokens[1]
    both = ours(batch.input_ids, torch.cat([*map(ours.preprocess, images)]), image_sizes=batch.image_sizes.tolist())
    torch.testing.assert_close(both.logits, model(**batch).logits[:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["as saved", "nested"])
def test_layouts(tmp_path, layout):
    """`image_newline` sought under one name only, or dropped."""
    model, _, ours = build(tmp_path, "vicuna", layout)
    assert torch.equal(ours.image_newline, model.model.image_newline)


def test_default_pinpoints(tmp_path):
    """Other sizes than transformers' where a file has none: one that says null is read as LLaVA-1.5."""
    config = transformers.LlavaNextConfig()
    ours = read_config({"model_type": "llava_next", "image_grid_pinpoints": None})
    assert [list(size) for size in ours.image_grid_pinpoints] == config.image_grid_pinpoints
    assert transformers.LlavaNextImageProcessorPil().image_grid_pinpoints == config.image_grid_pinpoints


# ---------------------------------------------------------------- several pictures in one prompt


@torch.inference_mode()
def test_several_pictures(pair):
    """Pictures exchanged, the tokens of one cut where the other's end, a line break too many between them."""
    model, processor, ours = pair
    images = [noise(200, 70), noise(56, 56, seed=1), noise(20, 28, seed=2)]
    text = ours.template.replace("{question}", QUESTION).replace("<image>", "<image>\n<image>\n<image>")
    batch = processor(images=images, text=text, return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch.input_ids.shape[1] :].tolist()
    answer = ours.generate(images, QUESTION, max_new_tokens=12)
    assert answer.prompt_ids == batch.input_ids[0].tolist() and len(answer.image_span) == 6
    assert answer.token_ids == tokens and len(set(tokens)) >= 4
    pixels, sizes = torch.cat([*map(ours.preprocess, images)]), batch.image_sizes.tolist()
    expected = model(**batch).logits
    out = ours(batch.input_ids, pixels, all_rows=True, image_sizes=sizes)
    torch.testing.assert_close(ours.language_model.logits(out.hidden), expected, atol=1e-4, rtol=0)
    exchanged = ours.generate([images[1], images[0], images[2]], QUESTION)
    assert (exchanged.first_logits - answer.first_logits).abs().max() > 1e-3
