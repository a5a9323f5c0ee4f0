"""The list of mutants fits the code and the tests that it names. Running them takes minutes: see mutants.py."""

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("file, old, new, killer", MUTANTS, ids=range(len(MUTANTS)))
def test_mutant_is_one(file, old, new, killer):
    """A mutant that an edit of the code has made void, so that nobody checks any more whether its test still bites."""
    assert (ROOT / "himap_ref" / file).read_text(encoding="utf-8").count(old) == 1 and old != new
    path, name = killer.split("::")
    assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8")
