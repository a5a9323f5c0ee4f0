"""How strong the tests are: mutmut puts bugs into the core, one at a time, and a test must find each.

    python tests/mutants.py [N] [SEED]    N of the mutants (default 200, 0 for all) as SEED draws them

Needs `pip install -e '.[mutants]'`; pyproject.toml says which files are mutated and which tests look for it. Of those,
the ones that reach the mutated function run, the quickest first. Works on a copy. Exit code 1: one survived that is not
in EXPLAINED. mutmut leaves names, slices, constants, text of errors and dataclass fields alone.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
COPIED = ("himap_ref", "tests", "weights/shapes", "run.py", "README.md", "pyproject.toml")

# Why no test can tell a mutated line from the line that was there -> what stands in it.
EXPLAINED = {
    "float reads any case": ('float("INF")', 'float("-INF")'),
    "torch's generator on the CPU looks at the lowest 32 bits": ("(1000 * seed + N) % 2**64",),
    "slice(0, n)": ("slice(image.stop, n), slice(n)", "slice(image.stop, n), slice(0, None)"),
    "zeros of the same shape": ("zeros_like(view.hidden[:, view.image, 1])", "zeros_like(positions[:, 1])"),
    "keys and values have one shape": ("room[1][:, m : m + n].shape == k.shape",),
    "no image tokens, nothing to fill": ("words[:1] if image_embeds is None",),
    "any factor from one pivot on keeps ties apart": ("place * 3 * pivots",),
    "the last of two dimensions": (" scores.sort(dim=+1,", "order[:, :count].sort(dim=+1)", "logits.argmax(dim=+1)"),
    "as many by construction": tuple(f"zip({both}, {strict})" for strict in ("", "strict=False", "strict=None")
                                     for both in ("answers, cut", "layers, stages")),
    "as many pieces as prompts": ("zip(prompts, images, )", "zip(prompts, images, strict=False)"),
    "looks are squares": ("(self.crop_size or self.size or (0, 0))[1]",),
    "no picture, no stages: not looked at": tuple(f"return slice({of})" for of in ("n, None", "None, n", "n, ", "n")),
    "None is as false as False": ("config.vocab_size, bias=None)", "from_pretrained(vocabulary, freeze=None)"),
    "shows on a GPU only": ("torch.cat(picks).to(None)",),
    "shorter by one on purpose": ("zip(layers, layers[1:], )", "zip(layers, layers[1:], strict=None)"),
}  # fmt: skip


def mutmut(*arguments: str) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stdout[-2000:] + run.stderr[-2000:])
    return run.stdout


def mutants() -> list[str]:
    """The names of all, in the copy."""
    from mutmut.configuration import config
    from mutmut.mutation.file_mutation import mutate_file_contents

    files = {path: Path(path).read_text(encoding="utf-8") for path in config().only_mutate}
    return [f"{path[:-3].replace('/', '.')}.{name}"
            for path, code in files.items() for name in mutate_file_contents(path, code).mutant_names]  # fmt: skip


def main(number: int = 200, seed: int = 0) -> int:
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        Path(name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, name)
    path, decorated = Path("himap_ref/generation.py"), "@torch.no_grad()\ndef generate("
    head, tail = path.read_text(encoding="utf-8").split(decorated)  # mutmut passes over what is decorated
    path.write_text(f"{head}def generate({tail}\n\ngenerate = torch.no_grad()(generate)\n", encoding="utf-8")
    names = mutants()
    chosen = random.Random(seed).sample(names, number or len(names))
    mutmut("run", "--max-children", str(os.cpu_count()), *chosen)
    verdicts = dict(line.strip().rsplit(": ", 1) for line in mutmut("results").splitlines() if ": " in line)
    alive = [name for name in chosen if verdicts.get(name, "killed") not in ("killed", "timeout")]
    unexplained = 0
    for name in alive:
        old, new = (next(x[1:].strip() for x in mutmut("show", name).splitlines()[3:] if x[0] == c) for c in "-+")
        reason = next((why for why, texts in EXPLAINED.items() if any(text in new for text in texts)), None)
        unexplained += reason is None
        print(f"{name} {verdicts[name]}{f', explained: {reason}' if reason else ''}\n  - {old}\n  + {new}")
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutants found ({len(names)} in all), {unexplained} unexplained")
    return min(unexplained, 1)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        code = main(*map(int, sys.argv[1:]))
        os.chdir(ROOT)
    sys.exit(code)
