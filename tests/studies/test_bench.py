"""The benchmark: its exact figures, what it does with samples, and the random checkpoints that it writes. No timing."""

import json
import sys
from dataclasses import replace
from functools import partial
from itertools import count

import pytest
import torch
from safetensors.torch import load_file
from test_flops import counted

from himap_ref import HIMAP, LLAVA_1_5_7B, HimapError, Llava
from himap_ref.checkpoint.config import read_config
from himap_ref.flops import LayerTrace, pass_flops
from himap_ref.methods.plan import plan_prefill
from himap_ref.methods.reducers import ClsAttention
from himap_ref.studies.accuracy.literature import three_matrix_layer
from himap_ref.studies.accuracy.precision import threads
from himap_ref.studies.speed import bench, timing
from himap_ref.studies.speed.bench import Setting, compared, figures, our_answer, told_cores
from himap_ref.studies.speed.timing import Contestant, Sample, cores_had, replay, take_turns, typical
from himap_ref.studies.weights.random_weights import random_model, write

CPU = torch.device("cpu")
TWO = "1:0.5:text_to_image,3:0.25:image_to_image"
METHODS = ("none", TWO, f"{TWO}+prefix", f"{TWO}+reprune", f"{TWO}+prefix+reprune", "2:0:none", "cls:5", "pool:2")


def ignore(part):
    """A mark that marks nothing."""


@pytest.fixture
def setting(tiny_llava):
    """Two pictures, prompts of 35 + 16 + 7 tokens, three new ones."""
    model = tiny_llava(text={"num_key_value_heads": 2})
    return Setting(model, torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)), text=7, new=3)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_answer(setting, name):
    """Speeds worked out from FLOPs of another run, of one prompt of the batch, or of other steps; decode time in the
    prefill's; +prefix or +reprune that does nothing; bare products of other shapes than executed, or one forgotten."""
    contestant, marks = our_answer(setting, name), []
    flops, out = counted(contestant.play, marks.append)
    assert marks == ["prefill", "decode", "decode"]
    assert flops == contestant.flops["answer"] == contestant.flops["prefill"] + contestant.flops["decode"]
    assert [len(ids) for ids in out.token_ids] == [3, 3]
    assert contestant.flops["prefill"] == 2 * pass_flops(setting.model.config.text_config, out.traces[0].layers)
    n = {"cls:5": 5, "pool:2": 4}.get(name, 16) + 7 + (0 if "+prefix" in name else 35)
    entered = [n, n + 1, n + 2] if "+reprune" in name else [n, 1, 1]
    assert [trace.layers[0].entered for trace in out.traces] == entered
    if "reprune" in name:
        assert contestant.bare is None
        return
    parts = contestant.bare.play.args[0]
    for part in ("prefill", "decode"):
        assert counted(replay, {part: parts[part]}, CPU, ignore)[0] == contestant.flops[part]
    own = {weight.data_ptr() for weight in setting.model.language_model.parameters()}
    given = [arg for _, args, _ in parts["prefill"] for arg in args if isinstance(arg, torch.Tensor)]
    used = {weight.data_ptr() for weight in given if not weight.is_meta}
    assert len(used) == 7 * 5 + 1 and used <= own


@torch.no_grad()
@pytest.mark.parametrize("name", ["none", "cls:5", "pool:2"])
def test_vision(setting, name):
    """The encoder's time set beside the FLOPs of another way to make image tokens."""
    contestant = bench.our_vision(setting, name)
    (flops, _), (bare, _) = (counted(each.play, ignore) for each in (contestant, contestant.bare))
    assert contestant.flops == {"vision": flops} and bare == flops


@torch.no_grad()
def test_kv_bytes_and_tokens(setting):
    """A cache shown as one prompt's, as bf16's or as unpruned; a word that is the image token, or one's own."""
    contestant = our_answer(setting, TWO)
    x, span = setting.prompt()
    assert (x.shape[1], span) == (58, (35, 51))
    out = setting.model.language_model(x, span, bench.parse_method(TWO, setting.model).stages)
    held = sum(tensor.nbytes for layer in out.cache for tensor in (layer.k, layer.v))
    facts = contestant.facts["prefill"]
    assert (facts["kv_bytes"], facts["tokens"]) == (held, "16 > 8 > 2")
    setting.model.config, setting.text = replace(setting.model.config, image_token_index=3), 400
    (x, span), (y, _) = setting.prompt(), setting.prompt(ClsAttention(5))
    assert (x.shape, span) == ((2, 451, 32), (35, 51))
    assert torch.equal(x[:, :35], y[:, :35]) and torch.equal(x[:, 51:], y[:, 40:])


@pytest.mark.parametrize("prefix", [0, 35])
def test_paper_order(prefix):
    """What early drop and the last layer's cut save, measured against anything but the whole of every layer."""
    config = LLAVA_1_5_7B.text_config
    plan = plan_prefill(config, (35, 611), 671, HIMAP, cached=prefix)
    layers = [671] * 2 + [383] * 6 + [167] * 24
    whole = sum(2 * three_matrix_layer(n, 4096, 11008) for n in layers) + 2 * 4096 * 32064
    assert pass_flops(config, bench.paper_order(plan)) == whole > pass_flops(config, plan)


def test_readers(setting):
    """A floor for decoding that leaves out weights, or reads the embeddings, of which a token needs one row."""
    decoder = setting.model.language_model
    matrices = {name: weight.data_ptr() for name, weight in decoder.named_parameters() if weight.ndim == 2}
    del matrices["embed_tokens.weight"]
    for reader in bench.readers(setting):
        weights = reader.play.func.__closure__[0].cell_contents
        assert {weight.data_ptr() for weight in weights} == {*matrices.values()}
        reader.play(ignore)


@pytest.mark.parametrize("shares, threads, disturbed, seconds, spread", [
    ([2.0, 1.9, 1.86, 1.84, 0.5], 2, 2, 2.0, 0.5), ([1.0, 1.0, 1.0, 0.9, 0.1], 1, 2, 2.0, 0.5),
    ([2.0, 1.9, 1.0, 1.0, 1.0], 2, 3, 3.0, 2 / 3),  # only two were not: all are used
    ([0.1] * 5, None, 0, 3.0, 2 / 3),  # a GPU works, the CPU waits
])  # fmt: skip
def test_disturbed_samples(shares, threads, disturbed, seconds, spread):
    """Samples that another process slowed down, counted; or all thrown away, and no figure left."""
    samples = [Sample(wall, wall * share) for wall, share in enumerate(shares, 1)]
    figure = typical(samples, threads)
    assert (figure["disturbed"], figure["seconds"], figure["spread"]) == (disturbed, seconds, pytest.approx(spread))
    assert typical(samples, threads, times=4)["seconds"] == seconds / 4


def test_turns(monkeypatch):
    """Contestants one after the other, so that the machine's mood decides; the warm-up, or pieces of a part, lost."""
    played, ticks = [], count()
    monkeypatch.setattr(timing, "clock", lambda device: next(ticks))

    def play(name, mark):
        played.append(name)
        mark("a"), mark("b"), mark("a")

    two = [Contestant(name, partial(play, name), sums={"both": ("a", "b")}) for name in "xy"]
    take_turns(two, 3, CPU)
    assert played == ["x", "y"] * 4
    for c in two:
        walls = {part: [sample.wall for sample in samples] for part, samples in c.samples.items()}
        assert walls == {"a": [2] * 3, "b": [1] * 3, "both": [3] * 3} and c.peak_bytes > 2**20


def test_ratios():
    """A ratio upside down, of other parts, or of the whole answer where a token's is meant."""

    def contestant(name, prefill, decode, flops, bare=None):
        walls = {"prefill": prefill, "decode": decode, "answer": prefill + decode}
        samples = {part: [Sample(wall)] * 3 for part, wall in walls.items()}
        flops = {"prefill": flops, "decode": 20, "answer": flops + 20}
        return Contestant(name, None, None, flops, times={"decode": 10}, bare=bare, samples=samples)

    rows = figures([
        contestant("none", 8.0, 30.0, 100),
        contestant("himap", 4.0, 20.0, 40, bare=contestant("himap", 3.0, 10.0, 40)),
        contestant("himap+reprune", 4.0, 40.0, 40),
        contestant("transformers", 10.0, 60.0, 110),
        Contestant("sum", None, samples={"reading": [Sample(1.0)]}),
        Contestant("product", None, samples={"reading": [Sample(0.5)]}),
    ])  # fmt: skip
    assert [row["part"] for row in rows] == ["prefill"] * 4 + ["decode"] * 4 + ["answer"] * 4 + ["reading"] * 2
    at = {(row["part"], row["method"]): row for row in rows}
    prefill, decode, answer = (at[part, "himap"] for part in ("prefill", "decode", "answer"))
    assert (prefill["by_vanilla"], prefill["flops_by_vanilla"], prefill["time_by_flops"]) == (0.5, 0.4, 1.25)
    assert (prefill["by_transformers"], prefill["speed"], prefill["of_bare"]) == (0.4, 10.0, 0.75)
    assert (decode["seconds"], decode["flops"], decode["by_reading"], decode["of_bare"]) == (2.0, 2.0, 4.0, 0.5)
    assert answer["by_reprune"] == 24 / 44 and "by_reprune" not in prefill and "by_reprune" not in decode
    assert "by_vanilla" not in at["prefill", "none"] and "by_reading" not in prefill
    assert compared(rows) == rows


def small(tiny_llava, **text):
    return tiny_llava(text={"vocab_size": 300, "num_key_value_heads": 2, **text}).config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_random_weights(tiny_llava, dtype):
    """Weights that slow a product down or break it (denormal, infinite, all alike), or that a part lacks."""
    model = random_model(small(tiny_llava), dtype)
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype and not weight.is_meta and weight.isfinite().all()
        if weight.ndim > 1:
            rows = weight.flatten(1).float()
            assert 0.5 < rows.var() * rows.shape[1] < 2 and len(rows.unique(dim=0)) == len(rows)
        else:
            assert (weight == float("norm" in name and name.endswith("weight"))).all()


@pytest.fixture
def written(tiny_llava, tmp_path):
    """A folder of four shards or more."""
    write(small(tiny_llava), torch.float32, tmp_path / "model", shard=40_000)
    return tmp_path / "model"


def test_written_folder(written, tiny_llava, scene_picture):
    """A checkpoint with other names, sizes or settings than llava-hf's: its loading would measure something else; one
    that cannot be asked: no tokenizer for its ids, another picture size, weights that give NaN."""
    folder, config = written, small(tiny_llava)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(shards) >= 4 and index["weight_map"] == {name: file for file in shards for name in shards[file]}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 40_000
    assert index["weight_map"].keys() >= {
        "language_model.model.layers.4.mlp.up_proj.weight", "language_model.lm_head.weight",
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias", "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.post_layernorm.weight", "multi_modal_projector.linear_2.bias",
    }  # fmt: skip
    assert read_config(json.loads((folder / "config.json").read_text())) == config
    with pytest.raises(HimapError, match="holds weights already"):
        write(config, torch.float32, folder)
    model = Llava.from_pretrained(folder)
    answer = model.generate(scene_picture, "Is it <image> or é?", max_new_tokens=3)
    start, stop = answer.image_span
    assert answer.prompt_ids[start:stop] == [96] * 16 and answer.prompt_ids[0] == 1 and start > 35
    assert answer.first_logits.isfinite().all() and 0.3 < answer.first_logits.std() < 3
    assert model.tokenizer.decode(answer.prompt_ids[stop:]) == "\nIs it <image> or é? ASSISTANT:"


@torch.no_grad()
def test_written_folder_in_transformers(written):
    """A random checkpoint that means one model here and another in transformers, so that no comparison is one."""
    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(written, output_loading_info=True)
    assert not any(info.values())
    ours, pixels = Llava.from_pretrained(written), torch.randn(1, 3, 20, 20)
    ids = torch.tensor([[1, *range(3, 9), *[96] * 16, *range(100, 120)]])
    expected = theirs(input_ids=ids, pixel_values=pixels).logits[:, -1]
    torch.testing.assert_close(ours(ids, pixels).logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_peer(tiny_llava, tied):
    """transformers on other weights, in doubled memory, with other buffers, or counted with FLOPs it does not do."""
    pytest.importorskip("transformers")
    model = random_model(small(tiny_llava, tie_word_embeddings=tied, rope_theta=500.0), torch.float32)
    setting = Setting(model, torch.randn(2, 3, 20, 20), text=7, new=3)
    peer = bench.transformers_peer(model)
    assert peer.config._attn_implementation == peer.config.text_config._attn_implementation == "sdpa"
    own = {weight.data_ptr() for weight in model.parameters()}
    spare = [name for name, weight in peer.named_parameters() if weight.data_ptr() not in own]
    assert all("layers.3." in name or "post_layernorm" in name for name in spare)
    assert not any(weight.is_meta for weight in peer.state_dict().values())
    x, span = setting.prompt()
    features = torch.stack(tuple(peer.get_image_features(pixel_values=setting.pixels).pooler_output))
    torch.testing.assert_close(features, x[:, slice(*span)], rtol=0, atol=1e-4)
    logits = peer(inputs_embeds=x, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(logits, model.language_model(x).logits, rtol=0, atol=1e-4)
    marks, contestants = [], bench.transformers_contestants(setting)
    for part, contestant in zip(("vision", "answer"), contestants, strict=True):
        assert counted(contestant.play, marks.append)[0] == contestant.flops[part]
    assert marks == ["vision", "prefill", "decode", "decode"]


@pytest.fixture
def run(command, monkeypatch, tmp_path):
    """Arguments -> (printed text, what --json wrote)."""
    monkeypatch.setattr(bench, "cores_had", lambda: 2.0)  # which takes half a second
    path = tmp_path / "figures.json"

    def call(*args):
        _, printed, _ = command(bench.main, "bench", *args, "--json", path)
        return printed, json.loads(path.read_text()) if path.exists() else None

    return call


def test_command(run, monkeypatch):
    """The command as it stands in the docstring fails, or leaves a figure out."""
    monkeypatch.setattr(timing, "CALM", 0)  # whatever else runs meanwhile
    printed, data = run("--rounds", 1, "--new-tokens", 2)
    at = {(row["part"], row["method"]): row for row in data["rows"]}
    for name in bench.METHODS:
        row = at["prefill", name]
        assert row["seconds"] > 0 and row["flops"] > 0 and row["kv_bytes"] > 0 and row["peak_bytes"] > 2**20
        assert at["decode", name]["by_reading"] > 0 and f"| {name} |" in printed
    assert at["load", "from_pretrained"]["seconds"] > 0 and at["vision", "none"]["of_bare"] > 0
    assert at["prefill", "himap"]["flops_by_paper"] < at["prefill", "none"]["flops_by_paper"] < 1
    assert data["setting"]["prompt"] == "35 + 144 + 60" and "35 + 144 + 60" in printed
    assert len(at["prefill", "himap"]["samples"]) == 1


def test_write_and_measure(run, tiny_llava, monkeypatch, tmp_path):
    """--write, and --shape with what it wrote; --layers that does nothing."""
    monkeypatch.setitem(bench.SHAPES, "7b", small(tiny_llava))
    folder = tmp_path / "written"
    run("--shape", "7b", "--write", folder, "--layers", 2)
    usual = "--rounds", 1, "--methods"
    _, data = run("--shape", folder, "--batch", 2, "--new-tokens", 2, *usual, "none", "1:4:text_to_image")
    assert {row["part"] for row in data["rows"]} == {"load", "vision", "prefill", "decode", "answer", "reading"}
    assert (data["setting"]["layers"], data["setting"]["dtype"]) == (2, "bfloat16")
    [flops] = [row["flops"] for row in data["rows"] if (row["part"], row["method"]) == ("prefill", "none")]
    text, n = replace(small(tiny_llava).text_config, num_hidden_layers=2), 35 + 16 + 60
    assert flops == 2 * pass_flops(text, [LayerTrace(n, 0, n, n), LayerTrace(n, 0, 1, n)])
    _, data = run("--shape", "7b", "--new-tokens", 1, *usual, "cls:4", "cls:4+prefix")
    assert {(row["part"], row["method"]) for row in data["rows"]} == {
        ("vision", "none"), ("vision", "cls:4"), ("prefill", "cls:4"), ("prefill", "cls:4+prefix"),
        ("reading", "sum of the bits as int64"), ("reading", "product with one row"),
    }  # fmt: skip


def test_start(monkeypatch, tmp_path):
    """The first token's time taken at the end; a process that failed, timed as if it had answered."""
    script, seen = tmp_path / "answer.py", tmp_path / "seen"
    script.write_text(
        "import os, sys, time; print('yes', flush=True); end = time.time() + 20\n"
        f"while not os.path.exists({str(seen)!r}): time.sleep(0.01) if time.time() < end else sys.exit('not seen')"
    )
    monkeypatch.setattr(bench, "RUN", script)
    marks = []
    bench.starting()[1].play(lambda part: (seen.touch(), marks.append(part)))
    assert marks == ["first token", "rest"]
    script.write_text("raise SystemExit('no weights')")
    with pytest.raises(HimapError, match="no weights"):
        bench.starting()[1].play(ignore)


def test_start_command(run, monkeypatch):
    """Ratios to something else than the whole of `import torch`."""
    contestants = bench.starting()
    for contestant, parts in zip(contestants, (["rest"], ["first token", "rest"]), strict=True):
        contestant.play = lambda mark, own=parts: [mark(part) for part in own]
    monkeypatch.setattr(bench, "starting", lambda: contestants)
    printed, data = run("--start", "--rounds", 2)
    names, seconds, ratios = zip(*((r["method"], r["seconds"], r.get("by_import")) for r in data["rows"]), strict=True)
    assert names == ("import torch", "run.py", "run.py") and "start to end" in printed
    assert ratios == (None, seconds[1] / seconds[0], seconds[2] / seconds[0])


def test_unwritable_json(run, monkeypatch, tmp_path):
    """All figures lost because the last step failed, which could have been known before the first."""
    monkeypatch.setattr(bench, "starting", lambda: pytest.fail("measured"))
    (tmp_path / "figures.json").mkdir()
    with pytest.raises(HimapError, match="cannot be written"):
        run("--start")


def test_peers_without_transformers(setting, monkeypatch):
    """An import error for a user who has not installed the extra."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HimapError, match="himap-ref.parity."):
        bench.transformers_contestants(setting)


def test_cores_that_the_threads_lack(capsys):
    """Hours of figures from one of two cores, told like any others; a figure that does not follow from the cores."""
    with threads(1):  # which has one, if it has the time
        assert 0 < cores_had(0.1) < 1.05
    assert told_cores(2, 1.99) == {"cores had": "1.99 of 2"} and capsys.readouterr().err == ""
    assert told_cores(2, 1.0) == {"NOT THIS MACHINE'S SPEED": "2 threads had 1.00 cores"}
    assert "warning: 2 threads get 1.00 cores" in capsys.readouterr().err


def test_tables_of_disturbed_samples():
    """A table whose samples were all disturbed, printed like any other."""
    row = {"method": "none", "seconds": 1.0, "spread": 0.1, "samples": [(1, 2)] * 3}
    calm, mixed = ({**row, "part": part, "disturbed": n} for part, n in (("prefill", 0), ("vision", 2)))
    every = {**row, "part": "decode", "disturbed": 3}
    assert "no table" not in bench.tables([calm, mixed]) and "no table: in no sample" in bench.tables([every])
    assert bench.tables([calm, mixed, every]).count("| none |") == 2
