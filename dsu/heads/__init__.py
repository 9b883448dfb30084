"""A head's file and its metadata."""
