"""Metrics of the literature: their definitions, names and directions, and the paper's own figures."""
