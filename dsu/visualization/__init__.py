"""Figures for print: the encoders' features, and predictions side by side."""
