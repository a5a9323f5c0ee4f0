"""What a folder means: the rules of tests/parity/test_folders.py, and more, on small folders of our own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import QUERY, same
from toys import TINY_CONFIG, changed, make_tokenizer, noise, random_llava, tensors_of, write_folder, write_json

from himap_ref import HimapError, Llava, TextConfig
from himap_ref.checkpoint.config import read_config, read_image_processor
from himap_ref.checkpoint.files import find_folder
from himap_ref.image import ImageProcessor
from himap_ref.studies.weights.hub_layout import config_json

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


# ---------------------------------------------------------------- A. silently other weights


@pytest.mark.parametrize("place", ["top", "text", "original"])
@pytest.mark.parametrize("stored", ["both", "embeddings", "head"])
def test_tied_embeddings(tmp_path, model, place, stored):
    """A trained head thrown away because of a flag; a tied model refused for a head that it need not store."""
    data = changed(text_config={"tie_word_embeddings": True}) if place == "text" else changed(tie_word_embeddings=True)
    tensors = tensors_of(model)
    kept = {"both": {HEAD, EMBEDDINGS}, "embeddings": {EMBEDDINGS}, "head": {HEAD}}[stored]
    only = {name: tensor for name, tensor in tensors.items() if name not in {HEAD, EMBEDDINGS} - kept}
    if place == "original":  # its names; in its config.json there is but one place
        prefix = re.compile(r"language_model\.(?=model\.)?")
        only = {prefix.sub("", name): tensor for name, tensor in only.items()}
    decoder = Llava.from_pretrained(write_folder(tmp_path / "model", only, data)).language_model
    hidden = torch.randn(3, 16)
    assert torch.equal(decoder.logits(hidden), hidden @ tensors[HEAD if HEAD in kept else EMBEDDINGS].T)
    assert torch.equal(decoder.embed_tokens.weight, tensors[EMBEDDINGS if EMBEDDINGS in kept else HEAD])
    assert decoder.config.tie_word_embeddings == (stored != "both") == (not hasattr(decoder, "lm_head"))


def split(folder, tensors, count=3, name="model-{:05}-of-{:05}.safetensors") -> dict[str, str]:
    """Shards instead of the one file; returns the index's map, which is not written."""
    (folder / SAFE).unlink(missing_ok=True)
    files = [name.format(i + 1, count) for i in range(count)]
    weight_map = {tensor: files[i % count] for i, tensor in enumerate(sorted(tensors))}
    for file in files:
        save_file({key: tensors[key] for key in tensors if weight_map[key] == file}, folder / file)
    return weight_map


def index(folder: Path, weight_map: dict) -> None:
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


STATES = (
    "a stale index and its shards", "a stale index alone", "strays beside one file", "strays beside shards",
    "an overlay", "an index that lists what old versions stored", "an index that does not list all",
    "shards without an index", "shards of another name", "one file of another name",
    "pickles that are none of the model",
)  # fmt: skip


def arrange(state: str, folder: Path, old: dict, new: dict) -> None:
    if state.startswith("strays"):
        for name in ("adapter_model", "consolidated", "model.fp16", "zzz", "model-00001-of-00002", "aaa"):
            save_file(old, folder / f"{name}.safetensors")
        (folder / "pytorch_model.bin").write_bytes(b"x")
    match state:
        case "a stale index and its shards":
            index(folder, split(folder, old))
            save_file(new, folder / SAFE)
        case "a stale index alone":
            index(folder, {QUERY: "model-00001-of-00009.safetensors"})
            save_file(new, folder / SAFE)
        case "strays beside one file":
            save_file(new, folder / SAFE)
        case "strays beside shards":
            index(folder, split(folder, new))
        case "an overlay":  # shards of a few tensors, first and last in order, beside a set with their old values
            first, last, rest = list(new)[:3], list(new)[3:5], list(new)[5:]
            weight_map = split(folder, old | {name: new[name] for name in rest}, 2)
            index(folder, weight_map | dict.fromkeys(first, "a.safetensors") | dict.fromkeys(last, "z.safetensors"))
            save_file({name: new[name] for name in first}, folder / "a.safetensors")
            save_file({name: new[name] for name in last}, folder / "z.safetensors")
        case "an index that lists what old versions stored":
            buffer = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": SHARDS[0]}
            index(folder, split(folder, new, 2) | buffer)
        case "an index that does not list all":
            index(folder, dict(list(split(folder, new).items())[:-4]))
        case "shards without an index":
            split(folder, new)
        case "shards of another name":
            split(folder, new, 2, "llava.v1-{:05}-of-{:05}.safetensors")
        case "one file of another name":
            split(folder, new, 1, "weights.fp32.safetensors")
        case "pickles that are none of the model":
            split(folder, new)
            for name in ("optimizer.pt", "training_args.bin", "rng_state.pth"):
                (folder / name).write_bytes(b"x")


@pytest.mark.parametrize("state", STATES)
def test_which_files_are_the_model(folder, model, state):
    """The weights of an earlier save, of a file that lies about, or some of each."""
    other = random_llava(read_config(TINY_CONFIG), seed=1)
    arrange(state, folder, tensors_of(model), tensors_of(other))
    assert same(Llava.from_pretrained(folder), other)


MEAN = {"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 40}, "crop_size": {"height": 28, "width": 28}}
PROCESSORS = [  # processor_config.json, preprocessor_config.json: which of MEAN's settings are followed, padding
    ({"image_processor": MEAN}, {"image_mean": [0.5] * 3}, True, False),
    ({"image_processor": {}}, {"image_mean": [0.5] * 3}, False, False),  # wins whole, and says nothing
    ({"image_processor": {"do_pad": True}}, {**MEAN, "do_pad": False}, False, True),
    (None, {"image_processor_type": "CLIPImageProcessor", "do_pad": True}, False, False),  # which knows no padding
    ({"image_processor": None}, MEAN, True, False),
    ({"patch_size": 14}, MEAN, True, False),
    (None, MEAN, True, False),
    ({"image_processor": MEAN}, None, True, False),
    (None, None, False, False),
    ({"image_processor": None}, None, False, False),
    (None, dict.fromkeys(("size", "crop_size", "resample", "do_resize", "do_pad", "rescale_factor")), False, False),
]


@pytest.mark.parametrize("newer, older, mean, pad", PROCESSORS)
def test_two_files_of_an_image_processor(tmp_path, newer, older, mean, pad):
    """The older file's settings, or a mixture that nobody has ever used; a null taken for a size or a mean."""
    for name, data in (("processor", newer), ("preprocessor", older), ("", TINY_CONFIG)):
        if data is not None:
            write_json(tmp_path / f"{name}_config.json".lstrip("_"), data)
    usual = ImageProcessor(shortest_edge=28, crop_size=(28, 28), do_pad=pad)
    expected = replace(usual, shortest_edge=40, image_mean=(0.1, 0.2, 0.3)) if mean else usual
    assert read_image_processor(tmp_path, 28) == expected


@pytest.mark.parametrize("layout", ["original", "llava-hf"])
@pytest.mark.parametrize("aspect", ["pad", "square", None])
@pytest.mark.parametrize("said", [None, False, True])
def test_padding(tmp_path, layout, aspect, said):
    """A null (transformers writes one) taken for the original LLaVA's "pad" switched off; that "pad" followed where it
    is left over in another layout, for which transformers does not read it."""
    write_json(tmp_path / "config.json", ORIGINAL | {"image_aspect_ratio": aspect} | (
        {"vision_config": {}, "text_config": {}} if layout == "llava-hf" else {}))  # fmt: skip
    write_json(tmp_path / "preprocessor_config.json", {"do_pad": said})
    asked = layout == "original" and aspect == "pad" if said is None else said
    assert read_image_processor(tmp_path, 336).do_pad is asked


# ---------------------------------------------------------------- B, C. entries of config.json

ORIGINAL = {
    "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad", "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 310, "use_mm_proj": True,
    "mm_patch_merge_type": "flat", "tune_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": True,
}  # fmt: skip


@pytest.mark.parametrize("keys, expected", [
    ({"mm_projector_type": "mlp2x_gelu"}, ("mlp2x_gelu", -2, "default")),
    ({"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1}, ("linear", -1, "full")),
    ({"mm_vision_select_feature": "patch", "mm_projector_type": "linear"}, ("linear", -2, "default")),
])  # fmt: skip
def test_original_config(keys, expected):
    """The original LLaVA's config.json is flat and has no vision_config: it would be read as a text-only LLaMA's."""
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40,
             "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000}  # fmt: skip
    own = {name: value for name, value in ORIGINAL.items() if name in ("model_type", "mm_vision_tower")}
    config = read_config(own | sizes | keys)
    assert (config.projector_type, config.vision_feature_layer, config.vision_feature_select_strategy) == expected
    assert config.num_image_tokens == 576 + (expected[2] == "full")
    assert config.text_config == TextConfig(**sizes)


@pytest.mark.parametrize("tower, size", [
    ("openai/clip-vit-large-patch14-336", 336), ("openai/clip-vit-large-patch14", 224),
    ("/data/models/clip-vit-large-patch14-336/", 336), ("./clip-vit-large-patch14", 224),
])  # fmt: skip
def test_towers(tmp_path, tower, size):
    """A tower of 224 pixels built as one of 336: other patches, a message about 577 positions that nobody asks for."""
    data = ORIGINAL | {"mm_vision_tower": tower}
    write_json(tmp_path / "config.json", data)
    config = read_config(data)
    with torch.device("meta"):
        model = Llava(config)
    assert model.vision_tower.embeddings.position_embedding.weight.shape == ((size // 14) ** 2 + 1, 1024)
    assert config.num_image_tokens == (size // 14) ** 2 and config.vision_layers_used == 23
    processor = read_image_processor(tmp_path, config.vision_config.image_size)
    assert processor(noise(50, 40)).shape == (1, 3, size, size) and processor.do_pad


PLAIN = {name: value for name, value in TINY_CONFIG.items() if name != "image_token_index"}
OLD, NEW = {"image_token_index": 7}, {"image_token_id": 9}


@pytest.mark.parametrize("data, expected", [  # 300: the tokenizer's
    (ORIGINAL, 300), (ORIGINAL | {"image_token_index": None}, 300), (ORIGINAL | {"image_token_index": -200}, 300),
    (ORIGINAL | OLD, 7), (ORIGINAL | NEW, 9), (ORIGINAL | OLD | NEW, 9), (PLAIN, 32000), (PLAIN | OLD, 7),
    (PLAIN | NEW, 9), (PLAIN | OLD | NEW, 9), (NEW | OLD | PLAIN, 9),
])  # fmt: skip
def test_image_token(data, expected):
    """32000 whatever the original's file and the tokenizer say, and a message that asks to add the token that is there;
    one of two names overlooked, or the older one taken where a file has both."""
    assert read_config(data, image_token=300).image_token_index == expected
    assert read_config(data).image_token_index == (32000 if expected == 300 else expected)


def test_the_tokenizers_image_token(tmp_path, monkeypatch):
    """As above, from a folder."""
    asked = []
    monkeypatch.setattr("himap_ref.assistant.llava.read_config", lambda *args: asked.append(args) or read_config(*args))
    with pytest.raises(HimapError, match="unexpected"):
        Llava.from_pretrained(write_folder(tmp_path / "model", {"x": torch.zeros(1)}, ORIGINAL))
    assert asked[-1][1] == make_tokenizer("byte-level").token_to_id("<image>") is not None


def test_sections_go_before_the_originals_entries():
    """A converted config.json that still has entries of the original's: transformers reads the sections."""
    assert read_config({**TINY_CONFIG, "mm_vision_tower": "siglip"}) == read_config(TINY_CONFIG)


# ---------------------------------------------------------------- E. LLaVAs that were refused

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 128}  # fmt: skip


LINEAR, CONTEXT = {"type": "linear", "factor": 2}, "original_max_position_embeddings"


@pytest.mark.parametrize("text, expected", [  # type, factor, theta, first context
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0}}, ("linear", 2, 1e4, 8192)),
    ({"rope_scaling": {**LINEAR, "type": "yarn", "rope_type": "linear"}}, ("linear", 2, 1e4, 8192)),
    ({"rope_scaling": {**LINEAR, "rope_theta": 5.0}, "rope_theta": 6.0}, ("linear", 2, 5.0, 8192)),
    ({"rope_scaling": LLAMA3, "max_position_embeddings": 999}, ("llama3", 8.0, 1e4, 128)),
    ({"rope_scaling": LLAMA3, CONTEXT: 77}, ("llama3", 8.0, 1e4, 77)),
    ({"rope_scaling": {name: v for name, v in LLAMA3.items() if name != CONTEXT}, "max_position_embeddings": 999},
     ("llama3", 8.0, 1e4, 999)),
    ({"rope_scaling": {"type": "dynamic", "factor": 1.0}}, ("default", 1.0, 1e4, 8192)),
    *((text, ("default", 1.0, 5e5, 8192)) for text in (
        {"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 5e5}},
    )),
])  # fmt: skip
def test_where_rope_is_described(text, expected):
    """One of several places overlooked, or the one that transformers reads second taken first."""
    config = read_config(changed(text_config=text)).text_config
    assert (config.rope_type, config.factor, config.rope_theta, config.original_max_position_embeddings) == expected


@pytest.mark.parametrize("layers", [[-2], [-2, -1], [0, 3], [1, 1], -2, -1, 2, 0, 3, -4], ids=str)
def test_feature_layers(layers):
    """Layers counted from 0, where index 0 is the embeddings' output; a list of one taken for something else than its
    layer; layers lost on the way to a file and back."""
    config = read_config(changed(vision_feature_layer=layers))
    layers = [layers] if isinstance(layers, int) else layers
    assert config.feature_layers == tuple(layer % 4 for layer in layers)
    assert config.vision_layers_used == max(config.feature_layers)
    assert read_config(json.loads(json.dumps(config_json(config, {})))) == config
    with torch.device("meta"):
        assert Llava(config).multi_modal_projector.linear_1.in_features == 16 * len(layers)


def test_no_layers_from_python():
    with pytest.raises(HimapError, match="vision_feature_layer"):
        replace(read_config(TINY_CONFIG), vision_feature_layer=())


@pytest.mark.parametrize("wrap", [
    "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "_fsdp_wrapped_module.{}",
])  # fmt: skip
def test_names_of_torchs_wrappers(folder, model, wrap):
    """A whole model refused because it was compiled or trained on two cards when it was saved."""
    save_file({wrap.format(name): tensor for name, tensor in load_file(folder / SAFE).items()}, folder / SAFE)
    assert same(Llava.from_pretrained(folder), model)
    inner = {name.replace(".layers.", ".layers._orig_mod."): tensor for name, tensor in tensors_of(model).items()}
    save_file(inner, folder / SAFE)
    assert same(Llava.from_pretrained(folder), model)


# ---------------------------------------------------------------- G. paths and hub ids

NOT_ASKED = [
    "weights/shapes", "Weights/x", "models/llava", "checkpoints/llava-v1.5-7b", "here/llava", "./x/y", "../x/y", "x/y/",
    "nowhere/", "/x/y", "~/x", "~user/x", "C:\\x", "C:/x", "C:\\x/y", "x\\y/z", "a/b/c", "x", ".x/y", "-x/y", "x/.y",
    "x y/z", "here/file/x", "file/x", "owner//name", "", "/x", Path("owner/name"), "owner/name\n", "../a/nowhere",
    "/nowhere/at-all", "bad owner/!!", "here/model.safetensors", "./here/model.safetensors",
]  # fmt: skip


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the hub is asked for, which has nothing."""
    names = []

    def download(name, **_):
        names.append(name)
        raise OSError("404: no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model.safetensors").touch()
    (tmp_path / "file").touch()
    return names


@pytest.mark.parametrize("source", NOT_ASKED, ids=repr)
def test_paths_are_not_asked_for(asked, source):
    """A mistyped path sent to the hub, and whatever somebody has put there under that name run."""
    with pytest.raises(HimapError, match="no such folder") as caught:
        find_folder(source)
    assert not asked
    assert ("--local-dir" in str(caught.value)) == (source in NOT_ASKED[:5] + ["file/x"])  # that may be meant


@pytest.mark.parametrize("source, name", [
    ("llava-hf/llava-1.5-7b-hf", None), ("owner/name", None), ("a.b-c_d/E.f", None), ("1x/2y", None),
    ("llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"), ("llava-1.5-13b", "llava-hf/llava-1.5-13b-hf"),
])  # fmt: skip
def test_hub_ids_are_asked_for(asked, tmp_path, source, name):
    """The hub's models out of reach; a failure that leaves the other reading out."""
    with pytest.raises(HimapError, match="no such folder here, nor can the hub's be downloaded .404: no such rep"):
        find_folder(source)
    assert asked == [name or source]
    (tmp_path / "llava-hf").mkdir()  # where somebody keeps others of theirs; a short name means no folder
    with pytest.raises(HimapError):
        find_folder("llava-1.5-7b")
    assert asked[-1] == "llava-hf/llava-1.5-7b-hf"
