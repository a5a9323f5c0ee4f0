"""Metrics as the field computes them, and what tells a difference from chance.

A metric judges an answer (`score`, 0 to 1), all answers together (`summary`), or both.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch

from ...errors import HimapError
from ..questions.examples import Example
from ..questions.labels import LETTERS, options_of

Answered = Sequence[tuple[str, Example]]


@dataclass(frozen=True)
class Metric:
    """score: of one answer, None if only all together can be judged. figures: of all; by default the mean score.

    about: what counts as right, for those who read the figures. Only questions with an answer are given to it.
    """

    name: str
    about: str
    score: Callable[[str, Example], float] | None
    figures: Callable[[Answered], dict[str, float]] | None = None
    check: Callable[[Sequence[Example]], object] = lambda examples: None  # raises HimapError before hours of asking

    def summary(self, answered: Answered) -> dict[str, float]:
        """Figures by name, the first the one to quote. Raises HimapError if there is nothing to judge."""
        if not answered:
            raise HimapError(f"{self.name}: there are no answers to judge")
        if self.figures:
            return self.figures(answered)
        score: Any = self.score  # is there where `figures` is not
        return {"accuracy": mean(score(answer, example) for answer, example in answered)}


# ---------------------------------------------------------------- equal to a right answer


def exact(answer: str, example: Example) -> float:
    """1 if the answer is one of the right ones: case, full stops and all, blanks around both aside.

    The official HiMAP code judges its letters so (`outputs.strip() == label`): "B." and "B. Rhode Island" are wrong.
    """
    return float(answer.strip() in {right.strip() for right in example.answers})


# ---------------------------------------------------------------- letters


def scienceqa_letter(answer: str) -> str:
    """The letter that LLaVA reads in an answer, "" where it says FAILED: llava/eval/eval_science_qa.py as released.

    Its rule: just the letter, or "A. ...", or "The answer is A" and one more character, once.
    """
    text = answer.strip()  # as LLaVA writes its answers
    if text in tuple("ABCDE") or (text[:1] in tuple("ABCDE") and text[1:3] == ". "):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else ""


SAYS = (
    re.compile(r"\A[\W_]*([A-Za-z])[\W_]*\Z"),  # (A), **A**, a.
    re.compile(r"\A[\W_]*([A-Z])[)*]*[.:)*]+\s"),  # A) red, (A) red, A: red
    re.compile(r"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice|boxed)(?: is|:)*[\W_]*([A-Z])(?=[\W_]*\Z|[.:;,)*}])"),  # Answer: A
)


def choice_letter(answer: str, options: Sequence[str]) -> str:
    """The letter in any plain form, or that of the option which the answer spells out; "" for none."""
    for form in SAYS:
        said = {letter.upper() for letter in form.findall(answer)}
        if len(said) == 1 and said <= {*LETTERS[: len(options) or None]}:
            return said.pop()
    words = [normalize(option) for option in options]
    return LETTERS[words.index(normalize(answer))] if words.count(normalize(answer)) == 1 else ""


def right_letters(example: Example) -> set[str]:
    """Of the right answers, written as a letter in any form or as the option's text."""
    letters = {choice_letter(right, options_of(example.question)) for right in example.answers}
    if "" in letters:
        answers = " or ".join(map(repr, example.answers))
        raise HimapError(f"the right answer of {example.id}, {answers}, is no letter, nor one of its options: "
                         "choose another metric")  # fmt: skip
    return letters


def scienceqa(answer: str, example: Example) -> float:
    return float(scienceqa_letter(answer) in right_letters(example))


def choice(answer: str, example: Example) -> float:
    return float(choice_letter(answer, options_of(example.question)) in right_letters(example))


def _are_letters(examples: Sequence[Example]) -> None:
    for example in examples:
        right_letters(example)


def _bare_letters(examples: Sequence[Example]) -> None:
    """Nothing that a model says equals "(B)" or "B. red": it would all be wrong."""
    for example in examples:
        if other := next((right for right in example.answers if not re.fullmatch(r"\s*[A-Z]\s*", right)), None):
            what = f"letter: the right answer of {example.id} is {other!r}"
            raise HimapError(f"{what}, no capital letter: try choice or exact")


# ---------------------------------------------------------------- VQA accuracy

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS.split())}}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # not the full stop, which has its own rule, nor the apostrophe
CONTRACTED = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't
    shan't shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've shouldn't've wouldn't've
    could've might've must've not've should've they've we've what've where've who've would've you've
    he'd he'd've how'd it'd it'd've she'd've somebody'd've someone'd someone'd've something'd something'd've there'd
    there'd've they'd they'd've we'd've where'd who'd who'd've y'all'd've you'd you'd've
    how'll it'll somebody'll someone'll something'll they'll what'll who'll why'll y'all y'all'll you'll
    there're they're what're why're you're he's how's somebody's someone's that's there's what's when's where's who's
    why's ma'am o'clock 'twas 'ow's'at
"""
CONTRACTIONS = {  # without any one of its apostrophes -> with it
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round in the official table too


def normalize(answer: str) -> str:
    """An answer as VQA's evaluation compares it (github.com/GT-Vision-Lab/VQA, vqaEval.py).

    Marks become blanks, or nothing where one stands beside a blank or a comma parts two digits; full stops go unless a
    digit follows; then lower case, number words to digits, no articles, apostrophes put back.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    thousands, result = re.search(r"\d,\d", text), text
    for mark in PUNCTUATION:
        close_up = thousands or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if close_up else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa(answer: str, example: Example) -> float:
    """VQA accuracy (Antol et al. 2015): min(agreeing people / 3, 1), averaged over leaving each of the ten out once.

    Fewer than ten answers count as if repeated up to ten (as OK-VQA's five are): a single right one is worth 1. Always
    normalised: vqaEval.py compares as is where all ten are the same, and would call "Yes" wrong there.
    """
    right = [normalize(text) for text in example.answers]
    people = max(10, len(right))
    agree = right.count(normalize(answer)) * people / len(right)
    without_another, without_one_of_them = min(agree / 3, 1), min((agree - 1) / 3, 1)
    return ((people - agree) * without_another + agree * without_one_of_them) / people


# ---------------------------------------------------------------- POPE


def says_yes(answer: str) -> bool:
    """How LLaVA's eval_pope.py reads an answer: no if the first sentence holds "No", "no" or "not", yes otherwise."""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _is_yes(example: Example) -> bool:
    label = example.answers[0].strip().lower()
    if label not in ("yes", "no"):
        raise HimapError(f"pope: the right answer of {example.id} is {label!r}, not yes or no: choose another metric")
    return label == "yes"


def pope(answer: str, example: Example) -> float:
    return float(says_yes(answer) == _is_yes(example))


def pope_figures(answered: Answered) -> dict[str, float]:
    """Of "is it there?" (Li et al. 2023), "yes" being the positive class; 0 where a figure is undefined.

    LLaVA's tables quote F1, the mean of the random, popular and adversarial questions' own.
    """
    pairs = [(says_yes(answer), _is_yes(example)) for answer, example in answered]
    hits, said, true = (sum(column) for column in zip(*((s and t, s, t) for s, t in pairs), strict=True))
    return {
        "accuracy": mean(s == t for s, t in pairs),
        "precision": hits / said if said else 0.0,
        "recall": hits / true if true else 0.0,
        "f1": 2 * hits / (said + true) if hits else 0.0,
        "yes_share": said / len(pairs),
    }


# ---------------------------------------------------------------- captions


def _find_cider(_: object = ()) -> tuple[type, type]:
    try:
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ImportError:
        raise HimapError("cider needs pycocoevalcap: pip install 'himap-ref[captions]'") from None
    if shutil.which("java") is None:
        raise HimapError("cider needs Java for its tokeniser: install a Java runtime, 8 or newer")
    return Cider, PTBTokenizer


def cider(answered: Answered) -> dict[str, float]:
    """CIDEr-D (Vedantam et al. 2015) by pycocoevalcap, the COCO evaluation's code. It needs Java for its tokeniser.

    Scaled by 10 as everywhere, so that 1.0 is what papers print as 100. Rare words weigh more, and how rare a word is
    follows from the references of these very questions: figures compare only on the same set, and one picture alone
    scores 0.
    """
    Cider, PTBTokenizer = _find_cider()
    captions = {  # of each question the answer, then the references; one line each, because the tokeniser reads lines
        i: [{"caption": " ".join(text.split())} for text in (answer, *example.answers)]
        for i, (answer, example) in enumerate(answered)
    }
    try:
        tokens = PTBTokenizer().tokenize(captions)
    except OSError as error:  # it writes beside its own code
        raise HimapError(f"cider's tokeniser could not run ({error})") from None
    if any(len(tokens.get(i, ())) != len(lines) for i, lines in captions.items()):
        raise HimapError("cider's tokeniser lost lines: see what Java said above")
    score, _ = Cider().compute_score({i: t[1:] for i, t in tokens.items()}, {i: t[:1] for i, t in tokens.items()})
    return {"cider": float(score)}


METRICS = {
    metric.name: metric
    for metric in (
        Metric("letter", "the letter and nothing else: the official HiMAP code", exact, check=_bare_letters),
        Metric("scienceqa", "A, A. ..., The answer is A.: LLaVA's eval_science_qa.py", scienceqa, check=_are_letters),
        Metric("choice", "the letter in any form, (A) or A) ..., or its option's text", choice, check=_are_letters),
        Metric("exact", "equal to a right answer, case and full stops and all", exact),
        Metric("vqa", "VQA accuracy: agrees with three of ten people", vqa),
        Metric("pope", "no if the first sentence says so, else yes: LLaVA's eval_pope.py", pope, pope_figures,
               check=lambda examples: [_is_yes(example) for example in examples]),
        Metric("cider", "CIDEr-D by pycocoevalcap", None, cider, check=_find_cider),
    )
}


# ---------------------------------------------------------------- chance


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    p, z2 = hits / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def bootstrap(scores: Sequence[float], seed: int = 0, repeats: int = 2000) -> tuple[float, float]:
    """95 % interval of a mean of scores of any size: percentiles over samples drawn with replacement (Efron 1979)."""
    values = torch.tensor(scores, dtype=torch.float64)
    n, generator = len(values), torch.Generator().manual_seed(seed)
    means = [values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(repeats)]
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of their mean: Wilson's for hits and misses, else the bootstrap's."""
    return wilson(int(sum(scores)), len(scores)) if set(scores) <= {0, 1} else bootstrap(scores)


def cells(accuracy: float | None, interval: tuple[float, float] | None) -> list[str]:
    """Accuracy and its interval for a table; None and None: nobody has said what is right."""
    return ["no labels", ""] if accuracy is None or interval is None else [
        f"{accuracy:.1%}", "{:.1%} - {:.1%}".format(*interval)
    ]  # fmt: skip


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The same questions' scores under a and under b: how many b lost (scored lower) and won, and by what chance.

    p: the exact sign test, two-sided, for hits and misses McNemar's: that lost and won differ so much, were either as
    likely. agreement: the share that scored the same.
    """
    if len(a) != len(b) or not a:
        raise HimapError(f"{len(a)} answers cannot be paired with {len(b)}: they must be to the same questions")
    lost = sum(y < x for x, y in zip(a, b, strict=True))
    won = sum(y > x for x, y in zip(a, b, strict=True))
    flips = lost + won
    return {"agreement": 1 - flips / len(a), "lost": lost, "won": won, "p": _two_sided(min(lost, won), flips)}


def holm(ps: Sequence[float]) -> list[float]:
    """p of many tests, raised so that each says the chance of any false alarm among them (Holm 1979)."""
    raised, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, ps[i] * (len(ps) - rank)))
        raised[i] = highest
    return raised


def _two_sided(k: int, n: int) -> float:
    """Twice the chance of at most k heads in n throws, in whole numbers: floats underflow beyond 1000 throws."""
    ways = total = 1
    for i in range(k):
        ways = ways * (n - i) // (i + 1)  # n over i + 1
        total += ways
    return min(1.0, 2 * total / 2**n)
