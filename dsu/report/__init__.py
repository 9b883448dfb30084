"""Reports of evaluations: comparison tables, and an HTML page."""
