"""Heads among people: what can be said of one, model cards, lists, and the authors' own checkpoints."""
