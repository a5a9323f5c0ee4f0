"""Loading: a folder is read completely and exactly, or refused with the name of what is wrong."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from toys import TINY_CONFIG, make_tokenizer, noise, write_json

from himap_ref import HimapError, Llava, TextConfig, VisionConfig
from himap_ref.checkpoint.config import read_config
from himap_ref.checkpoint.files import find_folder
from himap_ref.checkpoint.load import rename
from himap_ref.studies.hub_layout import hub_name
from himap_ref.studies.train import export

WEIGHTS = "model.safetensors"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


def random_llava(data: dict, seed: int = 0) -> Llava:
    torch.manual_seed(seed)
    model = Llava(read_config(data))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tensors_of(model: Llava) -> dict[str, torch.Tensor]:
    return {hub_name(name): tensor.clone() for name, tensor in model.state_dict().items()}


def write(folder: Path, tensors: dict, data: dict = TINY_CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", data)
    make_tokenizer("byte-level").save(str(folder / "tokenizer.json"))
    save_file(tensors, folder / WEIGHTS)
    return folder


def changed(**sections: dict) -> dict:
    """TINY_CONFIG with some entries set: changed(text_config={"vocab_size": 5}, image_token_index=3)."""
    data = copy.deepcopy(TINY_CONFIG)
    for name, value in sections.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    return data


@pytest.fixture
def model() -> Llava:
    return random_llava(TINY_CONFIG)


@pytest.fixture
def folder(tmp_path, model) -> Path:
    return write(tmp_path / "model", tensors_of(model))


def edit(folder: Path, **changes: torch.Tensor | None) -> None:
    """Sets tensors of the folder's file, or with None takes them out."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS)


def same(a: Llava, b: Llava) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- what loads


def test_loads_every_tensor(folder, model):
    """A tensor put in another's place, or left as it was initialised."""
    loaded = Llava.from_pretrained(folder)
    assert same(loaded, model)
    assert not loaded.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())
    image = noise(40, 30)
    ids = torch.tensor([[1, 2, 8, 8, 8, 8, 3, 4]])
    pixels = loaded.preprocess(image)
    assert pixels.shape == (1, 3, 28, 28)  # the encoder's size, though the folder has no preprocessor file
    torch.testing.assert_close(loaded(ids, pixels).logits, model(ids, pixels).logits, atol=1e-5, rtol=0)


def test_path_as_text(folder, model):
    """Only Path objects would be taken for folders."""
    assert same(Llava.from_pretrained(str(folder)), model)


def test_shards_with_index(folder, model):
    """Only the first shard would be read, or a file that the index does not name."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    save_file({"adapter.weight": torch.zeros(2)}, folder / "adapter.safetensors")
    assert same(Llava.from_pretrained(folder), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast(folder, model, dtype):
    """Some parameters would stay in the file's dtype and the first product of two dtypes fail."""
    loaded = Llava.from_pretrained(folder, dtype=dtype)
    assert same(loaded, model.to(dtype))
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded(torch.tensor([[1, 8, 8, 8, 8, 3]]), loaded.preprocess(noise(40, 30))).logits.dtype == dtype


def test_half_file_is_read_as_asked(folder, model):
    """A half-precision file (all published ones) would load as half though fp32 was asked for."""
    edit(folder, **{name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()})
    assert same(Llava.from_pretrained(folder), model.half().float())


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
    edit(folder, **{extra: torch.arange(3)})
    assert same(Llava.from_pretrained(folder), model)


def test_layers_beyond_the_encoder_are_errors(folder):
    """A file with more layers than config.json says belongs to another configuration."""
    name = "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias"
    edit(folder, **{name: torch.zeros(24)})
    with pytest.raises(HimapError, match=re.escape(name)):
        Llava.from_pretrained(folder)


def test_untied_needs_lm_head(folder):
    """Without lm_head the embeddings would silently stand in for it."""
    edit(folder, **{"language_model.lm_head.weight": None})
    with pytest.raises(HimapError, match="lm_head.weight.*missing"):
        Llava.from_pretrained(folder)


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
])  # fmt: skip
def test_names(theirs, ours):
    """A prefix that is tried before a longer one sends a whole layout's tensors astray."""
    assert rename(theirs) == ours


PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "do_center_crop": True,
    "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_preprocessor_file(folder, file):
    """The settings of the older or of the newer file would be overlooked and LLaVA-1.5's be taken."""
    inside = PREPROCESSOR if file.startswith("pre") else {"image_processor": PREPROCESSOR, "patch_size": 14}
    write_json(folder / file, inside)
    processor = Llava.from_pretrained(folder).image_processor
    assert (processor.shortest_edge, processor.crop_size) == (40, (28, 28))
    assert processor.image_mean == processor.image_std == (0.5, 0.5, 0.5)


def test_preprocessor_of_another_size(folder):
    """Pictures of 336 pixels for an encoder of 28 would fail in the position embeddings, far from the cause."""
    write_json(folder / "preprocessor_config.json", {**PREPROCESSOR, "crop_size": 336})
    with pytest.raises(HimapError, match="28"):
        Llava.from_pretrained(folder)


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
    embedded = Path(__file__).parents[1] / "weights" / "shapes"
    model = Llava.from_pretrained(embedded)
    export(model, model.tokenizer, tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {path.name for path in embedded.iterdir()} - {"README.md", "results"}
    for name in written - {"example.png"}:  # whose bytes are Pillow's
        assert (tmp_path / name).read_bytes() == (embedded / name).read_bytes(), name


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", [
    QUERY, "multi_modal_projector.linear_2.bias", "vision_tower.vision_model.pre_layrnorm.weight",
    "vision_tower.vision_model.encoder.layers.1.mlp.fc2.weight", "language_model.model.norm.weight",
])  # fmt: skip
def test_missing_tensor(folder, name):
    """An incomplete file would run with uninitialised weights."""
    edit(folder, **{name: None})
    with pytest.raises(HimapError, match=re.escape(rename(name)) + ".*missing"):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize("name", [
    "language_model.model.layers.2.mlp.up_proj.weight", "language_model.model.layers.0.self_attn.q_proj.bias",
    "optimizer.step", "image_newline", "multi_modal_projector.linear_3.weight", "vision_tower.vision_model.head.weight",
])  # fmt: skip
def test_unexpected_tensor(folder, name):
    """A file with parts that the configuration does not describe would lose them silently."""
    edit(folder, **{name: torch.zeros(16)})
    with pytest.raises(HimapError, match=re.escape(name)):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(16, 15), (8, 16), (256,), (1, 16, 16), ()])
def test_misshapen_tensor(folder, shape):
    """A shape that broadcasts would give wrong answers, another one a traceback that names no tensor."""
    edit(folder, **{QUERY: torch.zeros(shape)})
    with pytest.raises(HimapError, match=re.escape(QUERY) + ".*" + re.escape(f"{list(shape)}") + r".*\[16, 16\]"):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integer_tensor(folder, dtype):
    """Quantised weights would be cast to float as if they were the values."""
    edit(folder, **{QUERY: torch.ones(16, 16, dtype=dtype)})
    with pytest.raises(HimapError, match=re.escape(QUERY)):
        Llava.from_pretrained(folder)


def test_doubled_tensor_in_two_layouts(folder):
    """The same tensor under two layouts' names would be taken from whichever comes last."""
    edit(folder, **{"model.norm.weight": torch.zeros(16)})
    with pytest.raises(HimapError, match="norm.weight.*twice"):
        Llava.from_pretrained(folder)


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "../a/nowhere", "/nowhere/at-all", "a/b/c", "~/models"])
def test_no_such_folder(tmp_path, monkeypatch, source):
    """A mistyped path would be looked up on the hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HimapError, match="no such folder"):
        find_folder(source)


def test_file_instead_of_folder(folder, monkeypatch):
    """The weights' file given instead of its folder would be looked up on the hub."""
    with pytest.raises(HimapError, match="no such folder"):
        Llava.from_pretrained(folder / WEIGHTS)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(HimapError, match="no such folder"):
        find_folder(f"{folder.name}/{WEIGHTS}")


@pytest.mark.parametrize("source", ["owner/name", "llava-1.5-7b", "bad owner/!!"])
def test_hub_without_network(tmp_path, monkeypatch, source):
    """Without a network the hub's client raises a page of text about its own settings."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    name = "llava-hf/llava-1.5-7b-hf" if source == "llava-1.5-7b" else source
    with pytest.raises(HimapError, match=re.escape(name)) as caught:
        Llava.from_pretrained(source)
    assert "\n" not in str(caught.value)


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
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text) + end


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
        "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False, "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
    })  # fmt: skip
    assert config.num_image_tokens == 576
    assert config.vision_layers_used == 23
    assert config.text_config == TextConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
    assert config.vision_config == VisionConfig(1024, 4096, 24, 16, 3, 336, 14)


@pytest.mark.parametrize(("keys", "expected"), [
    ({"mm_projector_type": "mlp2x_gelu"}, ("mlp2x_gelu", -2, "default")),
    ({"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}, ("linear", -1, "full")),
    ({"mm_vision_select_feature": "patch", "mm_projector_type": "linear"}, ("linear", -2, "default")),
])  # fmt: skip
def test_original_config(keys, expected):
    """The original LLaVA's config.json is flat and has no vision_config: it would be read as a text-only LLaMA's."""
    config = read_config({
        "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024,
        "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40,
        "rms_norm_eps": 1e-05, "vocab_size": 32000, "max_position_embeddings": 4096, **keys,
    })  # fmt: skip
    assert (config.projector_type, config.vision_feature_layer, config.vision_feature_select_strategy) == expected
    assert config.num_image_tokens == 576 + (expected[2] == "full")
    assert config.text_config == TextConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
        max_position_embeddings=4096, rms_norm_eps=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(("layer", "used"), [(-2, 2), (-1, 3), (2, 2), (0, 0), (3, 3), (-4, 0)])
def test_feature_layer(layer, used):
    """Index 0 is the embeddings' output: counting layers from 0 takes the features one layer too late."""
    assert read_config(changed(vision_feature_layer=layer)).vision_layers_used == used


@pytest.mark.parametrize("rope", [
    {"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5}},
])  # fmt: skip
def test_rope_theta(rope):
    """transformers 5 moved rope_theta into rope_parameters: read in one place only, it would be 10000 again."""
    assert read_config(changed(text_config=rope)).text_config.rope_theta == 5e5


@pytest.mark.parametrize("key", ["image_token_index", "image_token_id"])
def test_image_token(key):
    """One of the two names that transformers has used would be overlooked."""
    data = {name: value for name, value in TINY_CONFIG.items() if name != "image_token_index"} | {key: 5}
    assert read_config(data).image_token_index == 5


@pytest.mark.parametrize(("data", "words"), [
    (changed(model_type="llava_next"), "llava_next"),
    (changed(model_type="qwen2_vl"), "qwen2_vl"),
    (changed(text_config={"model_type": "mistral"}), "mistral"),
    (changed(vision_config={"model_type": "siglip_vision_model"}), "siglip_vision_model"),
    (changed(text_config={"hidden_act": "gelu"}), "hidden_act 'gelu'"),
    (changed(vision_config={"hidden_act": "relu"}), "'relu'"),
    (changed(projector_hidden_act="tanh"), "'tanh'"),
    (changed(projector_type="resampler"), "'resampler'"),
    (changed(vision_feature_layer=4), "vision_feature_layer 4"),
    (changed(vision_feature_layer=-5), "vision_feature_layer -5"),
    (changed(vision_feature_select_strategy="cls"), "'cls'"),
    (changed(text_config={"num_key_value_heads": 3}), "4.*heads.*3"),
])  # fmt: skip
def test_unsupported_config(data, words):
    """A model that this code does not implement would load and answer wrongly."""
    with pytest.raises(HimapError, match=words), torch.device("meta"):
        Llava(read_config(data))
