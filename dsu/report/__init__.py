"""Evaluations told to people: tables side by side, and one page to look at."""
