"""How strong the tests are: bugs put into the code one at a time, and the test that must find each.

    python tests/mutants.py            every mutant against its test; exit code 1 if one survives
    python tests/mutants.py --search   every mutant against all tests of the core: which finds it first?

Runs on copies; the checkout is not touched. `test_mutants.py` holds the list against the code by default.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
CORE_TESTS = [f"tests/test_{name}.py" for name in (
    "pruning", "official", "prefix", "generation", "flops", "model", "prompt", "embedded", "methods", "numerics",
)]  # fmt: skip
FOUND, SURVIVED = 1, 0  # pytest's exit codes; any other says that nothing was tested

# (file, what stands there once, what the mutant has instead, the test that finds it)
MUTANTS = [
    # the loop
    ("decoder.py", "stage_at.get(i + 1)", "stage_at.get(i)", "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "kept = candidates.gather(1, places)", "kept = places", "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "candidates, scores, kept))", "candidates, scores, places))",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "rows_of(places, image,", "rows_of(kept, image,", "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "hidden.take_along_dim(left[:, p:, None]", "hidden.take_along_dim(left[:1, p:, None]",
     "test_pruning.py::test_batch_is_one_by_one"),
    ("decoder.py", "q = hidden.take_along_dim(left[:, p:", "q = hidden.take_along_dim(left[:, : left.shape[1] - p",
     "test_prefix.py::test_same_as_without"),
    ("decoder.py", "image = kept, slice(image.start, image.start + kept.shape[1])", "image = kept, image",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "if rows in (1, keys) else causal_mask(", "if True else causal_mask(",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "causal_mask(positions[:, -rows:], entered)", "causal_mask(positions[:, :rows], entered)",
     "test_prefix.py::test_same_as_without"),
    ("decoder.py", "if i == len(self.layers) - 1 and not all_rows:", "if i == len(self.layers) - 1:",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "x, h = x[:, -1:], h[:, -1:]", "x, h = x[:, :1], h[:, :1]",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "x = x + layer.self_attn.attend(q, k, v, mask)", "x = layer.self_attn.attend(q, k, v, mask)",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "self.logits(hidden[:, -1]), hidden", "self.logits(x[:, -1]), hidden",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "up_proj(x))\n", "gate_proj(x))\n", "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "mask is None and q.shape[2] > 1,", "False,", "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "if stages and stop == n:", "if stages and stop > n:", "test_pruning.py::test_span_is_checked"),
    ("decoder.py", "if not 0 <= start < stop <= n:", "if not 0 <= start <= stop:",
     "test_pruning.py::test_span_is_checked"),
    # scores, and what they choose
    ("pruning.py", "view.attention(view.text, view.image).sum", "view.attention(view.last, view.image).sum",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "view.attention(view.image, view.image).sum", "view.attention(view.all, view.image).sum",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "[..., columns].mean(dim=1)", "[..., columns].amax(dim=1)",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "scores.softmax(dim=-1)", "scores[..., self.image].softmax(dim=-1)",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "(q * c**-0.5)", "(q * 1.0)", "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "scores.view(B, h, r, -1).float()", "scores.view(B, h, r, -1)",
     "test_numerics.py::test_scores_are_fp32"),
    ("pruning.py", "masked_fill(~visible", "masked_fill(~visible & False", "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "k_positions[:, None, :])[:, None]", "k_positions[:, None, :] + 1)[:, None]",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "slice(image.stop, n)\n", "slice(image.stop, n - 1)\n", "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "slice(n - 1, n)", "slice(n - 2, n)", "test_pruning.py::test_score_functions"),
    ("pruning.py", "descending=True", "descending=False", "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "stable=True", "stable=False", "test_pruning.py::test_ties_go_to_the_lower_place"),
    ("pruning.py", "order[:, :count].sort(dim=-1).values", "order[:, :count]",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "row[:, : image.start], places + image.start", "row[:, : image.start], places",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "_queries_at(places + self.image.start)", "_queries_at(places)",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "image.take_along_dim(places[:, None, :, None], dim=2)", "image[:, :, : places.shape[1]]",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "if first <= start and stop <=", "if first <= start or stop <=",
     "test_pruning.py::test_dropping_is_hiding"),
    ("pruning.py", "int(self.keep * entering + 0.5)", "int(self.keep * entering)", "test_pruning.py::test_keep_count"),
    ("pruning.py", "if keep > entering:", "if keep > entering + 1:",
     "test_pruning.py::test_keeping_more_than_there_are"),
    ("pruning.py", "if any(b <= a for", "if any(b < a for", "test_pruning.py::test_schedule_is_checked"),
    ("pruning.py", "layers[-1] >= num_layers", "layers[-1] > num_layers", "test_pruning.py::test_schedule_is_checked"),
    ("pruning.py", "if not is_finite:", "if not is_finite and False:",
     "test_pruning.py::test_scores_that_are_not_numbers"),
    # positions
    ("decoder.py", "positions = positions.gather(1, left)", "positions = positions[:, : left.shape[1]]",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "rope(positions[:, -1:], self.config", "rope(positions[:, :1], self.config",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "rope(positions.gather(1, rows), self.config", "rope(rows, self.config",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "(torch.arange(0, c, 2, device", "(torch.arange(2, c + 2, 2, device",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "torch.cat((angles, angles), dim=-1)", "angles.repeat_interleave(2, dim=-1)",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "torch.cat((-x2, x1), dim=-1)", "torch.cat((x2, -x1), dim=-1)",
     "test_pruning.py::test_dropping_is_hiding"),
    ("decoder.py", "torch.full((1, 1), position,", "torch.full((1, 1), cache[-1].k.shape[2],",
     "test_pruning.py::test_decoding_after_pruning_is_hiding"),
    ("generation.py", "decoder.decode(token, n + step,", "decoder.decode(token, n + step + 1,",
     "test_official.py::test_cached_generates_reference_tokens"),
    ("prompt.py", "return (places[0], places[-1] + 1)", "return (places[0], places[-1])",
     "test_prefix.py::test_answers_are_the_same"),
    # the cache and the prefix
    ("decoder.py", "start, stop = self.k.shape[2], self.k", "start, stop = self.k.shape[2] - 1, self.k",
     "test_pruning.py::test_decoding_after_pruning_is_hiding"),
    ("decoder.py", "(0, 0, 0, k.shape[2] + self.ROOM)", "(0, 0, 0, self.ROOM - 1)",
     "test_generation.py::test_step_logits_do_not_depend_on_the_cache"),
    ("decoder.py", "for x in (self.k, self.v)]", "for x in (self.k, self.k)]",
     "test_pruning.py::test_decoding_after_pruning_is_hiding"),
    ("decoder.py", "torch.cat((first.expand", "torch.cat((0 * first.expand", "test_prefix.py::test_same_as_without"),
    ("decoder.py", "hidden = in_front(prefix.x[i], x", "hidden = in_front(prefix.x[0], x",
     "test_prefix.py::test_same_as_without"),
    ("decoder.py", "rope(torch.arange(p, device=x.device)[None]", "rope(torch.arange(1, p + 1, device=x.device)[None]",
     "test_prefix.py::test_same_as_without"),
    ("decoder.py", "if p and p > (image_span[0] if", "if p and p > 99 + (image_span[0] if",
     "test_prefix.py::test_prefix_must_end_before_the_image"),
    ("model.py", "p.ids[: len(ids)] == ids for p", "p.ids for p", "test_prefix.py::test_other_prompts_do_not_use_it"),
    ("generation.py", "embeds = torch.cat((embeds, token), dim=1)", "embeds = torch.cat((token, embeds), dim=1)",
     "test_official.py::test_reprune_generates_official_tokens"),
    ("generation.py", "done[b] = token_id in eos_token_ids", "done[b] = False",
     "test_generation.py::test_batch_is_one_by_one"),
    ("generation.py", "limit = min(max_new_tokens, room + 1)", "limit = min(max_new_tokens, room + 2)",
     "test_generation.py::test_context"),
    ("generation.py", "if not torch.isfinite(logits).all():", "if False:",
     "test_generation.py::test_damaged_weights_are_reported"),
    # the counter
    ("pruning.py", "self.q_rows += rows.shape[1]", "self.q_rows = rows.shape[1]", "test_pruning.py::test_trace"),
    ("pruning.py", "self.score_rows += q.shape[2]", "self.score_rows = q.shape[2]",
     "test_pruning.py::test_attention_by_row_and_column"),
    ("decoder.py", "q_rows, score_rows = view.q_rows, view.score_rows", "q_rows, score_rows = kv_rows, view.score_rows",
     "test_pruning.py::test_trace"),
    ("decoder.py", "LayerTrace(kv_rows, q_rows, score_rows, rows, keys)",
     "LayerTrace(keys, q_rows, score_rows, rows, keys)", "test_prefix.py::test_flops"),
    ("decoder.py", "rows=1, keys=k.shape[2]))", "rows=1, keys=cache[0].k.shape[2]))",
     "test_flops.py::test_equal_to_torchs_counter"),
    ("decoder.py", "LayerTrace(kv=p, q=0, score_rows=0, rows=0, keys=p)",
     "LayerTrace(kv=p, q=p, score_rows=0, rows=p, keys=p)", "test_prefix.py::test_flops"),
    ("flops.py", "patches + config.vision_layers_used * layer", "patches + v.num_hidden_layers * layer",
     "test_flops.py::test_equal_to_torchs_counter"),
    ("flops.py", "4 * tokens**2 * d", "2 * tokens**2 * d", "test_flops.py::test_equal_to_torchs_counter"),
    ("flops.py", "tokens, d = v.num_patches + 1, v.hidden_size", "tokens, d = v.num_patches, v.hidden_size",
     "test_flops.py::test_equal_to_torchs_counter"),
    ("flops.py", "(d_vision * d + (d * d if", "(d_vision * d + (d * d_vision if",
     "test_flops.py::test_equal_to_torchs_counter"),
    ("flops.py", '"q_proj": 2 * layer.q', '"q_proj": 2 * layer.kv', "test_prefix.py::test_flops"),
    ("flops.py", '"v_proj": 2 * layer.kv * d * kv_width', '"v_proj": 2 * layer.kv * d * width',
     "test_prefix.py::test_flops"),
    ("flops.py", '"ranking": 2 * layer.score_rows', '"ranking": 4 * layer.score_rows', "test_prefix.py::test_flops"),
    ("flops.py", '"weighted_sum": 2 * layer.rows * layer.keys', '"weighted_sum": 2 * layer.rows * layer.rows',
     "test_prefix.py::test_flops"),
    ("flops.py", '"mlp": 6 *', '"mlp": 4 *', "test_prefix.py::test_flops"),
    ("flops.py", "[LayerTrace(n, 1, 0, 1, n)]", "[LayerTrace(n, n, 0, n, n)]", "test_flops.py::test_whole_answer"),
    ("flops.py", "layer.keys + step)", "layer.keys + step - 1)", "test_flops.py::test_equal_to_torchs_counter"),
    ("flops.py", "return 2 * config.num_key_value_heads", "return 2 * config.num_attention_heads",
     "test_flops.py::test_kv_cache_bytes"),
    ("flops.py", "prefix_flops(config, layers) + lm_head", "prefix_flops(config, layers[1:]) + lm_head",
     "test_prefix.py::test_flops"),
    ("flops.py", "vanilla_n = n - (span[1] - span[0]) + config.num_image_tokens", "vanilla_n = n",
     "test_methods.py::test_answer_with_reducer"),
    # the way to the decoder
    ("vision.py", "self.first = 0 if", "self.first = 1 if", "test_flops.py::test_equal_to_torchs_counter"),
    ("vision.py", "cat((cls, patches), dim=1)", "cat((patches, cls), dim=1)", "test_embedded.py::test_answers"),
    ("vision.py", "1.702 * x", "1.0 * x", "test_model.py::test_activations"),
    ("projector.py", "self.linear_2(self.act(x))", "self.linear_2(x)", "test_embedded.py::test_answers"),
    ("model.py", "torch.cat((before, image_embeds, after), dim=1)", "torch.cat((image_embeds, before, after), dim=1)",
     "test_prefix.py::test_answers_are_the_same"),
]  # fmt: skip


def mutant(number: int, folder: Path) -> Path:
    """A copy of the checkout in `folder` with that bug in it; number -1: with none."""
    for name in ("himap_ref", "tests", "weights/shapes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run.py", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    if number >= 0:
        file, old, new, _ = MUTANTS[number]
        path = folder / "himap_ref" / file
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    return folder


def run_tests(number: int, tests: list[str]) -> tuple[int, str]:
    """-> pytest's exit code on that mutant, and the first test that failed."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=mutant(number, Path(folder)), env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[| |$)", run.stdout, re.MULTILINE)
    return run.returncode, failed[1] if failed else ""


def main() -> None:
    search, survivors = "--search" in sys.argv, 0
    named = [CORE_TESTS if search else [f"tests/{killer}"] for *_, killer in MUTANTS]
    code, failed = run_tests(-1, sorted({name for tests in named for name in tests}))
    if code != SURVIVED:
        sys.exit(f"the tests do not pass without any mutant: {failed or f'exit code {code}'}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (file, old, new, _), (code, failed) in zip(
            MUTANTS, pool.map(run_tests, range(len(MUTANTS)), named), strict=True
        ):
            survivors += code != FOUND
            verdict = failed if code == FOUND else "SURVIVED" if code == SURVIVED else f"NOT TESTED (exit code {code})"
            print(f"{file}: {old.strip()}  ->  {new.strip()}: {verdict}", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} mutants found")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
