"""What the members of a study vary, and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from dsu.config import Ablation, DSUNetConfig
from dsu.errors import UsageError

__all__ = ["FOLDER_STARTS", "VARIES", "Asked", "Kind", "Variant", "variants"]

Kind = Literal["folds", "seeds", "depth", "ablations"]

VARIES: Final[Mapping[Kind, tuple[str, ...]]] = {
    "folds": ("fold", "val_fraction"),
    "seeds": ("seed",),
    "depth": ("adapt_last",),
    "ablations": ("ablation",),
}
"""The settings that a study sets itself, whatever else is given."""

FOLDER_STARTS: Final[Mapping[Kind, str]] = {
    "folds": "fold-",
    "seeds": "seed-",
    "depth": "depth-",
    "ablations": "ablation-",
}
"""How the names of the members' folders begin."""


@dataclass(frozen=True)
class Asked:
    """What a study is asked to vary.

    Attributes:
        kind: which study.
        count: parts of a cross-validation; of the other kinds how many seeds, each, from the settings' own (of a
            study of seeds from 0).
        depths: of a study of depth: numbers of adapted blocks or `all`; none: those that fit the Hiera.
    """

    kind: Kind
    count: int = 1
    depths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One member before anything is resolved.

    Attributes:
        name: of its folder.
        group: what it is a measurement of; members of one group have one mean and spread.
        settings: what it sets, by the field.
    """

    name: str
    group: str
    settings: Mapping[str, Any]


def variants(asked: Asked, config: DSUNetConfig, first_seed: int) -> list[Variant]:
    """The members of a study, in the order in which they are run.

    Args:
        asked: what is to be varied.
        config: whose depth bounds a study of depth.
        first_seed: of the settings, from which repeats count.

    Raises `UsageError` for a depth that there is not, or fewer members than can be compared.
    """
    if asked.kind == "folds":
        parts = range(1, asked.count + 1)
        return [Variant(f"fold-{part}", "folds", {"fold": f"{part}/{asked.count}"}) for part in parts]
    if asked.kind == "seeds":
        return [Variant(f"seed-{seed}", "seeds", {"seed": seed}) for seed in range(asked.count)]
    if asked.kind == "depth":
        cases: Sequence[tuple[str, Any]] = [(str(depth), depth) for depth in _depths(asked.depths, config)]
    else:
        cases = [(ablation, ablation) for ablation in get_args(Ablation)]
    [field], start = VARIES[asked.kind], FOLDER_STARTS[asked.kind]
    return [
        Variant(f"{start}{name}{f'-seed-{seed}' if turn else ''}", f"{start}{name}", {field: value, "seed": seed})
        for name, value in cases
        for turn, seed in enumerate(range(first_seed, first_seed + asked.count))
    ]


def _depths(asked: Sequence[str], config: DSUNetConfig) -> list[int]:
    """Numbers of adapted blocks, ascending, each once."""
    depth = config.hiera.depth
    if not asked:
        return sorted(config.usual_depths)
    for text in asked:
        if text != "all" and not (text.isdecimal() and int(text) <= depth):
            raise UsageError(
                f"--depths can't have {text!r}: this Hiera has {depth} blocks, so give numbers from 0 to {depth}, or "
                f"all."
            )
    return sorted({depth if text == "all" else int(text) for text in asked})
