"""Whether saved FLOPs are saved time, beside transformers on the same weights.

How it is measured so that other work on the machine does not count stands in timing."""
