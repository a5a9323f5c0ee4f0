"""Loading: a folder is read completely and exactly. (What is refused stands in tests/faults/test_bad_inputs.py.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import changed, join_safetensors, noise, write_json

from himap_ref import Llava, TextConfig, VisionConfig
from himap_ref.checkpoint.config import read_config
from himap_ref.checkpoint.load import rename
from himap_ref.studies.weights.hub_layout import hub_name
from himap_ref.studies.weights.train import export

WEIGHTS = "model.safetensors"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


def same(a: Llava, b: Llava) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_loads_every_tensor(folder, model):
    """A tensor put in another's place, or left as it was initialised."""
    loaded = Llava.from_pretrained(str(folder))  # text, too, names a folder
    assert same(loaded, model)
    assert not loaded.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    image = noise(40, 30)
    ids = torch.tensor([[1, 2, 8, 8, 8, 8, 3, 4]])
    pixels = loaded.preprocess(image)
    assert pixels.shape == (1, 3, 28, 28)  # the encoder's size, though the folder has no preprocessor file
    torch.testing.assert_close(loaded(ids, pixels).logits, model(ids, pixels).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stored, asked", [
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16), (torch.float16, torch.float32),
])  # fmt: skip
def test_cast(folder, model, stored, asked):
    """A file's dtype (half in all published ones) kept though another was asked for; some parameters left in it, and
    the first product of two dtypes failing."""
    save_file({name: tensor.to(stored) for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    loaded = Llava.from_pretrained(folder, dtype=asked)
    assert same(loaded, model.to(stored).to(asked))
    assert {parameter.dtype for parameter in loaded.parameters()} == {asked}
    assert loaded(torch.tensor([[1, 8, 8, 8, 8, 3]]), loaded.preprocess(noise(40, 30))).logits.dtype == asked


@pytest.mark.parametrize("extra", [
    "vision_tower.vision_model.encoder.layers.2.self_attn.q_proj.weight",  # layer -2 leaves 0 and 1
    "vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias",
    "vision_tower.vision_model.post_layernorm.weight",
    "vision_tower.vision_model.embeddings.position_ids",
    "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    "language_model.model.rotary_emb.inv_freq",
])  # fmt: skip
def test_unused_tensors_are_left_out(folder, model, extra):
    """Published files hold layers and buffers that this model never needs: they must not be errors."""
    save_file(load_file(folder / WEIGHTS) | {extra: torch.arange(3)}, folder / WEIGHTS)
    assert same(Llava.from_pretrained(folder), model)


@pytest.mark.parametrize(("theirs", "ours"), [
    ("language_model.model.embed_tokens.weight", "language_model.embed_tokens.weight"),
    ("model.language_model.embed_tokens.weight", "language_model.embed_tokens.weight"),
    ("model.embed_tokens.weight", "language_model.embed_tokens.weight"),
    ("language_model.model.norm.weight", "language_model.norm.weight"),
    ("model.norm.weight", "language_model.norm.weight"),
    ("lm_head.weight", "language_model.lm_head.weight"),
    ("language_model.lm_head.weight", "language_model.lm_head.weight"),
    ("model.vision_tower.encoder.layers.3.mlp.fc1.bias", "vision_tower.layers.3.mlp.fc1.bias"),
    ("vision_tower.encoder.layers.3.mlp.fc1.bias", "vision_tower.layers.3.mlp.fc1.bias"),
    ("vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias", "vision_tower.layers.3.mlp.fc1.bias"),
    ("model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
    ("model.multi_modal_projector.linear_2.bias", "multi_modal_projector.linear_2.bias"),
    ("model.mm_projector.0.weight", "multi_modal_projector.linear_1.weight"),
    ("model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias"),
    ("model.mm_projector.weight", "multi_modal_projector.linear_1.weight"),
    ("model.image_newline", "image_newline"), ("image_newline", "image_newline"),
])  # fmt: skip
def test_names(theirs, ours):
    """A prefix that is tried before a longer one sends a whole layout's tensors astray."""
    assert rename(theirs) == ours


@pytest.mark.parametrize(("generation", "top", "text", "expected"), [
    (None, None, None, (2,)), (7, None, None, (7,)), ([7, 9], 5, 4, (7, 9)), (None, 5, 4, (5,)), (None, None, 4, (4,)),
    (None, 0, 4, (0,)),
])  # fmt: skip
def test_end_of_sequence_ids(folder, generation, top, text, expected):
    """Answers would run on past their end, or stop at a token that ends nothing."""
    if generation is not None:
        write_json(folder / "generation_config.json", {"eos_token_id": generation})
    data = changed(text_config={} if text is None else {"eos_token_id": text})
    write_json(folder / "config.json", data if top is None else {**data, "eos_token_id": top})
    assert tuple(Llava.from_pretrained(folder).eos_token_ids) == expected


def test_the_embedded_folder_is_what_the_writer_writes(tmp_path):
    """A writer that has gone its own way since: the next training would give a folder that nobody has tested."""
    embedded = Path(__file__).parents[2] / "weights" / "shapes"
    model = Llava.from_pretrained(embedded)
    export(model, tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {path.name for path in embedded.iterdir()} - {"README.md", "results", "training.jsonl"}
    for name in written - {"example.png"}:  # whose bytes are Pillow's
        assert (tmp_path / name).read_bytes() == (embedded / name).read_bytes(), name


# ---------------------------------------------------------------- memory


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> int:
    """A safetensors file of fp32 zeros that takes no room on the disk; returns its size in bytes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    path.write_bytes(front := join_safetensors(header, b""))
    os.truncate(path, len(front) + end)
    return len(front) + end


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's memory accounting")
def test_weights_stay_mapped(folder):
    """Loading a file of the machine's size would need twice the memory, and not share it between processes."""
    data = changed(text_config={"vocab_size": 400_000, "hidden_size": 64})
    with torch.device("meta"):
        shapes = {hub_name(k): list(v.shape) for k, v in Llava(read_config(data)).state_dict().items()}
    write_json(folder / "config.json", data)
    size = write_sparse(folder / WEIGHTS, shapes)
    assert size > 200e6
    before = anonymous_bytes()
    model = Llava.from_pretrained(folder)
    grown = anonymous_bytes() - before
    assert model.language_model.embed_tokens.weight.shape == (400_000, 64)
    assert grown < 0.2 * size


# ---------------------------------------------------------------- config.json


def test_defaults_are_those_of_transformers():
    """Files store only what differs from transformers' defaults: another default here is another model."""
    config = read_config({"model_type": "llava", "vision_config": {}, "text_config": {}})
    text, vision = config.text_config, config.vision_config
    assert (text.rms_norm_eps, text.rope_theta, text.head_dim) == (1e-6, 10000, 128)
    assert (text.vocab_size, text.max_position_embeddings) == (32000, 2048)
    assert (text.num_key_value_heads, text.intermediate_size) == (32, 11008)
    assert (vision.hidden_size, vision.image_size, vision.patch_size, vision.hidden_act) == (768, 224, 32, "quick_gelu")
    assert (config.image_token_index, config.vision_feature_layer, config.vision_feature_select_strategy) == (
        32000, -2, "default",
    )  # fmt: skip
    assert (text.attention_bias, text.mlp_bias, text.tie_word_embeddings) == (False, False, False)


def test_published_config():
    """LLaVA-1.5-7B's file as the hub has it (text_config all but empty) would be read as another shape."""
    config = read_config({
        "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
        "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu", "vocab_size": 32064,
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000,
        },
        "tie_word_embeddings": False, "torch_dtype": "float16", "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    })  # fmt: skip
    assert (config.num_image_tokens, config.vision_layers_used) == (576, 23)
    assert config.text_config == TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
    assert config.vision_config == VisionConfig(1024, 4096, 24, 16, 3, 336, 14)
