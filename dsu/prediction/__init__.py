"""Masks from a head: for benchmarks, folders, files, and in Python."""
