"""`python -m himap_ref`: the command."""

from .commands.ask import run

run()
