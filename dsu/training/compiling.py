"""Decide whether to use torch.compile in a run, by comparing the time saved in all steps with the compile time."""

import importlib.util
import shutil
from math import ceil

from dsu.config import DSUNetConfig
from dsu.progress import clock
from dsu.runtime import Runtime
from dsu.settings import TrainingSettings

SECONDS_PER_KIND = 7.4
"""Seconds to compile one kind of block: 59 s for the eight kinds of `large` (NVIDIA H200, 16 cores, 2026-11-27)."""
SECONDS_SAVED = 17e-6
"""Seconds saved per block and sample in a step: 43.3 against 36.6 ms at N = 48 and batch 8 (same machine and day)."""


def compile_pays(
    config: DSUNetConfig, settings: TrainingSettings, samples: int, runtime: Runtime, processes: int = 1
) -> tuple[bool, str | None]:
    """Whether to compile the adapted blocks, and a note with the time needed and saved (None on a CPU).

    If `settings.compile` is given, it decides. With `deterministic`, nothing is compiled, since compiled steps may not
    be reproducible. Each of several `processes` compiles everything, but only saves time for its part of the steps.
    """
    if runtime.device.type != "cuda" or not config.adapt_last:
        return bool(settings.compile), None
    epochs = settings.epochs - settings.freeze_adapter_epochs
    steps = epochs * ceil(samples / settings.batch_size)
    saves = steps * settings.batch_size * config.adapt_last * SECONDS_SAVED / processes
    takes = _kinds(config) * SECONDS_PER_KIND
    figures = f"takes about {clock(takes)} and saves about {clock(saves)} of this run"
    if settings.compile is not None:
        return settings.compile, f"compile: {'yes' if settings.compile else 'no'}, as requested; it {figures}"
    if settings.deterministic:
        return False, "compile: no, since steps must be deterministic"
    if importlib.util.find_spec("triton") is None or not (shutil.which("cc") or shutil.which("gcc")):
        return False, "compile: no, since triton or a C compiler is not installed"
    return saves > takes, f"compile: {'yes' if saves > takes else 'no'}; it {figures}"


def _kinds(config: DSUNetConfig) -> int:
    """Number of kinds of adapted blocks: in each Hiera stage the first, those with windows, and those without."""
    hiera = config.hiera
    blocks = range(config.first_adapted, hiera.depth)
    starts, without_windows = hiera.stage_starts, hiera.global_att_blocks
    return len({(hiera.stage_of(block + 1), block in starts, block in without_windows) for block in blocks})
