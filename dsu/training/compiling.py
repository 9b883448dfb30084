"""Whether a run gains from torch.compile: what it saves in all of its steps against what it takes at the start."""

import importlib.util
import shutil
from math import ceil

from dsu.config import DSUNetConfig
from dsu.progress import clock
from dsu.runtime import Runtime
from dsu.settings import TrainingSettings

__all__ = ["compile_pays"]

SECONDS_A_KIND = 7.4
"""To compile one kind of block: 59 s for the eight of `large` (NVIDIA H200, 16 cores, 2026-11-27)."""
SECONDS_SAVED = 17e-6
"""A block and sample of a step: 43.3 against 36.6 ms at N = 48 and batch 8 (same machine and day)."""


def compile_pays(
    config: DSUNetConfig, settings: TrainingSettings, samples: int, runtime: Runtime, processes: int = 1
) -> tuple[bool, str | None]:
    """Whether to compile the adapted blocks, and a note that says what it takes and saves (None on a CPU).

    `settings.compile`, where it is given, decides. So does `deterministic`: compiled steps are not promised to repeat.
    Each of several `processes` takes as long to compile and saves its part.
    """
    if runtime.device.type != "cuda" or not config.adapt_last:
        return bool(settings.compile), None
    epochs = settings.epochs - settings.freeze_adapter_epochs
    steps = epochs * ceil(samples / settings.batch_size)
    saves = steps * settings.batch_size * config.adapt_last * SECONDS_SAVED / processes
    takes = _kinds(config) * SECONDS_A_KIND
    figures = f"takes about {clock(takes)} and saves about {clock(saves)} of this run"
    if settings.compile is not None:
        return settings.compile, f"compile: {'yes' if settings.compile else 'no'}, as asked for; it {figures}"
    if settings.deterministic:
        return False, "compile: no, since steps are to be deterministic"
    if importlib.util.find_spec("triton") is None or not (shutil.which("cc") or shutil.which("gcc")):
        return False, "compile: no, since triton or a C compiler is not installed"
    return saves > takes, f"compile: {'yes' if saves > takes else 'no'}; it {figures}"


def _kinds(config: DSUNetConfig) -> int:
    """Kinds of adapted blocks: of each Hiera stage the first, those with windows, and those without."""
    hiera = config.hiera
    blocks = range(config.first_adapted, hiera.depth)
    starts, without_windows = hiera.stage_starts, hiera.global_att_blocks
    return len({(hiera.stage_of(block + 1), block in starts, block in without_windows) for block in blocks})
