"""What the studies' tests share."""

import pytest
from toys import write_small_model

from himap_ref.studies.questions.scenes import SIZE


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a random model that sees scenes as they are, 144 tokens, in three layers."""
    write_small_model(folder := tmp_path_factory.mktemp("small") / "m", side=SIZE)
    return folder


@pytest.fixture
def decoder(tiny_decoder):
    return tiny_decoder(num_key_value_heads=2)
