"""Measure the speed of `dsu` on this machine, in one run and as ratios: `dsu bench`.

Machines are shared and noisy, so only figures of the same run are compared. The cases take turns in several rounds, and
a speedup is the median over rounds of the ratio within a round.
"""

from typing import Final

PARTS: Final = ("steps", "reading", "stages", "eval", "scale")
"""Parts that can be measured separately."""
