"""A folder's chat template: found where transformers finds it, and only read: what to make of it is the caller's."""

from pathlib import Path

from ..image import read_bytes
from .files import read_json


def read_chat_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """Its text, "" if it is no text, None if the folder has none; and {"bos": "<s>", "eos": "</s>"}, as far as told.

    LlavaProcessor takes the first three places, its tokenizer the last two; where there are several, "default".
    """
    tokenizer = _entries(folder, "tokenizer_config.json")
    found = [_entries(folder, name).get("chat_template") for name in ("processor_config.json", "chat_template.json")]
    if (path := folder / "chat_template.jinja").exists():
        found.append(read_bytes(path, 2**20).decode(errors="replace"))
    text = next((text for text in (*found, tokenizer.get("chat_template")) if text is not None), None)
    if isinstance(text, list):
        text = {entry.get("name"): entry.get("template") for entry in text if isinstance(entry, dict)}
    if isinstance(text, dict):
        text = text.get("default", "")
    tokens = {name: tokenizer.get(f"{name}_token") for name in ("bos", "eos")}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return text if isinstance(text, str | None) else "", {k: v for k, v in tokens.items() if isinstance(v, str)}


def _entries(folder: Path, name: str) -> dict:
    return read_json(folder / name) if (folder / name).exists() else {}
