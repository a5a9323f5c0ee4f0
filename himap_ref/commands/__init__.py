"""What run.py and the studies have in common: how commands end, their options, the files they write, what they print.

Nothing here computes an answer; the model and its methods know nothing of it."""
