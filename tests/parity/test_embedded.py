"""transformers reads weights/shapes as it reads any llava-hf folder, and computes the same."""

import pytest
import torch
from PIL import Image

from himap_ref import Llava

transformers = pytest.importorskip("transformers")


def test_same_logits():
    """A file in the folder that only this package reads as meant."""
    ours = Llava.from_pretrained("weights/shapes")
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        "weights/shapes", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = transformers.AutoProcessor.from_pretrained("weights/shapes")
    image = Image.open("weights/shapes/example.png")
    for question in ("What color is the star?", "Is there a red star?", "How many things are there?"):
        batch = processor(images=image, text=ours.template.replace("{question}", question), return_tensors="pt")
        assert batch["input_ids"][0].tolist() == ours.encode(question)
        torch.testing.assert_close(batch["pixel_values"], ours.preprocess(image), rtol=0, atol=1e-6)
        with torch.no_grad():
            expected = theirs(**batch).logits[0, -1]
        out = ours.generate(image, question)
        torch.testing.assert_close(out.first_logits, expected, rtol=1e-4, atol=1e-4)
        generated = theirs.generate(**batch, max_new_tokens=8, do_sample=False)[0, len(out.prompt_ids) :]
        assert generated.tolist() == out.token_ids
