"""The training of the small model: what it learns from is what it will be asked, and a killed run loses nothing."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

from himap_ref.assistant import Llava
from himap_ref.studies.questions.scenes import GRID, PATCH, make_questions, make_scene
from himap_ref.studies.weights import train
from himap_ref.studies.weights.train import Plan, Scenes

PLAN = Plan(100, ((0, 1, 2), (3, 4, 9)), batch=2)


@pytest.fixture(scope="module")
def tokenizer():
    """Of fewer questions: 4000 pictures' take seconds, and give hardly any other words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_corpus", lambda pictures, whole=train._corpus: whole(pictures // 10))
        return train.build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """With all parts of the trained one's, but narrow and shallow."""
    config = train.shapes_config(tokenizer.get_vocab_size(), tokenizer.token_to_id("<image>"))
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision, text = (replace(part, **narrow) for part in (config.vision_config, config.text_config))
    model = Llava(replace(config, vision_config=vision, text_config=text))
    train.init_weights(model, 0)
    return model


@torch.no_grad()
def test_packed_questions_are_trained_as_they_will_be_asked(model, tokenizer):
    """A question that sees its neighbour or starts at another position; a target one token off."""
    scenes, prefix = Scenes(PLAN, tokenizer, 40), torch.tensor(tokenizer.encode(train.SYSTEM).ids)
    batch = default_collate([scenes[10], scenes[11]])
    loss, hits, kinds, _ = train.answer_loss(model, batch, prefix)
    alone, weights = [], []
    for row in range(2):
        image = train.to_pixel_values(batch["pixels"][row : row + 1])
        for segment in range(1, int(batch["segment"][row].max()) + 1):
            own = batch["segment"][row] == segment
            if not own.any():  # a question for which there was no room
                continue
            words = torch.full((model.config.num_image_tokens,), model.config.image_token_index)
            ids = torch.cat((prefix, words, batch["ids"][row][own]))
            out = model(ids[None], image, all_rows=True)
            logits, target = model.language_model.logits(out.hidden[0, -own.sum() :]), batch["target"][row][own]
            alone.append(F.cross_entropy(logits, target, reduction="none")[target >= 0])
            weights.append(batch["weight"][row][own][target >= 0])
    weight = torch.cat(weights)
    torch.testing.assert_close(loss, (torch.cat(alone) * weight).sum() / weight.sum())
    assert len(weight) == len(hits) == len(kinds) and weight.unique().tolist() == [1, train.SLOW_WEIGHT]


def test_packed_text_is_the_prompt(tokenizer):
    """Questions cut off at a block's end, answers without their end, words that inference writes otherwise."""
    scenes, eos = Scenes(PLAN, tokenizer, 40), tokenizer.token_to_id("</s>")
    for index in range(20):
        scene = make_scene(PLAN.seed + index, *PLAN.things(index))
        asked = make_questions(scene, train.QUESTIONS, kinds=PLAN.kinds(index))
        item = scenes[index]
        assert (item["target"][item["segment"] == 0] == -100).all()
        for segment in {*item["segment"].tolist()} - {0}:
            own, question = (item["segment"] == segment).nonzero().flatten(), asked[segment - 1]
            assert tokenizer.decode(item["ids"][own].tolist()) == f"\n{question.text} ASSISTANT: {question.answer}"
            assert item["place"][own].tolist() == list(range(len(own))) and own[-1] // 58 == own[0] // 58
            target = item["target"][own]
            answer = tokenizer.encode(f" {question.answer}", add_special_tokens=False).ids
            assert target[target >= 0].tolist() == [*answer, eos]
            assert item["ids"][own][-len(answer) :].tolist() == answer
    assert [PLAN.things(index) for index in (0, 5, 6, 39)] == [(2, 1), (2, 1), (9, 4), (9, 4)]


def test_patch_words_are_those_of_the_thing_there():
    """Rows and columns exchanged; a thing counted twice, or never; digits in another order, or beside the number."""
    for seed in range(30):
        scene = make_scene(seed)
        words = train.patch_words(scene)
        for thing in scene.things:
            own = words[list(thing.patches)]
            names = [group[i] for group, i in zip(train.WORDS[:4], own[0, :4].tolist(), strict=True)]
            assert " ".join(names) == f"{thing.color} {thing.shape} {thing.place}" and (own[:, :4] == own[0, :4]).all()
            counted = torch.tensor(thing.patches)[own[:, 4] == 0].tolist()
            x, y = ((thing.box[side] + thing.box[side + 2]) / 2 for side in (0, 1))
            near = {int((y + dy) // PATCH) * GRID + int((x + dx) // PATCH) for dx in (-1, 1) for dy in (-1, 1)}
            assert len(counted) == 1 and counted[0] in near  # the patch at its centre
        shown = {patch for thing in scene.things for patch in thing.patches}
        assert (words[[patch for patch in range(GRID * GRID) if patch not in shown], :5] == -100).all()
        digits = words[words[:, 5] >= 0, 5].tolist()  # row by row: from left to right
        assert "".join(map(str, digits)) == (scene.number.digits if scene.number else "")
        assert not scene.number or {*(words[:, 5] >= 0).nonzero().flatten().tolist()} <= {*scene.number.patches}


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 24, 40), (1, 16, 16)])
def test_orthogonalize_against_svd(shape):
    """Singular values that are left as they were; rows and columns exchanged."""
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, _, V = torch.linalg.svd(given, full_matrices=False)
    found, nearest = train.orthogonalize(given), U @ V
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.5 and singular.max() < 1.4  # Muon's five steps: near 1, not at it
    assert F.cosine_similarity(found.flatten(1), nearest.flatten(1)).min() > 0.95


def test_killed_and_resumed_equals_undisturbed(command, monkeypatch, tmp_path, tokenizer, model):
    """Scenes seen twice or left out, momentum lost, the rate's place forgotten; what it says of unseen scenes."""
    quick = {"BATCH": 2, "SAVE_EVERY": 1, "CHECKED": 2, "build_tokenizer": lambda: tokenizer,
             "shapes_config": lambda *_: model.config}  # fmt: skip
    for name, value in quick.items():
        monkeypatch.setattr(train, name, value)

    def run(folder):
        words = "--out", folder / "out", "--state", folder / "state.pt", "--no-compile", "--no-bf16"
        return command(train.main, "train", "--align-steps", 2, "--steps", 3, *words)[1]

    told = [json.loads(line) for line in run(tmp_path / "whole").splitlines()]
    assert [line["step"] for line in told] == [1, 2, 3] and set(told[0]["unseen"]) == set(train.KINDS)

    def kill(*_):
        if kill.at == 0:
            raise KeyboardInterrupt
        kill.at -= 1

    monkeypatch.setattr(train, "evaluate", kill)
    for kill.at in (0, 1):  # after the first step, and then after the third
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed")
        monkeypatch.delattr(train, "build_tokenizer", raising=False)  # another one would give words other ids
    run(tmp_path / "killed")
    whole, resumed = (Llava.from_pretrained(tmp_path / name / "out").state_dict() for name in ("whole", "killed"))
    for (name, a), b in zip(whole.items(), resumed.values(), strict=True):
        assert torch.equal(a, b), name
