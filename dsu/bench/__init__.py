"""How fast `dsu` is on this machine, in one run and as ratios: what `dsu bench` measures.

Machines are shared and noisy, so nothing is compared across runs. Cases take turns, round after round, and a speedup
is the median over rounds of the ratio within a round.
"""

from typing import Final

__all__ = ["PARTS"]

PARTS: Final = ("steps", "reading", "stages", "eval", "scale")
"""What can be measured by itself."""
