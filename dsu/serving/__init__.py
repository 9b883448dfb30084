"""Serve heads over HTTP: images in; masks, overlays, cutouts and verdicts out. Nothing is written to disk."""
