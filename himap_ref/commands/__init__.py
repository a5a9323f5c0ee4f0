"""What run.py and the studies share: how commands end, their options, the files they write, what they print and draw.
Nothing here computes an answer, and the model and its methods know nothing of it."""
