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


@pytest.fixture(scope="module")
def logits(originals, processor):
    """{name: what `compare` gives for that original}"""
    return {name: compare(originals / name, processor) for name in ("one", "other")}


@pytest.fixture
def folder(originals, tmp_path):
    """A copy of the first, to change."""
    return Path(shutil.copytree(originals / "one", tmp_path / "m"))


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
def test_tied(logits, folder, processor, head, top, text):
    """A trained head thrown away because of a flag that somebody forgot; the flag sought in one place only."""

    def flags(data):
        for where, value in ((data, top), (data["text_config"], text)):
            where.pop("tie_word_embeddings", None)
            where |= {} if value is None else {"tie_word_embeddings": value}

    edit_config(folder, flags)
    rewrite(folder / SAFE, HEADS[head])
    different = (compare(folder, processor) - logits["one"]).abs().max() > 1e-3
    assert different == (head != "differs")


def test_the_encoders_flag_ties_nothing(folder, processor):
    """Every configuration within the configuration can bear that flag; only the decoder's counts."""
    edit_config(folder, lambda data: data["vision_config"].update(tie_word_embeddings=True))
    compare(folder, processor)
    assert not Llava.from_pretrained(folder).config.text_config.tie_word_embeddings


def test_flops_are_the_same_with_a_head_of_its_own(originals, folder):
    """A product counted twice or not at all where the flag and the files differ."""
    edit_config(folder, lambda data: data.update(tie_word_embeddings=True))
    models = [Llava.from_pretrained(each) for each in (originals / "one", folder)]
    both = [model.generate(noise(40, 30), "Why?", max_new_tokens=3) for model in models]
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


def saved_over(folder: Path, originals: Path) -> None:
    """As people come by it: transformers' own save_pretrained into a folder that was used before."""
    transformers.LlavaForConditionalGeneration.from_pretrained(originals / "other").save_pretrained(folder)


def silent_index(folder: Path, originals: Path) -> None:
    """Edited by hand: transformers reads all that is in the files that it names."""
    data = json.loads((folder / INDEX).read_text())
    del data["weight_map"][next(name for name in data["weight_map"] if "q_proj" in name)]
    write_json(folder / INDEX, data)


@pytest.mark.parametrize("origin, change, meant", [
    ("other", shards_left, "other"), ("other", index_left, "other"), ("other", strays, "other"),
    ("shards", strays, "one"), ("shards", saved_over, "other"), ("shards", silent_index, "one"),
])  # fmt: skip
def test_which_files(originals, logits, processor, tmp_path, origin, change, meant):
    """The weights of an earlier save, or of some other file, under the new one's name or mixed into its shards."""
    folder = Path(shutil.copytree(originals / origin, tmp_path / "m"))
    change(folder, originals)
    assert torch.equal(compare(folder, processor), logits[meant])


# ---------------------------------------------------------------- settings in two files

OTHER = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "image_mean": [0.5, 0.4, 0.3],
    "crop_size": {"height": 28, "width": 28}, "image_std": [0.6, 0.5, 0.4], "resample": 2,
}  # fmt: skip
PARTIAL = {name: OTHER[name] for name in ("image_processor_type", "size", "crop_size", "resample")}


@pytest.mark.parametrize("nested", ["as saved", "absent", None, PARTIAL], ids=str)
@pytest.mark.parametrize("older", [OTHER, {**PARTIAL, "do_pad": None}], ids=["other", "partial"])
def test_image_processor(folder, nested, older):
    """The older file's mean where the newer one has another, or the two mixed."""
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
    ours = read_config(data)
    written = config_json(ours, {})  # and what this project itself writes means the same
    assert read_config(json.loads(json.dumps(written))).text_config == ours.text_config
    positions = torch.arange(500)[None]
    for config in (data, written):
        theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(
            transformers.LlavaConfig.from_dict(config).text_config
        )
        for got, want in zip(
            rope(positions, ours.text_config, torch.float32), theirs(torch.zeros(1), positions), strict=True
        ):
            torch.testing.assert_close(got[:, :, 0], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["linear", "llama3"])
def test_rope_in_the_whole_model(logits, folder, processor, case):
    """The right angles, used in another place than transformers does."""
    edit_config(folder, lambda data: data.update(with_rope(data, ROPES[case])))
    assert (compare(folder, processor) - logits["one"]).abs().max() > 1e-2
