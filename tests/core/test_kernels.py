"""Single rows: the same numbers another way, only where that way is right."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from himap_ref.kernels import single_row, single_rows


@pytest.fixture(params=[True, False])
def cpu(request, monkeypatch):
    """A CPU on which `torch.mv` is the faster way, or not."""
    monkeypatch.setattr(single_row, "mv_is_faster", lambda: request.param)
    return request.param


def model(dtype=torch.bfloat16, bias=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.Linear(96, 32, bias=bias)).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 1, 64), (64,), (1, 64), (2, 1, 64), (1, 3, 64), (1, 0, 64)])
def test_same_numbers(cpu, shape):
    """A single row multiplied by the wrong side, or more rows than one taken for one; other names in the state dict."""
    plain, changed, x = model(), model(), torch.randn(shape).bfloat16()
    assert single_rows(changed) == cpu
    assert_close(changed(x), plain(x), rtol=2e-2, atol=2e-2)
    assert changed(x).shape == plain(x).shape
    for (name, got), (expected, want) in zip(changed.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == expected and torch.equal(got, want)


@pytest.mark.parametrize("changes", [{"bias": True}, {"dtype": torch.float32}, {"dtype": torch.float16}], ids=str)
def test_left_alone(cpu, changes):
    """A bias that is dropped; fp16, where the other way takes twice the time."""
    left = model(**changes)
    assert not single_rows(left) and all(type(layer) is nn.Linear for layer in left)


def test_autocast(cpu):
    """torch.mv is not cast by autocast: weights in bf16 and a row in fp32 raise."""
    changed, plain, x = model(), model(), torch.randn(1, 1, 64)
    single_rows(changed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(changed(x), plain(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("amx, vectors, faster", [
    (True, True, True), (True, False, True), (False, False, True), (False, True, False), (None, True, False),
    (True, None, False),
])  # fmt: skip
def test_which_cpu(monkeypatch, amx, vectors, faster):
    """The slower way on a CPU whose vector units multiply bf16, or an error from a torch without these questions."""
    for name, has in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", vectors)):
        if has is None:
            monkeypatch.delattr(torch.cpu, name)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda has=has: has)
    assert single_row.mv_is_faster() == faster
