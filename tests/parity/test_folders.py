"""What a folder means, by transformers: each is loaded by both, and both must answer alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import noise, write_json

from himap_ref import Llava
from himap_ref.checkpoint.config import read_config, read_image_processor
from himap_ref.decoder import rope
from himap_ref.studies.weights.hub_layout import config_json

from .tiny import edit_config, make_model, make_processor, save

transformers = pytest.importorskip("transformers")

QUESTION = "What is in the picture?"
SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def originals(tmp_path_factory, processor):
    """Folders to copy: one file; another model's weights; the first in many shards."""
    root = tmp_path_factory.mktemp("originals")
    for name, seed, options in (("one", 0, {}), ("other", 1, {}), ("shards", 0, {"max_shard_size": "60KB"})):
        save(root / name, make_model(processor, {}, {}, {}, seed), processor, **options)
    assert len(list((root / "shards").glob("model-*"))) > 3
    return root


@torch.inference_mode()
def compare(folder: Path, processor) -> torch.Tensor:
    """Asserts that the first token's logits are transformers', and returns them."""
    ours = Llava.from_pretrained(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    text = ours.template.replace("{question}", QUESTION)
    batch = processor(images=noise(50, 40), text=text, return_tensors="pt")
    expected = model(**batch).logits[:, -1]
    torch.testing.assert_close(ours(batch.input_ids, batch.pixel_values).logits, expected, atol=1e-4, rtol=0)
    return expected


def rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


# ---------------------------------------------------------------- tied or not


def name_of(tensors: dict, part: str) -> str:
    return next(name for name in tensors if part in name)


HEADS = {
    "differs": lambda t: None,
    "equal": lambda t: t.update({name_of(t, "lm_head"): t[name_of(t, "embed_tokens")].clone()}),
    "absent": lambda t: t.pop(name_of(t, "lm_head")),
    "alone": lambda t: t.pop(name_of(t, "embed_tokens")),  # the embeddings are then the head's
}


@pytest.mark.parametrize("top, text", [(True, None), (None, True), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("head", HEADS)
def test_tied(originals, processor, tmp_path, head, top, text):
    """A trained head thrown away because of a flag that somebody forgot; the flag sought in one place only."""
    folder = shutil.copytree(originals / "one", tmp_path / "m")

    def flags(data):
        for where, value in ((data, top), (data["text_config"], text)):
            where.pop("tie_word_embeddings", None)
            where |= {} if value is None else {"tie_word_embeddings": value}

    edit_config(folder, flags)
    rewrite(folder / SAFE, HEADS[head])
    different = (compare(folder, processor) - compare(originals / "one", processor)).abs().max() > 1e-3
    assert different == (head != "differs")


def test_the_encoders_flag_ties_nothing(originals, processor, tmp_path):
    """Every configuration within the configuration can bear that flag; only the decoder's counts."""
    folder = shutil.copytree(originals / "one", tmp_path / "m")
    edit_config(folder, lambda data: data["vision_config"].update(tie_word_embeddings=True))
    compare(folder, processor)
    assert not Llava.from_pretrained(folder).config.text_config.tie_word_embeddings


def test_flops_are_the_same_with_a_head_of_its_own(originals, tmp_path):
    """A product counted twice or not at all where the flag and the files differ."""
    folder, plain = shutil.copytree(originals / "one", tmp_path / "m"), Llava.from_pretrained(originals / "one")
    edit_config(folder, lambda data: data.update(tie_word_embeddings=True))
    both = [model.generate(noise(40, 30), "Why?", max_new_tokens=3) for model in (plain, Llava.from_pretrained(folder))]
    assert both[0].flops == both[1].flops and both[0].token_ids == both[1].token_ids


# ---------------------------------------------------------------- which files


def shards_left(folder: Path, originals: Path) -> None:
    """`save_pretrained` of another model into a folder of shards: a new file beside the old index."""
    for path in (originals / "shards").glob("model*"):
        shutil.copy(path, folder)


def index_left(folder: Path, originals: Path) -> None:
    """The same by transformers 5, which removes the shards and leaves the index."""
    shutil.copy(originals / "shards" / INDEX, folder)


def strays(folder: Path, originals: Path) -> None:
    for name in ("adapter_model", "consolidated", "model.fp16", "model-00001-of-00002", "zzz", "mm_projector"):
        shutil.copy(originals / "other" / SAFE, folder / f"{name}.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")


STATES = {"shards left": shards_left, "index left": index_left, "strays": strays}


@pytest.mark.parametrize("state", STATES)
def test_one_file_goes_before_all(originals, processor, tmp_path, state):
    """The weights of an earlier save, or of some other file, under the new one's name."""
    folder = shutil.copytree(originals / "other", tmp_path / "m")
    STATES[state](folder, originals)
    assert torch.equal(compare(folder, processor), compare(originals / "other", processor))


def test_index_goes_before_strays(originals, processor, tmp_path):
    """Files that lie beside the shards mixed into them."""
    folder = shutil.copytree(originals / "shards", tmp_path / "m")
    strays(folder, originals)
    assert torch.equal(compare(folder, processor), compare(originals / "one", processor))


def test_a_save_over_shards(originals, processor, tmp_path):
    """As people come by it: transformers' own save_pretrained into a folder that was used before."""
    folder = shutil.copytree(originals / "shards", tmp_path / "m")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(originals / "other")
    model.save_pretrained(folder)
    assert torch.equal(compare(folder, processor), compare(originals / "other", processor))


def test_tensors_of_which_the_index_is_silent(originals, processor, tmp_path):
    """An index edited by hand: transformers reads all that is in the files that it names."""
    folder = shutil.copytree(originals / "shards", tmp_path / "m")
    data = json.loads((folder / INDEX).read_text())
    del data["weight_map"][next(name for name in data["weight_map"] if "q_proj" in name)]
    write_json(folder / INDEX, data)
    assert torch.equal(compare(folder, processor), compare(originals / "one", processor))


# ---------------------------------------------------------------- settings in two files

OTHER = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "image_mean": [0.5, 0.4, 0.3],
    "crop_size": {"height": 28, "width": 28}, "image_std": [0.6, 0.5, 0.4], "resample": 2,
}  # fmt: skip
PARTIAL = {name: OTHER[name] for name in ("image_processor_type", "size", "crop_size", "resample")}


@pytest.mark.parametrize("nested", ["as saved", "absent", None, PARTIAL], ids=str)
@pytest.mark.parametrize("older", [OTHER, {**PARTIAL, "do_pad": None}], ids=["other", "partial"])
def test_image_processor(originals, tmp_path, nested, older):
    """The older file's mean where the newer one has another, or the two mixed."""
    folder = shutil.copytree(originals / "one", tmp_path / "m")
    data = json.loads((folder / "processor_config.json").read_text())
    if nested == "absent":
        del data["image_processor"]
    elif nested != "as saved":
        data["image_processor"] = nested
    write_json(folder / "processor_config.json", data)
    write_json(folder / "preprocessor_config.json", older)
    theirs, ours = transformers.CLIPImageProcessorPil.from_pretrained(folder), read_image_processor(folder, 28)
    pixels = theirs(noise(50, 40), return_tensors="pt").pixel_values
    torch.testing.assert_close(ours(noise(50, 40)), pixels, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- RoPE

ROPES = {
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    "linear, an int": {"rope_scaling": {"type": "linear", "factor": 3}},
    "linear, old names": {"rope_scaling": {"type": "linear", "factor": 2.5}, "rope_theta": 300.0},
    "linear, both names": {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.5}},
    "linear, both places": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "linear, factor 1": {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4}},
    "linear, below 1": {"rope_scaling": {"type": "linear", "factor": 0.5}},
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 1e4}},
    "llama3, large theta": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 200, "rope_theta": 5e5}},
    "llama3, odd factors": {
        "rope_scaling": {**LLAMA3, "factor": 3, "low_freq_factor": 2, "high_freq_factor": 2.7,
                         "original_max_position_embeddings": 128},
    },
    "llama3, context beside": {"original_max_position_embeddings": 40, "rope_scaling": {
        **LLAMA3, "original_max_position_embeddings": 300}},
    "llama3, no other context": {"rope_scaling": LLAMA3},
    "llama3, factor 1": {"rope_scaling": {**LLAMA3, "factor": 1.0, "original_max_position_embeddings": 64}},
    "dynamic, factor 1": {"rope_scaling": {"type": "dynamic", "factor": 1.0}},
    "yarn, factor 1": {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 512}},
    "null": {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
}  # fmt: skip


def with_rope(data: dict, settings: dict) -> dict:
    text = {name: value for name, value in data["text_config"].items() if not name.startswith("rope")}
    return {**data, "text_config": {**text, **settings}}


@pytest.mark.parametrize("settings", ROPES.values(), ids=ROPES)
def test_rope(originals, settings):
    """A factor applied to the wrong channels or not at all; settings found in one of their places only."""
    data = with_rope(json.loads((originals / "one" / "config.json").read_text()), settings)
    ours, theirs = read_config(data).text_config, transformers.LlavaConfig.from_dict(data).text_config
    positions = torch.arange(500)[None]
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    for got, want in zip(rope(positions, ours, torch.float32), expected, strict=True):
        torch.testing.assert_close(got[:, :, 0], want, atol=1e-4, rtol=0)
    again = read_config(json.loads(json.dumps(config_json(read_config(data), {}))))
    assert again.text_config == ours
    theirs = transformers.LlavaConfig.from_dict(config_json(read_config(data), {})).text_config
    written = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(written, expected, strict=True))


@pytest.mark.parametrize("case", ["linear", "llama3"])
def test_rope_in_the_whole_model(originals, processor, tmp_path, case):
    """The right angles, used in another place than transformers does."""
    folder = shutil.copytree(originals / "one", tmp_path / "m")
    edit_config(folder, lambda data: data.update(with_rope(data, ROPES[case])))
    assert (compare(folder, processor) - compare(originals / "one", processor)).abs().max() > 1e-2


# ---------------------------------------------------------------- features of several layers


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layers", [[-2], [-2, -1], [0, 3, 1], [-1, -1], [-4]], ids=str)
@torch.inference_mode()
def test_feature_layers(tmp_path, layers, strategy):
    """Features in another order, with the class token of all but one, or of layers that are never run."""
    processor = make_processor(strategy=strategy)
    top = {"vision_feature_layer": layers, "vision_feature_select_strategy": strategy}
    model = make_model(processor, {}, {}, top)
    save(tmp_path, model, processor)
    compare(tmp_path, processor)
    ours, pixels = Llava.from_pretrained(tmp_path), processor.image_processor(noise(50, 40), return_tensors="pt")
    expected = torch.stack(tuple(model.get_image_features(**pixels).pooler_output))
    torch.testing.assert_close(ours.embed_image(pixels.pixel_values), expected, atol=1e-4, rtol=0)
    assert len(ours.vision_tower.layers) == max(layer % 4 for layer in layers)
