"""Tools beside the core: they use its public names, and it never imports them."""
