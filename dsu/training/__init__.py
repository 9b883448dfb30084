"""Stage two: train a head."""
