"""Figures for print: features as the encoders see them, and predictions side by side."""
