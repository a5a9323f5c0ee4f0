"""A folder's chat template: found, recognised and used as transformers does, whose engine runs here and not there."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from toys import IMAGE_TOKEN, TOKENIZERS, noise

from himap_ref import Llava
from himap_ref.assistant import Past
from himap_ref.assistant.chat_template import read_template
from himap_ref.prompt import TEMPLATES, encode_prompt

from .chat_templates import OTHERS, PARTS, STRINGS
from .tiny import make_model, make_processor, save

transformers = pytest.importorskip("transformers")

ROLES = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FIRST, SAID, SECOND = "How many cats are there?", "A red circle", "What is in the picture?"


@pytest.fixture(scope="module", params=TOKENIZERS)
def processor(request):
    processor = make_processor(request.param)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, *ROLES]})
    return processor


def conversation(parts, *texts):
    """Messages of user and assistant in turn, about a picture; contents as lists of parts or as text."""
    messages = []
    for i, text in enumerate(texts):
        content = [{"type": "text", "text": text}] if parts else f"<image>\n{text}" if i == 0 else text
        if parts and i == 0:
            content.insert(0, {"type": "image", "image": noise(28, 28)})
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return messages


def expected_ids(processor, jinja, parts, *texts):
    """transformers' ids of a conversation that asks for the next answer."""
    options = {"chat_template": jinja, "add_generation_prompt": True}
    messages = conversation(parts, *texts)
    if parts:
        return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"][0]
    text = processor.apply_chat_template(messages, **options)
    return processor(text=text, images=noise(28, 28), add_special_tokens=not text.startswith("<s>")).input_ids[0]


@pytest.mark.parametrize("name", [*PARTS, *STRINGS])
def test_ids_equal(processor, tmp_path, name):
    """Vicuna's prompt for another family's model; a turn without the end of the answer before, or without a role."""
    jinja = (PARTS | STRINGS)[name]
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(jinja)
    (template, found), tokenizer = read_template(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert template and found
    image = tokenizer.token_to_id(IMAGE_TOKEN)
    first = encode_prompt(tokenizer, FIRST, template, image, 16)
    assert first == list(expected_ids(processor, jinja, name in PARTS, FIRST))
    turn = encode_prompt(tokenizer, SECOND, template, image, 0, "nothing")
    whole = list(expected_ids(processor, jinja, name in PARTS, FIRST, SAID, SECOND))
    assert whole[: len(first)] == first and whole[-len(turn) :] == turn
    assert tokenizer.decode(whole[len(first) : -len(turn)], skip_special_tokens=False).strip() == SAID


@pytest.mark.parametrize("jinja", OTHERS.values(), ids=OTHERS)
def test_other_templates(tmp_path, jinja):
    """Another template taken for a known one, or one that makes reading fail."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": jinja}))
    assert read_template(tmp_path) == (None, True)


def test_a_long_template_takes_no_time(tmp_path):
    """A pattern that tries every way to cut a stranger's text in pieces: hours."""
    for text in ("{#" * 10**6, " " * 10**6, "{{ x }}" * 700, " \n" * 2400, "{% if x %}{{ y }} " * 270, "USER: " * 800,
                 "{{ m.content }} " * 300 + "USER: "):  # fmt: skip
        (tmp_path / "chat_template.jinja").write_text(text)
        assert read_template(tmp_path) == (None, True)


PLACES = {  # files of a folder, each with another family's template
    "chat_template.jinja": PARTS["llava-med"],
    "chat_template.json": {"chat_template": PARTS["llava-hf"]},
    "tokenizer_config.json": {"chat_template": STRINGS["llama-3, literal"]},
    "processor_config.json": {"chat_template": PARTS["vicuna by parts"], "processor_class": "LlavaProcessor"},
}


@pytest.mark.parametrize("files", [
    ["chat_template.jinja"], ["chat_template.json"], ["processor_config.json"], [*PLACES], [*PLACES][:2],
    [*PLACES][:3], ["chat_template.jinja", "tokenizer_config.json"], ["chat_template.json", "tokenizer_config.json"],
    ["chat_template.jinja", "processor_config.json"],
], ids=str)  # fmt: skip
def test_which_file_wins(tmp_path, files):
    """Another of a folder's templates than transformers' processor takes."""
    made = make_processor()
    made.save_pretrained(tmp_path)
    for name in files:
        old = json.loads((tmp_path / name).read_text()) if (tmp_path / name).exists() else {}
        text = PLACES[name] if isinstance(PLACES[name], str) else json.dumps(old | PLACES[name])
        (tmp_path / name).write_text(text)
    theirs = transformers.LlavaProcessor.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(conversation(True, FIRST), add_generation_prompt=True)
    ours = read_template(tmp_path)[0].partition("{answer}")[0].replace("{question}", FIRST)
    assert ours == text


@pytest.mark.parametrize("form", ["text", "list", "list without a default"])
def test_the_tokenizers_own(tmp_path, form):
    """A folder of which only the tokenizer has a template, or several of which one is the default."""
    made, jinja = make_processor(), STRINGS["mistral v0.2"]
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": jinja}]
    made.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer_config.json").read_text())
    data["chat_template"] = {"text": jinja, "list": named, "list without a default": named[:1]}[form]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(data))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    if form == "list without a default":
        with pytest.raises(ValueError):
            tokenizer.get_chat_template()
        assert read_template(tmp_path) == (None, True)
    else:
        text = tokenizer.apply_chat_template(conversation(False, FIRST), tokenize=False)
        assert read_template(tmp_path)[0].partition("{answer}")[0].replace("{question}", FIRST) == text


def test_a_model_asks_by_it(tmp_path):
    """A template that is found and not used; one that wins over himap.json's; a turn behind an answer cut or ended."""
    made = make_processor()
    save(tmp_path, make_model(made, {}, {}, {}), made)
    assert Llava.from_pretrained(tmp_path).template == TEMPLATES["vicuna_v1"]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PARTS["llava-hf"]}))
    model = Llava.from_pretrained(tmp_path)
    assert model.template == TEMPLATES["llava-hf"]
    whole = list(expected_ids(made, PARTS["llava-hf"], True, FIRST, SAID, SECOND))
    first, said = model.encode(FIRST), model.tokenizer.encode(f" {SAID}", add_special_tokens=False).ids
    model.eos_token_ids = (model.tokenizer.token_to_id("</s>"),)
    for end in ([], [*model.eos_token_ids]):
        past = Past([*first, *said, *end], [], [], len(first) + len(said) + len(end) - 1)
        assert model.encode(SECOND, past=past) == whole
    (tmp_path / "himap.json").write_text(json.dumps({"template": TEMPLATES["shapes"]}))
    assert Llava.from_pretrained(tmp_path).template == TEMPLATES["shapes"]
