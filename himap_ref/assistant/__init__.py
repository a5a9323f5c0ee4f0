"""A LLaVA that can be asked: pictures and words in, answers out, with what each of them cost.
Questions about one picture may follow each other; a batch may hold questions of any lengths."""

from .answer import Answer, Flops, Past
from .llava import Llava

__all__ = ["Answer", "Flops", "Llava", "Past"]
