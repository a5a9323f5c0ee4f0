"""Chat templates of the known families, recognised by what they write. They are a stranger's programs: none is run."""

import re
from pathlib import Path

from ..checkpoint.template import read_chat_template

# The families in outline (see `outline_of`). START: what comes only of a system message, and nobody gives one here.
START, TEXT, BOS = r"(?:~|@var|@text\s*)*", r"(?:(?:@text|@var)~*)+", r"(?:@bos|<s>|<\|begin_of_text\|>)"
ASK, END = rf"~*(?P<image>(?:<image>\s*)?)~*{TEXT}", r"(?P<end>[^~@]*(?:@eos)?[^~@]*)"
FAMILIES = [f"{START}{BOS}??{START}{family}~*" for family in (
    # LLaMA-3
    rf"(?P<user><\|start_header_id\|>@role<\|end_header_id\|>\s*){ASK}(?P<close><\|eot_id\|>\s*)(?:~|@bos|@var)*"
    r"(?P<role><\|start_header_id\|>assistant<\|end_header_id\|>\s*)",
    # llava-hf
    rf"(?P<user>@role@upper: ?){ASK}(?P<close>\s*)(?:~+{TEXT}(?P=close))?~+(?P<role>ASSISTANT: ?)",
    # Vicuna v1: any system prompt
    rf"(?P<system>[^~@]*)~*{BOS}?(?:@var(?P<gap>\s*))?~*(?P<user>\s*USER: ?){ASK}(?P<close>\s*)~+"
    rf"\s*ASSISTANT: ?~*{TEXT}{END}~+(?P<role>\s*ASSISTANT: ?)",
    # Mistral, LLaMA-2
    r"(?:<<SYS>>\n@text\n<</SYS>>\n\n~+|\s*\[INST\] @var\s+@text ?\[/INST\]~+)?"
    rf"(?P<user>\s*(?:@bos)?\[INST\] ?){ASK}(?P<close> ?\[/INST\])~+\s*{TEXT}{END}",
)]  # fmt: skip

STRING_OR_NAME = r"""(?s)(['"])((?:\\.|(?!\1).)*)\1|([.|]?)\s*([A-Za-z_]\w*)(?=\s*([.(\[]?))|([^\s+|()\[\].\d:~])"""
NAMES = {
    ".content": "@text", ".text": "@text", ".role": "@role", ".upper": "@upper", "|upper": "@upper", ".strip": "",
    "|trim": "", "bos_token": "@bos", "eos_token": "@eos", "if": "@?", "else": "@?", "or": "@?", "and": "@?",
}  # fmt: skip
TAGS = {"generation": "", "endgeneration": "", **dict.fromkeys(("if", "elif", "else", "endif", "for", "endfor"), "~")}


def read_template(folder: Path) -> tuple[str | None, bool]:
    """The folder's, as `prompt.split` takes it, None if it is of no family; and whether the folder has one at all."""
    jinja, tokens = read_chat_template(folder)
    return (None, False) if jinja is None else (recognise(jinja, tokens), True)


def recognise(jinja: str, tokens: dict[str, str]) -> str | None:
    """A chat template in our own form. tokens: {"bos": "<s>", "eos": "</s>"}."""
    outline = outline_of(jinja) if len(jinja) < 5000 else "@?"  # the families' are shorter
    match = next(filter(None, (re.fullmatch(family, outline) for family in FAMILIES)), None)
    if not match or not is_always_said(jinja, match.groupdict("").get("system", "")):
        return None
    part = {"system": "", "gap": "", "role": "", "end": match["close"], **match.groupdict("")}
    turn, bos = "{question}" + part["close"] + part["role"], re.search(BOS, outline)
    text = (bos[0] if bos else "") + part["system"] + part["gap"] + part["user"] + (part["image"] or "<image>\n") + turn
    text += "{answer}" + part["end"] + part["user"] + turn
    for name, word in {"@bos": tokens.get("bos", ""), "@eos": tokens.get("eos", ""), "@role@upper": "USER",
                       "@role": "user"}.items():  # fmt: skip
        text = text.replace(name, word)
    return text if [text.count(place) for place in ("<image>", "{question}", "{answer}")] == [1, 2, 1] else None


def is_always_said(jinja: str, text: str) -> bool:
    """Whether a system prompt stands outside of all branches or in an `else`, as nobody gives a system message or tools
    here; in a variable, whether that is used."""
    if not (begin := re.split(r"[\\\n'\"]", text.strip())[0]):
        return not text.strip()
    before, found, _ = jinja.partition(begin)
    branches: list[str] = []
    for word in re.findall(r"\{%-?\s*(if|elif|else|endif|for|endfor)\b", before):
        branches = branches[:-1] if word not in ("if", "for") else branches
        branches += [] if word.startswith("end") else [word]
    variable = re.search(r"\{%-?\s*set\s+(\w+)\s*=\s*['\"]\s*$", before)
    is_used = not variable or re.search(rf"\b(?<!set ){variable[1]}\b(?!\s*=[^=])", jinja)
    return bool(found and is_used and all(branch in ("else", "for") for branch in branches))


def outline_of(jinja: str) -> str:
    """What it writes: "~" between branches, "@text", "@role" and the like from messages, "@?" for what is not known."""
    text = re.sub(r"\{#(-?).*?(-?)#\}", r"{%\1 generation \2%}", jinja.removesuffix("\n"), flags=re.DOTALL)
    text = re.sub(r"^[ \t]+(?=\{%)|(?<=%\})\n", "", text, flags=re.MULTILINE)  # as transformers sets Jinja up
    text, outline = re.sub(r"\s*(\{[%{])-|-([%}]\})\s*", r"\1\2", text), ""
    for part in re.split(r"(\{[{%].*?[%}]\})", text, flags=re.DOTALL):
        word, _, rest = part[2:-2].strip().partition(" ")
        if not part.startswith(("{{", "{%")):
            outline += _plain(part)
        elif part.startswith("{%") and word != "set":
            outline += TAGS.get(word, "@?")
        elif "raise_exception(" not in part:
            expression = rest.partition("=")[2] if word == "set" else part[2:-2]
            expression = re.sub(r"\[\s*(['\"])(\w+)\1\s*\]", r".\2", expression)  # ["role"] is .role
            outline += "@?" if re.search(r"(?<!messages)\[[^\]'\"]*:", expression) else ""  # a part of what was said
            for quote, string, before, name, after, other in re.findall(STRING_OR_NAME, expression):
                variable = "@?" if before or after == "(" else "" if after else "@var"
                string = string.encode("ascii", "backslashreplace").decode("unicode-escape", "replace")  # as Jinja
                outline += _plain(string) if quote else "@?" if other else NAMES.get(before + name, variable)
    return re.sub("(@text)+", "@text", outline)


def _plain(text: str) -> str:
    """What would be taken for a sign of ours is not understood."""
    return re.sub("[@~{}\ufffd]", "@?", text)
