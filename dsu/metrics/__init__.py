"""Metrics: definitions, names and directions, and the paper's scores."""
