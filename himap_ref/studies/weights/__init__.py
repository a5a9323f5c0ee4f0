"""The making of weights: the small model's training, random ones of any real size.

Both write folders in the layout that LLaVA has on the hub."""
