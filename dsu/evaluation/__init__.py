"""Masks against ground truth, and the published figures."""
