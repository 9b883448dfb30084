"""Share heads: their metadata, lists of heads, model cards, and the authors' checkpoints."""
