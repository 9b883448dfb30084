"""Measure the speed of `dsu` on this machine, in one run and as ratios: `dsu bench`.

Machines are shared and noisy, so nothing is compared between runs. Cases take turns, round after round, and a speedup
is the median over rounds of the ratio within a round.
"""

from typing import Final

__all__ = ["PARTS"]

PARTS: Final = ("steps", "reading", "stages", "eval", "scale")
"""Parts that can be measured separately."""
