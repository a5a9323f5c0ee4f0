"""The whole model against transformers: tiny random LLaVAs, saved by transformers or rewritten to older layouts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from toys import noise

from himap_ref import Llava
from himap_ref.checkpoint.config import read_config
from himap_ref.model import find_image_span
from himap_ref.projector import Projector
from himap_ref.prompt import TEMPLATES

from .chat_templates import PARTS
from .tiny import edit_config, make_model, make_processor, save

transformers = pytest.importorskip("transformers")

QUESTION, TOKENS = "What is in the picture?", 12


def old_rope(data):
    theta = data["text_config"].pop("rope_parameters")["rope_theta"]
    data["text_config"]["rope_theta"] = theta


def leave_defaults_out(data):
    """What save_pretrained of transformers 4 left out: everything that is as the class has it."""
    classes = {"text_config": transformers.LlamaConfig, "vision_config": transformers.CLIPVisionConfig}
    for part, config_class in classes.items():
        defaults = config_class().to_dict()
        needed = {key: value for key, value in data[part].items() if key not in defaults or defaults[key] != value}
        assert not {"rms_norm_eps", "hidden_act", "rope_parameters", "layer_norm_eps"} & needed.keys()
        data[part] = needed | {"model_type": data[part]["model_type"]}
    for key in ("feature_layer", "feature_select_strategy"):
        del data[f"vision_{key}"]
    del data["projector_hidden_act"]
    data.pop("tie_word_embeddings", None)


@dataclass
class Case:
    text: dict = field(default_factory=dict)
    vision: dict = field(default_factory=dict)
    top: dict = field(default_factory=dict)
    tokenizer: str = "byte-level"
    layout: str = "as saved"
    options: dict = field(default_factory=dict)  # of save_pretrained
    edit: object = None  # of config.json
    small_embeddings: bool = False
    size: tuple[int, int] = (50, 40)

    @property
    def strategy(self) -> str:
        return self.top.get("vision_feature_select_strategy", "default")


CASES = {
    "plain": Case(text={"rms_norm_eps": 1e-3, "max_position_embeddings": 600}, vision={"layer_norm_eps": 1e-2}),
    "grouped queries, wide heads": Case(text={"num_key_value_heads": 2, "head_dim": 16}, tokenizer="llama-prepend"),
    "tied embeddings": Case(text={"tie_word_embeddings": True}, top={"tie_word_embeddings": True}),
    "biases": Case(text={"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "gelu, full, layer -1": Case(
        vision={"hidden_act": "gelu"}, top={"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    ),
    "layer 1, no projector bias": Case(
        vision={"image_size": 30},  # two pixels are left over
        top={"vision_feature_layer": 1, "multimodal_projector_bias": False, "projector_hidden_act": "quick_gelu"},
        size=(31, 90), tokenizer="llama-first",
    ),
    "shards": Case(options={"max_shard_size": "60KB"}, text={"num_hidden_layers": 5}),
    "rope_theta, new": Case(text={"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}),
    "rope_theta, old": Case(text={"rope_parameters": {"rope_theta": 300.0, "rope_type": "default"}}, edit=old_rope),
    "defaults left out": Case(edit=leave_defaults_out, small_embeddings=True),
    "hub names": Case(layout="hub", text={"num_key_value_heads": 2}, tokenizer="llama-prepend"),
    "nested names": Case(layout="nested", text={"tie_word_embeddings": True}, top={"tie_word_embeddings": True}),
    "original names": Case(
        layout="original", vision={"num_hidden_layers": 4}, top={"vision_feature_select_strategy": "full"}
    ),
    **{f"features of layers {layers}, {strategy}": Case(
        top={"vision_feature_layer": layers, "vision_feature_select_strategy": strategy}
    ) for layers in ([-2], [-2, -1], [0, 3, 1], [-1, -1], [-4]) for strategy in ("default", "full")},
}  # fmt: skip


def build(case: Case, folder):
    """(transformers' model, its processor, ours from the folder)."""
    processor = make_processor(case.tokenizer, case.strategy, case.vision.get("image_size", 28))
    model = make_model(processor, case.text, case.vision, case.top)
    if case.small_embeddings:  # so small that RMSNorm's epsilon shows
        model.get_input_embeddings().weight.data.mul_(0.001)
    save(folder, model, processor, case.layout, **case.options)
    if case.edit:
        edit_config(folder, case.edit)
    ours = Llava.from_pretrained(folder)
    ours.eos_token_ids = ()
    return model, processor, ours


def ask(processor, ours: Llava, *images):
    """A batch of QUESTION about each picture, or once without a picture, for transformers."""
    text = ours.template.replace("{question}", QUESTION)
    if not images:
        return processor(text=text.replace("<image>\n", ""), return_tensors="pt")
    return processor(images=[*images], text=[text] * len(images), return_tensors="pt")


def answers_of(model, batch) -> list[list[int]]:
    """transformers' greedy answers, one for each prompt."""
    generated = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
    return generated[:, batch.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@torch.inference_mode()
def test_equals_transformers(case, tmp_path):
    """Any part computed otherwise than LLaVA's, or read from the wrong tensor or key; features of other layers."""
    model, processor, ours = build(case, tmp_path)
    image = noise(*case.size)
    batch = ask(processor, ours, image)

    ids = ours.encode(QUESTION)
    assert ids == batch.input_ids[0].tolist()
    start, stop = find_image_span(ids, ours.config.image_token_index)
    assert stop - start == ours.config.num_image_tokens > 1
    pixels = ours.preprocess(image)
    torch.testing.assert_close(pixels, batch.pixel_values, atol=1e-6, rtol=0)

    features = model.get_image_features(pixel_values=batch.pixel_values)
    features = torch.stack(tuple(getattr(features, "pooler_output", features)))
    torch.testing.assert_close(ours.embed_image(pixels), features, atol=1e-4, rtol=0)
    used = case.top.get("vision_feature_layer", -2)
    depth = case.vision.get("num_hidden_layers", 3) + 1  # what enters the first layer is the features of layer 0
    assert len(ours.vision_tower.layers) == max(layer % depth for layer in (used if isinstance(used, list) else [used]))

    expected = model(**batch).logits
    out = ours(batch.input_ids, pixels, all_rows=True)
    torch.testing.assert_close(ours.language_model.logits(out.hidden), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(batch.input_ids, pixels).logits, expected[:, -1], atol=1e-4, rtol=0)

    (tokens,) = answers_of(model, batch)
    assert len(tokens) == TOKENS
    assert len(set(tokens)) >= 3  # else a model that repeats itself would pass
    answer = ours.generate(image, QUESTION, max_new_tokens=TOKENS)
    assert answer.token_ids == tokens
    assert answer.text == processor.decode(tokens, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return build(Case(text={"num_key_value_heads": 2}), tmp_path_factory.mktemp("plain"))


@torch.inference_mode()
def test_the_comparison_can_fail(plain):
    """Rows so alike that a wrong mask, position or image would stay within the tolerance."""
    _, processor, ours = plain
    batch, other = (ask(processor, ours, noise(50, 40, seed=seed)) for seed in (0, 1))
    logits = ours(batch.input_ids, batch.pixel_values).logits
    assert (logits - ours(batch.input_ids, other.pixel_values).logits).abs().max() > 0.1
    swapped = batch.input_ids.clone()
    swapped[0, [3, 4]] = swapped[0, [4, 3]]
    assert swapped.tolist() != batch.input_ids.tolist()
    assert (logits - ours(swapped, batch.pixel_values).logits).abs().max() > 0.01


@torch.inference_mode()
def test_without_a_picture(plain):
    """A text-only prompt would still pass through the image's path, or have shifted positions."""
    model, processor, ours = plain
    batch = ask(processor, ours)
    answer = ours.generate(None, QUESTION, max_new_tokens=TOKENS)
    assert answer.prompt_ids == batch.input_ids[0].tolist()
    assert [answer.token_ids] == answers_of(model, batch) and len(set(answer.token_ids)) >= 3


@torch.inference_mode()
def test_batch(plain):
    """Pictures of a batch exchanged, or the first one's answer given to all."""
    model, processor, ours = plain
    images = [noise(50, 40), noise(28, 28, seed=1)]
    answers = ours.generate(images, [QUESTION] * 2, max_new_tokens=TOKENS)
    assert [answer.token_ids for answer in answers] == answers_of(model, ask(processor, ours, *images))
    assert answers[0].token_ids != answers[1].token_ids


@torch.inference_mode()
def test_several_pictures(plain):
    """Two pictures of one question answered as two questions, or placed otherwise than by llava-hf's chat template."""
    model, processor, ours = plain
    images, jinja = [noise(50, 40), noise(28, 28, seed=1)], PARTS["llava-hf"]
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(said, jinja, add_generation_prompt=True)
    assert text.startswith("USER: <image>\n<image>\nWhat")
    batch = processor(images=images, text=text, return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=20, do_sample=False)[0, batch.input_ids.shape[1] :].tolist()
    usual = ours.template
    try:
        ours.template = TEMPLATES["llava-hf"]
        answer, both = (ours.generate(pictures, question, max_new_tokens=20)
                        for pictures, question in ((images, QUESTION), ([images, images[::-1]], [QUESTION] * 2)))
    finally:
        ours.template = usual
    assert answer.prompt_ids == batch.input_ids[0].tolist() and len(answer.image_span) == 4
    assert answer.token_ids == tokens == both[0].token_ids != both[1].token_ids
    expected = model(**batch).logits[:, -1]
    torch.testing.assert_close(ours(batch.input_ids, batch.pixel_values).logits, expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_end_of_sequence(plain, tmp_path):
    """The id that ends an answer would be read from the wrong file, or text be generated past it."""
    model, processor, ours = plain
    tokens = ours.generate(noise(50, 40), QUESTION, max_new_tokens=TOKENS).token_ids
    stop = next(i for i in range(3, TOKENS) if tokens[i] not in tokens[:i])
    model.generation_config.eos_token_id = [tokens[stop], 0]
    try:
        save(tmp_path, model, processor)
        expected = answers_of(model, ask(processor, ours, noise(50, 40)))
    finally:
        model.generation_config.eos_token_id = None
    answer = Llava.from_pretrained(tmp_path).generate(noise(50, 40), QUESTION, max_new_tokens=TOKENS)
    assert [answer.token_ids] == expected == [tokens[: stop + 1]]
    assert answer.finish == "eos"


@torch.inference_mode()
def test_half_precision(plain, tmp_path):
    """A step that is not in the model's dtype: bfloat16 answers would differ from fp32 by more than rounding."""
    model, processor, ours = plain
    save(tmp_path, model, processor)
    half, batch = Llava.from_pretrained(tmp_path, dtype=torch.bfloat16), ask(processor, ours, noise(50, 40))
    expected, logits = (llava(batch.input_ids, batch.pixel_values).logits.float() for llava in (ours, half))
    assert torch.nn.functional.cosine_similarity(logits, expected).item() > 0.99


def test_linear_projector():
    """LLaVA v1's single linear layer would get a GELU or a second layer; transformers has no class for it."""
    heads = {"num_attention_heads": 2}
    data = {"text_config": {"hidden_size": 12, **heads}, "vision_config": {"hidden_size": 10, **heads}}
    torch.manual_seed(0)
    ours = Projector(read_config(data | {"projector_type": "linear"}))
    reference = torch.nn.Linear(10, 12)
    ours.load_state_dict({f"linear_1.{name}": tensor for name, tensor in reference.state_dict().items()}, strict=True)
    x = torch.randn(2, 5, 10)
    torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(ours(x), x @ reference.weight.T + reference.bias)
