"""Evaluation of masks against ground truth."""
