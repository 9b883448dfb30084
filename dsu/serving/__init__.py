"""Heads behind HTTP: images go in, masks, pictures and verdicts come out. Nothing is written to disk."""
