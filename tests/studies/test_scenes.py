"""Drawn scenes: every question has its one right answer, and its target patches are where it can be seen."""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache

import pytest
import torch
from PIL import ImageChops

from himap_ref.studies.questions import scenes
from himap_ref.studies.questions.drawing import DIGITS, draw
from himap_ref.studies.questions.scenes import COLORS, GRID, PATCH, PLACES, SHAPES, TEST, make_questions, make_scene

SCENES = [make_scene(seed) for seed in range(TEST, TEST + 300)]
ASKED = [(scene, question) for scene in SCENES for question in make_questions(scene, 40)]
SHAPE, COLOR = "|".join(SHAPES), "|".join(COLORS)
PLACE = "|".join(PLACES)
BESIDE = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
NEIGHBOUR = rf"What is ({'|'.join(BESIDE)}) the ({COLOR}) ({SHAPE})\?"
MORE = rf"Are there more ({COLOR}) things or more ({COLOR}) things\?"


def seen(scene):
    """What is where, by row and column."""
    return {divmod(PLACES.index(thing.place), 3): (thing.color, thing.shape) for thing in scene.things}


def those(scene, color=None, shape=None):
    return [at for at, (c, s) in seen(scene).items() if color in (None, c) and shape in (None, s)]


def only(found):
    assert len(found) == 1, "the question has more than one answer"
    return found[0]


def place_at(text):
    return divmod(PLACES.index(text), 3)


def answer_by_hand(scene, text):
    """The answer as a reader of the question would find it; each form of question on its own, from its words alone."""
    at, counts = seen(scene), Counter(color for color, _ in seen(scene).values())
    if m := re.fullmatch(rf"What color is the ({SHAPE})\?", text):
        return at[only(those(scene, shape=m[1]))][0]
    if m := re.fullmatch(rf"What color is the thing at the ({PLACE})\?", text):
        return at[place_at(m[1])][0]
    if m := re.fullmatch(rf"What shape is the ({COLOR}) thing\?", text):
        return at[only(those(scene, color=m[1]))][1]
    if m := re.fullmatch(rf"What shape is at the ({PLACE})\?", text):
        return at[place_at(m[1])][1]
    if m := re.fullmatch(rf"Where is the (?:({COLOR}) )?({SHAPE})\?", text):
        row, column = only(those(scene, m[1], m[2]))
        return PLACES[3 * row + column]
    if m := re.fullmatch(rf"How many (?:({COLOR}) )?things are there\?", text):
        return str(len(those(scene, color=m[1])))
    if m := re.fullmatch(rf"How many ({SHAPE})e?s are there\?", text):
        return str(len(those(scene, shape=m[1])))
    if m := re.fullmatch(rf"Is there an? (?:({COLOR}) )?({SHAPE})\?", text):
        return "yes" if those(scene, m[1], m[2]) else "no"
    if m := re.fullmatch(rf"Is there anything at the ({PLACE})\?", text):
        number = {divmod(scene.number.cell, 3)} if scene.number else set()
        return "yes" if place_at(m[1]) in {*at, *number} else "no"
    if m := re.fullmatch(NEIGHBOUR, text):
        (row, column), (down, right) = only(those(scene, m[2], m[3])), BESIDE[m[1]]
        return " ".join(at[row + down, column + right])
    if text == "What number is written?":
        return scene.number.digits
    if text == "What pattern is the background?":
        return scene.background
    if m := re.fullmatch(MORE, text):
        assert counts[m[1]] != counts[m[2]]
        return max(m[1], m[2], key=counts.__getitem__)
    raise AssertionError(f"no form of question: {text}")


def test_every_answer_is_the_one_right_answer():
    """A question that fits two things, a count of the wrong ones, a neighbour on the wrong side."""
    for scene, question in ASKED:
        first, *lines = question.text.split("\n")
        expected = answer_by_hand(scene, first)
        if question.kind == "choice":
            assert lines[:4] == [f"{letter}. {text}" for letter, text in zip("ABCD", question.options, strict=True)]
            assert question.options.count(expected) == 1 and len(set(question.options)) == 4
            expected = "ABCD"[question.options.index(expected)]
        assert question.answer == expected, question


def shown(scene, text):
    """Where that can be seen which the question is about: the places of its things, by hand."""
    if m := re.search(rf"at the ({PLACE})\?", text):
        return [place_at(m[1])] if place_at(m[1]) in seen(scene) else []
    if m := re.fullmatch(MORE, text):
        return those(scene, m[1]) + those(scene, m[2])
    if m := re.fullmatch(NEIGHBOUR, text):
        (row, column), (down, right) = only(those(scene, m[2], m[3])), BESIDE[m[1]]
        return [(row, column), (row + down, column + right)]
    if text in ("What number is written?", "What pattern is the background?"):
        return []
    color, shape = (re.search(rf"\b({names})", text) for names in (COLOR, SHAPE))
    return those(scene, color and color[1], shape and shape[1])


def test_targets_are_the_patches_that_show_it():
    """Targets of another thing, of the whole cell, rows and columns exchanged: held against the pixels themselves."""
    held, total, drawn = 0, 0, cache(draw)
    for scene, question in ASKED[::7]:
        wanted = shown(scene, question.text.split("\n")[0])
        things = [thing for thing in scene.things if divmod(thing.cell, 3) in wanted]
        number = scene.number if question.kind == "reading" else None
        if question.kind == "yesno" and not things and question.answer == "yes":
            number = scene.number
        missing = tuple(thing for thing in scene.things if thing not in things)
        without = replace(scene, things=missing, number=None if number else scene.number)
        difference = ImageChops.difference(drawn(scene), drawn(without)).convert("L")
        pixels = torch.frombuffer(bytearray(difference.tobytes()), dtype=torch.uint8).view(GRID, PATCH, GRID, PATCH)
        per_patch = (pixels > 24).sum(dim=(1, 3)).flatten()  # less is another jitter of the colours
        inside = per_patch[list(question.targets)]
        assert inside.all() and len(inside) <= 4 * len(things) + 8 * bool(number)
        assert inside.sum() >= 0.45 * per_patch.sum()  # of the box a sixth: a triangle's foot may hold more of it
        total += per_patch.sum()
        held += inside.sum()
    assert held > 0.85 * total


def test_things_of_one_to_four_patches_many_alike():
    """Things so large that any spread-out choice sees them, or scenes without two of a kind."""
    sizes = Counter(len(thing.patches) for scene in SCENES for thing in scene.things)
    assert set(sizes) == {1, 2, 3, 4} and min(sizes.values()) > 50
    assert {len(scene.things) for scene in SCENES} == set(range(1, 10))
    alike = sum(max(Counter(t.color for t in s.things).values()) > 2 for s in SCENES)
    assert alike > len(SCENES) / 4
    for thing in (thing for scene in SCENES for thing in (*scene.things, scene.number) if thing):
        (x0, y0, x1, y1), (top, left) = thing.box, (56 * place for place in divmod(thing.cell, 3))
        assert left <= x0 < x1 <= left + 56 and top <= y0 < y1 <= top + 56
    assert all(len({*(t.cell for t in s.things)}) == len(s.things) for s in SCENES)


def test_no_form_of_question_gives_its_answer_away():
    """All "Is there a ...?" answered with yes, all comparisons with the colour named first, all counts with 1."""
    by_form = defaultdict(Counter)
    firsts = [{q.kind: q for q in reversed(make_questions(scene, 60))} for scene in SCENES]  # what evaluations ask
    for question in (question for by_kind in firsts for question in by_kind.values()):
        first, answer = re.sub(rf"\b({COLOR}|{SHAPE}|{PLACE})", "_", question.text.split("\n")[0]), question.answer
        if first.startswith("Are there more"):
            answer = str(question.text.index(answer) < 20)
        by_form[question.kind, first][answer] += 1
    for (kind, form), answers in by_form.items():
        most = max(answers.values()) / answers.total()
        slack = 1.5 * answers.total() ** -0.5  # three standard errors
        assert most < {"yesno": 0.5, "whole": 0.5, "count": 0.4}.get(kind, 0.25) + slack, (form, answers)
    assert {kind for kind, _ in by_form} == set(scenes.KINDS)
    counts = Counter(by_kind["count"].answer for by_kind in firsts)
    assert counts["0"] + counts["1"] < 0.3 * counts.total()
    assert {q.answer for _, q in ASKED if q.kind == "count"} == set("0123456789")
    assert {q.answer for _, q in ASKED if q.text.endswith("background?")} == set(scenes.BACKGROUNDS)


def test_a_seed_is_a_scene():
    """A picture that changes with the number of questions; two seeds alike; questions that come in another order."""
    scene = make_scene(5)
    before, many = draw(scene).tobytes(), make_questions(scene, 30)
    assert make_questions(scene, 8) == many[:8] and draw(make_scene(5)).tobytes() == before
    assert len({draw(make_scene(seed)).tobytes() for seed in range(50)}) == 50
    assert make_questions(scene, 8, seed=6) != many[:8]
    assert {q.kind for q in make_questions(scene, 30, kinds=("count", "color"))} == {"count", "color"}
    assert draw(scene).size == (GRID * PATCH, GRID * PATCH) and len(set(DIGITS)) == 10
    for none in ((-1,), (0, 0), (0, 10), (0, 2, 3)):  # random.Random(-1) is random.Random(1): two seeds, one scene
        with pytest.raises(ValueError):
            make_scene(*none)
