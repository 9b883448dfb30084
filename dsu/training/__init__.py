"""Stage two: from settings to a trained head."""
