"""The paper's two findings: where information flows, and what breaks if it cannot.

With the official code's definitions beside the paper's."""
