"""docs/walkthrough.md says what the code does."""

from walkthrough import PAGE, rewritten


def test_walkthrough(monkeypatch):
    """A page about code that is gone: another number, another shape, a link beside its line."""
    monkeypatch.chdir(PAGE.parents[1])
    page = PAGE.read_text(encoding="utf-8")
    assert page == rewritten(page)
    assert rewritten(page.replace("ids, the image", "tokens, the image", 1)) != page  # what is printed is compared
