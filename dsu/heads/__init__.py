"""A head's file: kept, described, shared, and brought from the authors' program and back."""
