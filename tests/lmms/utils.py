"""What scenes.yaml asks: every scene six questions, with the placeholder that many tasks put before theirs."""

from datasets import Dataset

from himap_ref.studies.questions.drawing import draw
from himap_ref.studies.questions.scenes import make_questions, make_scene


def ask(seeds: Dataset) -> Dataset:
    """Documents with a seed -> documents with a seed, a question and its answer."""
    return Dataset.from_list([
        {"seed": seed, "question": f"<image>\n{question.text}", "answer": question.answer}
        for seed in seeds["seed"]
        for question in make_questions(make_scene(seed), 6)
    ])  # fmt: skip


def show(document: dict) -> list:
    return [draw(make_scene(document["seed"]))]
