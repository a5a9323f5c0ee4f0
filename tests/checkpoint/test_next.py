"""LLaVA-NeXT's folders: what config.json of llava-hf's leaves out, and the way back through our own writer."""

import json

import torch
from safetensors.torch import load_file
from toys import noise, write_json, write_small_model

from himap_ref import HIMAP, Llava
from himap_ref.anyres import AnyresProcessor
from himap_ref.checkpoint.config import PINPOINTS, read_config
from himap_ref.image import ImageProcessor

HUB = {  # llava-hf's, of LLaVA-1.6 7B: what both decoders have in common
    "architectures": ["LlavaNextForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
    "image_grid_pinpoints": [*map(list, PINPOINTS)], "model_type": "llava_next", "projector_hidden_act": "gelu",
    "tie_word_embeddings": False, "use_image_newline_parameter": True, "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default", "vision_config": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
}  # fmt: skip
VICUNA = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}
MISTRAL = {
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32064,
}  # fmt: skip


def test_vicuna():
    """LLaVA-1.6 taken for LLaVA-1.5 with a decoder of another size."""
    config = read_config(HUB | {"text_config": VICUNA})
    assert config.image_grid_pinpoints == PINPOINTS and config.num_image_tokens == 576
    text = config.text_config
    assert (text.num_key_value_heads, text.intermediate_size, text.rope_theta) == (32, 11008, 1e4)
    assert (text.max_position_embeddings, text.rms_norm_eps, text.vocab_size) == (4096, 1e-5, 32064)


def test_mistral():
    """LLaMA's defaults for what a Mistral leaves out."""
    text = read_config(HUB | {"text_config": MISTRAL}).text_config
    assert (text.num_key_value_heads, text.intermediate_size, text.rope_theta) == (8, 14336, 1e6)
    assert (text.hidden_size, text.num_hidden_layers, text.head_dim) == (4096, 32, 128)
    shorter = {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6, "rms_norm_eps": 1e-5}
    text = read_config(HUB | {"text_config": shorter}).text_config
    assert (text.num_key_value_heads, text.intermediate_size, text.max_position_embeddings) == (8, 14336, 131072)


def test_pinpoints_of_llava_1_5():
    """The original's entry left over in a LLaVA-1.5, which looks at a picture once."""
    config = read_config(HUB | {"model_type": "llava", "text_config": VICUNA})
    assert config.image_grid_pinpoints is None


def test_folder(tmp_path):
    """A folder of our own writer that is read as another model; the file's newline replaced by zeros."""
    points = ((28, 56), (56, 28), (56, 56))
    write_small_model(tmp_path / "m", pinpoints=points)
    model = Llava.from_pretrained(tmp_path / "m")
    assert model.config.image_grid_pinpoints == points == model.image_processor.image_grid_pinpoints
    newline = load_file(tmp_path / "m/model.safetensors")["image_newline"]
    assert torch.equal(model.image_newline, newline) and newline.abs().sum() > 0
    assert isinstance(model.image_processor, AnyresProcessor) and model.preprocess(noise(60, 60)).shape[0] == 5
    answer = model.generate(noise(60, 60), "Why?", "himap", max_new_tokens=3)
    assert [len(stage.kept) for stage in answer.trace.stages] == [12, 1] and model.himap != HIMAP  # of 4 + 4 x 5
    assert Llava.from_pretrained(tmp_path / "m", torch.float16).image_newline.dtype == torch.float16


def test_padding_of_a_batch_is_no_padding_of_a_picture(tmp_path):
    """LLaVA-NeXT's `do_pad`, which fills a batch up with looks, read as LLaVA-1.5's square."""
    write_small_model(tmp_path / "m", pinpoints=((28, 56), (56, 28)))
    path = tmp_path / "m/preprocessor_config.json"
    write_json(path, json.loads(path.read_text()) | {"do_pad": True, "aspect_ratio_setting": "anyres"})
    processor = Llava.from_pretrained(tmp_path / "m").image_processor
    assert not processor.do_pad and type(processor) is not ImageProcessor
