"""LLaVA-NeXT: which tiles, what is left of their grid, in what order; and HiMAP on them. (Against transformers:
parity/test_next.py.)"""

import pytest
import torch
from PIL import Image
from test_flops import counted
from toys import make_tokenizer, noise, random_llava

from himap_ref import HimapError, Llava, LlavaConfig, Stage, TextConfig, VisionConfig, image_to_image, text_to_image
from himap_ref.anyres import AnyresProcessor, best_size, most_image_tokens, num_image_tokens, pack, tile_grid, unpadded
from himap_ref.flops import projector_flops, vision_flops
from himap_ref.methods.schedules import parse_method

REAL = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
SMALL = tuple((height // 12, width // 12) for height, width in REAL)  # 28 pixels, 4 x 4 patches a look
TWO = Stage(1, 0.5, text_to_image), Stage(2, 0.25, image_to_image)


def config_of(**text) -> LlavaConfig:
    vision = VisionConfig(16, 24, 3, 2, image_size=28, patch_size=7)
    sizes = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    text = TextConfig(**sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | text)
    tokenizer = make_tokenizer("byte-level")
    return LlavaConfig(vision, text, tokenizer.token_to_id("<image>"), image_grid_pinpoints=SMALL)


@pytest.fixture(scope="module")
def model() -> Llava:
    model = random_llava(config_of())
    model.tokenizer = make_tokenizer("byte-level")
    model.image_processor = AnyresProcessor(28, crop_size=(28, 28), image_grid_pinpoints=SMALL)
    return model


# ---------------------------------------------------------------- which size, which patches


@pytest.mark.parametrize(("image", "best"), [
    ((336, 336), (336, 672)),  # nothing is gained by more tiles: the smallest, and of those the first
    ((337, 337), (672, 672)),  # one pixel too many for two tiles
    ((480, 640), (672, 672)), ((672, 336), (672, 336)), ((300, 900), (336, 1008)), ((900, 300), (1008, 336)),
    ((3000, 4000), (672, 672)), ((1, 1), (336, 672)), ((2, 3000), (336, 672)),
])  # fmt: skip
def test_best_size(image, best):
    """The size that wastes least instead of that which shows most; height taken for width."""
    assert best_size(image, REAL) == best


@pytest.mark.parametrize(("image", "rows", "columns"), [
    ((100, 100), (0, 48), (0, 48)), ((100, 200), (12, 36), (0, 48)), ((200, 100), (0, 48), (12, 36)),
    ((100, 104), (1, 47), (0, 48)),  # 46.15 rows of patches: one above and one below are black
    ((100, 102), (0, 48), (0, 48)),  # 47.06 rows: of the odd number left over none goes
    ((1, 500), (24, 24), (0, 48)),
])  # fmt: skip
def test_unpadded(image, rows, columns):
    """A row too many or too few at an edge."""
    assert unpadded(image, (48, 48)) == (slice(*rows), slice(*columns))


def test_resample():
    """The whole picture, or what is cut into tiles, scaled in Pillow's way and not in the model's."""
    picture, nearest = noise(50, 20), Image.Resampling.NEAREST
    processor = AnyresProcessor(28, crop_size=(28, 28), resample=nearest, image_grid_pinpoints=SMALL)
    whole, left, right = processor.looks(picture)
    fitted = Image.new("RGB", (56, 28))
    fitted.paste(picture.resize((56, 23), nearest), (0, 2))
    assert whole == picture.resize((28, 28), nearest)
    assert (left, right) == (fitted.crop((0, 0, 28, 28)), fitted.crop((28, 0, 56, 28)))


def test_order():
    """Tiles put one behind the other instead of side by side; a newline before its row, or one in all; the second
    picture made of the first one's tiles."""
    config, images = config_of(), [(20, 40), (10, 50)]  # two tiles are enough for both, side by side: 4 x 8 patches
    looks = torch.arange(6 * 16).view(6, 16, 1).float()  # of each picture the whole and two tiles; 16 patches each
    tokens = pack(looks, images, config, torch.tensor([-1.0]))[:, 0].int().tolist()
    first, second = tokens[: 16 + 4 * 9], tokens[16 + 4 * 9 :]
    assert [tile_grid(image, config) for image in images] == [(4, 8)] * 2
    assert first[:16] == [*range(16)] and second[:16] == [*range(48, 64)]
    rows = [[*range(16 + 4 * y, 20 + 4 * y), *range(32 + 4 * y, 36 + 4 * y), -1] for y in range(4)]
    assert first[16:] == sum(rows, [])
    assert second[16:] == [id + 48 if id >= 0 else id for id in sum(rows[1:3], [])]  # 1.6 rows of patches high
    assert [num_image_tokens(image, config) for image in images] == [len(first), len(second)]


def test_most(model):
    """A limit that a picture exceeds."""
    assert most_image_tokens(model.config) == 16 + 8 * 9 == num_image_tokens((56, 56), model.config)
    assert most_image_tokens(random_llava(config_of()).config) == 88
    sizes = [(height, width) for height in range(1, 120, 7) for width in range(1, 120, 7)]
    assert max(num_image_tokens(size, model.config) for size in sizes) <= 88


def test_looks(model):
    """Tiles cut column by column, a picture stretched to its tiles, or put into a corner of them."""
    image = Image.new("RGB", (40, 60), "red")  # fits 28 x 42 of 28 x 56 pixels
    whole, *tiles = AnyresProcessor(28, crop_size=(28, 28), image_grid_pinpoints=((56, 28),)).looks(image)
    assert whole.getcolors() == [(28 * 28, (255, 0, 0))]
    black = [sum(count for count, color in tile.getcolors() if color == (0, 0, 0)) for tile in tiles]
    assert black == [28 * 7] * 2 and tiles[0].getpixel((0, 0)) == tiles[1].getpixel((0, 27)) == (0, 0, 0)
    for size, points in (((40, 33), (56, 28)), ((33, 40), (28, 56))):  # 23.1 pixels of the other side are 24
        processor = AnyresProcessor(28, crop_size=(28, 28), image_grid_pinpoints=(points,))
        looks = processor.looks(Image.new("RGB", size, "red"))
        assert [look.convert("L").histogram()[0] for look in looks] == [0, 16 * 28, 16 * 28]
    left, right = Image.new("RGB", (28, 56), "red"), Image.new("RGB", (28, 56), "blue")
    wide = Image.new("RGB", (56, 56))
    wide.paste(left, (0, 0)), wide.paste(right, (28, 0))
    colors = [look.getpixel((14, 14)) for look in model.image_processor.looks(wide)[1:]]
    assert colors == [(255, 0, 0), (0, 0, 255)] * 2


# ---------------------------------------------------------------- HiMAP on it


@pytest.mark.parametrize(("size", "stages", "kept"), [
    ((56, 28), TWO, [26, 7]),  # of 16 + 4 x 9 = 52
    ((56, 56), TWO, [44, 11]), ((30, 200), (Stage(2, 17, image_to_image),), [17]), ((28, 84), (), []),
])  # fmt: skip
def test_flops_and_stages(model, size, stages, kept):
    """A tile's run of the encoder forgotten, padding that the projector sees left out, newlines projected; a share of
    another number than the picture's own."""
    flops, answer = counted(lambda: model.generate(noise(*size), "Why?", stages, max_new_tokens=3))
    assert flops == answer.flops.total and (not stages or answer.flops.ratio < 1)
    runs = len(model.preprocess(noise(*size)))
    assert answer.flops.vision == runs * vision_flops(model.config) and runs in (3, 4, 5)
    assert answer.flops.projector == runs * projector_flops(model.config)
    assert [len(stage.kept) for stage in answer.trace.stages] == kept
    plain, vanilla = counted(lambda: model.generate(noise(*size), "Why?", max_new_tokens=3))
    assert plain == answer.flops.vanilla.total == vanilla.flops.total and vanilla.flops.ratio == 1
    later = model.generate(None, "And?", past=answer.past, max_new_tokens=2)
    assert later.flops.vision == 0
    plain = model.generate(None, "And?", past=vanilla.past, max_new_tokens=2)
    assert later.flops.vanilla.decoder == plain.flops.decoder == plain.flops.vanilla.decoder


def test_batch(model):
    """Pictures of one shape that do not come out as alone; a batch that cannot be computed taken for one that can."""
    images, asked = [noise(40, 40), noise(80, 80, seed=1)], ["Why?", "What is in the picture?"]
    both = model.generate(images, asked, TWO, max_new_tokens=4)
    alone = [model.generate(image, question, TWO, 4) for image, question in zip(images, asked, strict=True)]
    assert [answer.token_ids for answer in both] == [answer.token_ids for answer in alone]
    assert [answer.flops for answer in both] == [answer.flops for answer in alone]
    with pytest.raises(HimapError, match="equally many image tokens, not 52 and 88: ask one by one"):
        model.generate([noise(56, 28), noise(56, 56)], asked)


def test_refused(model):
    """Methods that take tiles for one grid; looks and sizes that are not of one picture."""
    for name in ("cls:4", "pool:2", "divprune:4", "visionzip:4", "down:2"):
        with pytest.raises(HimapError, match="LLaVA-NeXT has tiles beside it: take stages"):
            parse_method(name, model)
    assert parse_method("2:80:text_to_image", model).tokens_per_layer(model.config) == [88, 88, 80, 80]
    with pytest.raises(HimapError, match="keep 80 image tokens, only 52 enter"):
        model.generate(noise(56, 28), "Why?", parse_method("2:80:text_to_image", model).stages)
    looks = model.preprocess(noise(56, 28))
    for sizes in ((), [(56, 56)], [(28, 56)] * 2):
        with pytest.raises(HimapError, match="3 looks at pictures and (no image_sizes|image_sizes .*): they do not"):
            model.embed_image(looks, sizes)
