"""Metrics against cases worked by hand, and against what the official evaluations say of the same answers."""

import math
import random
import shutil
import sys
from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from himap_ref import HimapError
from himap_ref.studies.accuracy.metrics import METRICS, bootstrap, choice_letter, normalize, paired, says_yes, wilson
from himap_ref.studies.accuracy.metrics import scienceqa_letter as llava_letter
from himap_ref.studies.questions.examples import Example
from himap_ref.studies.questions.labels import options_of


def example(*answers, question="Which?"):
    return Example("q1", question, answers, "", Path("a.png"))


def score(metric, answer, *answers, question="Which?"):
    return METRICS[metric].score(answer, example(*answers, question=question))


def test_every_metric_by_its_name():
    """A metric under another's name, or one without any figure; a division by zero when no question could be asked."""
    assert list(METRICS) == ["letter", "scienceqa", "choice", "exact", "vqa", "pope", "cider"]
    assert [name for name, metric in METRICS.items() if metric.score is None] == ["cider"]
    for name, metric in METRICS.items():
        assert metric.name == name and metric.about
        with pytest.raises(HimapError, match=f"{name}: there are no answers"):
            metric.summary([])


@pytest.mark.parametrize("name", ["letter", "exact"])
def test_exact(name):
    """Kinder than the official code, which counts "B." and "b" as wrong."""
    assert score(name, " B\n", "B") == 1
    assert [score(name, answer, "B") for answer in ("B.", "b", "B. Rhode Island", "A", "")] == [0] * 5
    assert score(name, "top left", "left", "top left") == 1
    assert METRICS[name].summary([("B", example("B")), ("A", example("B"))]) == {"accuracy": 0.5}


WHERE = "Which colony?\nA. Maine\nB. Rhode Island\nC. Iowa"


LETTERS = {  # (LLaVA's rule, any form): the answers read so
    ("B", "B"): ["B", " B\n", "B. Rhode Island", "The answer is B.", "It is small. The answer is B. So there."],
    ("", "B"): ["The answer is B", "B.", "(B)", "**B**", "b", "B) Rhode Island", "(B) Maine", "B: Rhode Island",
                "**B.** Rhode Island", "The answer is (B).", "Answer: B", "the correct option is B", "\\boxed{B}",
                "Rhode Island", "rhode island."],
    ("A", ""): ["The answer is A or B", "The answer is A cat"],
    ("D", ""): ["D. Ohio"],  # LLaVA knows A to E; there are three
    ("", ""): ["The answer is A. No, The answer is B.",  # LLaVA's rule wants one
               "Neither A nor B", "A and B", "A cat", "I think so", "B-movies", "", "F. Ohio", "The answer is red",
               "Nobody can answer A question"],
}  # fmt: skip


@pytest.mark.parametrize("answer, llava, any_form", [(a, *read) for read, every in LETTERS.items() for a in every])
def test_letters(answer, llava, any_form):
    """An answer read otherwise than by LLaVA's evaluation; a letter seen where there is none, or two."""
    assert llava_letter(answer) == llava
    assert choice_letter(answer, options_of(WHERE)) == any_form and choice_letter("red", ("red", "Red.")) == ""
    for name, letter in (("scienceqa", llava), ("choice", any_form)):
        assert [score(name, answer, right, question=WHERE) for right in "ABC"] == [letter == x for x in "ABC"]


@pytest.mark.parametrize("right", ["B", "(B)", "B.", "b", "B. Rhode Island", "Rhode Island", "The answer is B."])
def test_labels_of_letters(right):
    """A model that is right and judged wrong for how the file writes its label."""
    for name in ("scienceqa", "choice"):
        METRICS[name].check([example(right, question=WHERE)])
        assert [score(name, answer, right, question=WHERE) for answer in "ABC"] == [0, 1, 0]


def test_letters_need_letters():
    """Everything judged wrong in silence, because no label is a letter."""
    for name, question, right in (("scienceqa", WHERE, "Ohio"), ("choice", WHERE, "D"), ("choice", "Which?", "red"),
                                  ("letter", WHERE, "(B)"), ("letter", WHERE, "Rhode Island")):  # fmt: skip
        with pytest.raises(HimapError, match="right answer of q1.*no (capital )?letter"):
            METRICS[name].check([example("B", question=WHERE), example(right, question=question)])
    METRICS["letter"].check([example("B", question=WHERE)])


OPTIONS = {
    WHERE: ("Maine", "Rhode Island", "Iowa"), "A) 1\nB) 2\nC) 3": ("1", "2", "3"),
    "Which?\n(A) red\n (B)  dark blue \nAnswer.": ("red", "dark blue"),
    "Which? Options: (A) red (B) dark blue": ("red", "dark blue"),
    "Which?\nA. red": (), "Which?\nB. red\nC. blue": (), "Is vitamin A. good?": (), "Which?": (),
}  # fmt: skip


@pytest.mark.parametrize("question, options", OPTIONS.items())
def test_options_of(question, options):
    """An index or an option's text that stands for another letter."""
    assert options_of(question) == options


NORMALIZED = {
    "The Red, white  and a blue.": "red white and blue",  # articles, a comma before a blank, a full stop
    "black/white": "black white",  # no blank beside the mark: a blank takes its place
    "black / white-ish": "black white ish",  # each mark by itself
    "1,000 t-shirts": "1000 tshirts",  # a comma between digits: every mark is closed up
    "couldntve couldnt've couldn'tve": "couldntve couldn't've couldn't've",  # one apostrophe may be missing
    "t-shirt-\nblue": "tshirt blue",  # a line break is a blank, and a mark beside one closes up everywhere
    "x-y/-z": "x y z",  # beside a blank that was there, not beside one that replaced a mark
    "x-y -z": "xy z", "1.5 U.S. miles.": "1.5 us miles", "None": "0", "Ten dont": "10 don't", "the dog's": "dog's",
    "yes\nno\tyes": "yes no yes", "a": "",
}  # fmt: skip


@pytest.mark.parametrize("answer, expected", NORMALIZED.items())
def test_normalize(answer, expected):
    """A rule of the official normalisation left out, or applied in another order."""
    assert normalize(answer) == expected


@pytest.mark.parametrize("agree, expected", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_of_ten(agree, expected):
    """min(n / 3, 1) without the averaging: 1/3, 2/3, 1 for one, two and three agreeing people."""
    # by hand for two: eight times one of the others is left out, 2/3 each; twice one of the two, 1/3 each: 0.6
    answers = ["Two"] * agree + ["dog"] * (10 - agree)
    assert score("vqa", "2.", *answers) == pytest.approx(expected)


def test_vqa_of_any_number():
    """The closed form at odds with leaving each out; one answer worth nothing; five that are not as if given twice."""
    rng = random.Random(0)
    for _ in range(200):
        answers = rng.choices("xyz", k=rng.randint(10, 12))
        rest = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
        expected = mean(min(others.count("x") / 3, 1) for others in rest)
        assert score("vqa", "x", *answers) == pytest.approx(expected)
    assert score("vqa", "cat", "cat") == 1 and score("vqa", "dog", "cat") == 0
    for agree in range(6):
        five = ["x"] * agree + ["y"] * (5 - agree)
        assert score("vqa", "x", *five) == pytest.approx(score("vqa", "x", *five, *five))
    ten = example(*["x"] * 2, *["y"] * 8)
    assert METRICS["vqa"].summary([("x", ten), ("y", ten), ("z", ten)])["accuracy"] == pytest.approx((0.6 + 1) / 3)


SAYS_YES = {
    "Yes": True, "no": False, "No, there is none.": False, "There is not a dog. Yes.": False, " No\n": False, "": True,
    "Yes. There is no doubt.": True,  # the second sentence does not count
    "Nothing of the kind": True,  # whole words only
    "NO": True,  # as eval_pope.py has it: three spellings
}  # fmt: skip


@pytest.mark.parametrize("answer, expected", SAYS_YES.items())
def test_says_yes(answer, expected):
    """An answer read otherwise than by eval_pope.py."""
    assert says_yes(answer) is expected


def test_pope_figures():
    """Precision and recall exchanged, or the wrong class positive; a division by zero if nobody says yes, or all do."""
    cells = (("Yes", "yes", 3), ("Yes", "no", 1), ("No", "yes", 2), ("No", "no", 4))
    answered = [(said, example(true)) for said, true, n in cells for _ in range(n)]
    figures = METRICS["pope"].summary(answered)  # by hand: 7/10, 3/4, 3/5
    assert figures == pytest.approx({"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "f1": 2 / 3, "yes_share": 0.4})
    assert list(figures)[0] == "accuracy" and sum(METRICS["pope"].score(*pair) for pair in answered) == 7
    for said, true in (("no", "no"), ("no", "yes"), ("yes", "no")):
        figures = METRICS["pope"].summary([(said, example(true))])
        assert figures["precision"] == figures["recall"] == figures["f1"] == 0 and figures["accuracy"] == (said == true)


def test_pope_needs_yes_or_no():
    """Letters or words judged as if they were "yes", as eval_pope.py does."""
    assert score("pope", "No", "No ") == 1
    for judge in (METRICS["pope"].score, lambda answer, e: METRICS["pope"].summary([(answer, e)])):
        with pytest.raises(HimapError, match="q1 is 'b', not yes or no"):
            judge("yes", example("B"))


CAPTIONS = [
    ("a red dog", ("A red dog.", "The dog is red!")),
    ("two\u2028cats\non a mat", ("Two cats, on a mat", "cats sleeping")),  # a line break within the answer
    ("", ("A plate of food",)),
]


def cider_by_the_formula(answered):
    """Vedantam et al. 2015, section 4 and CIDEr-D, sigma 6 and lengths in bigrams as the code has them."""

    def grams(text, n):
        words = text.lower().translate(str.maketrans("", "", ".,!")).split()
        return Counter(zip(*(words[i:] for i in range(n)), strict=False))

    def one(answer, references, n):
        used = [gram for text in (answer, *references) for gram in grams(text, n)]
        pictures = {gram: sum(any(gram in grams(r, n) for r in rs) for _, rs in answered) for gram in used}
        idf = {gram: math.log(len(answered) / max(1, number)) for gram, number in pictures.items()}
        total = 0
        for reference in references:
            x, y = ({gram: count * idf[gram] for gram, count in grams(t, n).items()} for t in (answer, reference))
            norm = math.hypot(*x.values()) * math.hypot(*y.values())
            apart = sum(grams(answer, 2).values()) - sum(grams(reference, 2).values())
            dot = sum(min(x[gram], y[gram]) * y[gram] for gram in x.keys() & y.keys())
            total += math.exp(-(apart**2) / 72) * dot / norm if norm else 0
        return 10 * total / len(references)

    return sum(one(a, rs, n) / 4 for a, rs in answered for n in (1, 2, 3, 4)) / len(answered)


def test_cider(capfd):
    """References and answers exchanged or shifted by a line, a length or scale of another variant of CIDEr."""
    pytest.importorskip("pycocoevalcap", reason="pip install 'himap-ref[captions]'")
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    figures = METRICS["cider"].summary([(answer, example(*references)) for answer, references in CAPTIONS])
    assert figures == pytest.approx({"cider": cider_by_the_formula(CAPTIONS)}, abs=1e-9)
    assert figures["cider"] > 1


@pytest.mark.parametrize("java, message", [("", "needs Java"), ("#!/bin/sh\necho a\n", "lost lines")])
def test_cider_of_a_broken_java(monkeypatch, tmp_path, capfd, java, message):
    """A traceback, another tokeniser's figures, or captions compared with those of other pictures."""
    pytest.importorskip("pycocoevalcap", reason="pip install 'himap-ref[captions]'")
    if java:  # one that stops in the middle
        (tmp_path / "java").write_text(java)
        (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HimapError, match=message):
        METRICS["cider"].summary([("a", example("a")), ("b", example("b"))])


def test_cider_without_the_library(monkeypatch):
    """A traceback instead of what to install."""
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(HimapError, match=r"himap-ref\[captions\]"):
        METRICS["cider"].summary([("a", example("a"))])


def test_wilson():
    """The plain normal interval, which says nothing at 0 and 1."""
    # by hand: z^2 = 3.8416, middle 0.69208 / 1.38416 = 0.5, half sqrt(0.025 + 0.0096) * 1.96 / 1.38416 = 0.2634
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((20 / 23.8416, 1))


def test_bootstrap():
    """An interval of single scores instead of their mean; another one at every call."""
    scores = [0.0, 0.3, 0.6, 0.9, 1.0] * 80  # their standard deviation is 0.3720: 0.56 -+ 1.96 * 0.3720 / 20
    low, high = bootstrap(scores)
    assert (low, high) == pytest.approx((0.5235, 0.5965), abs=0.004)
    assert bootstrap(scores) == (low, high) != bootstrap(scores, seed=1)
    assert bootstrap([0.3] * 5) == pytest.approx((0.3, 0.3))


def test_paired():
    """Lost and won exchanged, or a one-sided test; powers beyond the floats; other questions compared; 0 / 0."""
    a, b = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]
    assert paired(a, b) == pytest.approx({"agreement": 0.5, "lost": 1, "won": 5, "p": 2 * (1 + 6) / 2**6})  # 1 of 6
    assert paired([True, False], [True, False]) == {"agreement": 1, "lost": 0, "won": 0, "p": 1}
    assert paired([True, False], [False, True])["p"] == 1  # twice 3/4 would be more than certain
    many = paired([True] * 1000 + [False] * 1100, [False] * 1000 + [True] * 1100)  # 50 off, half a flip less
    assert many["p"] == pytest.approx(math.erfc(99 / math.sqrt(2 * 2100)), abs=1e-4)  # by the normal curve
    for shorter, longer in (([], []), ([True], [True, False])):
        with pytest.raises(HimapError, match="cannot be paired"):
            paired(shorter, longer)
