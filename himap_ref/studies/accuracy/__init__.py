"""How good the answers are: one method (evaluate), many (sweep), and what explains it.

Recall and bias look at what is kept, blind at what needs no picture, precision at the arithmetic."""
