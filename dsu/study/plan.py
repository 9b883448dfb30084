"""Plan a study: its folder, its members, what varies, what each reads, and its evaluation data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Final, Literal, get_args

from dsu.config import Ablation, DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder, Split
from dsu.data.images import file_sha256
from dsu.data.splitting import deal, fold_weights
from dsu.data.views import view_index
from dsu.errors import DsuError, UsageError
from dsu.features.stores import FeatureStore, find_store
from dsu.heads.head_file import is_finished
from dsu.network.resume import item_bytes, resume_point
from dsu.progress import SILENT, Progress
from dsu.settings import EncoderWeights, TrainingSettings
from dsu.study.results import read_result
from dsu.training.run_folders import SETTINGS_FILE, check_same_run, has_state, settings_of_run
from dsu.training.training_data import TrainingData, config_asked, encoders_asked

__all__ = ["FOLDER_STARTS", "STUDY_FILE", "Asked", "Cost", "Kind", "Member", "Study", "open_study", "variants"]

STUDY_FILE: Final = "study.json"

Kind = Literal["folds", "seeds", "depth", "ablations"]

VARIES: Final[Mapping[Kind, tuple[str, ...]]] = {
    "folds": ("fold", "val_fraction"),
    "seeds": ("seed",),
    "depth": ("adapt_last",),
    "ablations": ("ablation",),
}
"""Settings that a study sets itself."""

FOLDER_STARTS: Final[Mapping[Kind, str]] = {
    "folds": "fold-",
    "seeds": "seed-",
    "depth": "depth-",
    "ablations": "ablation-",
}
"""How the names of the members' folders begin."""

_CACHE_ROOT: Final = Path("features")
"""Where commands look for stores by themselves."""


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
class Cost:
    """What a run reads.

    Attributes:
        reads: the arrays that a step resumes from.
        image_bytes: for an image, its mask included.
        store_bytes: of all samples in all views that the run draws: what it needs of the store, before compression.
    """

    reads: tuple[str, ...]
    image_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class Member:
    """One run of a study.

    Attributes:
        name: of its folder, such as `fold-1`.
        group: what it is a measurement of; members of one group have one mean and spread.
        settings: what it is trained with.
        folder: a run folder like any other.
        cost: what it reads of the store.
    """

    name: str
    group: str
    settings: TrainingSettings
    folder: Path
    cost: Cost

    @property
    def state(self) -> Literal["done", "trained", "begun", "to do"]:
        """How far it has come."""
        if is_finished(self.folder):
            return "trained" if read_result(self.folder) is None else "done"
        return "begun" if has_state(self.folder) else "to do"


@dataclass(frozen=True)
class Study:
    """A study that can be run.

    Attributes:
        kind: what it varies.
        settings: what all members share.
        folder: of the study; its members lie in it.
        members: in the order in which they are run.
        lacking: a sentence a case that the store can't serve, with the command that stores what it wants.
        source: the training split.
        images: samples of the training split.
        content: a digest of these samples, by which other images or masks are noticed.
        tests: the test splits that are judged on; without any it is what is held out of training.
        weights: where the encoders' weights come from.
        paths: where data sets and stores lie.
    """

    kind: Kind
    settings: TrainingSettings
    folder: Path
    members: tuple[Member, ...]
    lacking: tuple[str, ...]
    source: SourceFolder
    images: int
    content: str
    tests: tuple[str, ...]
    weights: EncoderWeights
    paths: Paths

    @property
    def judged_on(self) -> str:
        """What the members are judged on, in words."""
        if self.kind == "folds":
            return "each on its own fold, so that every image is evaluated once"
        return ", ".join(self.tests) or f"the same held-out images of {self.source.split}"


def open_study(
    asked: Asked,
    settings: TrainingSettings,
    *,
    paths: Paths,
    weights: EncoderWeights,
    out: Path | None = None,
    progress: Progress = SILENT,
) -> Study:
    """Find the store, the members and their evaluation data; writes nothing.

    The evaluation data never choose a member's weights: if it is evaluated on held-out images (folds always are, others
    if the data set has no test split), its last weights are the result. The best of many epochs on the same images
    would be biased.

    Args:
        asked: what is varied.
        settings: what all members share; fields that the study varies it sets itself.
        paths: where data sets and stores lie.
        weights: where the encoders' weights come from.
        out: the study's folder; None: one named after data, encoders and kind, below `studies/`.
        progress: who is told.

    Raises `UsageError` for what can't be studied, or an `out` that holds another study.
    """
    store = _find_store(settings, paths.cache_root, progress)
    tests = () if asked.kind == "folds" else _test_splits(store.source)
    shared = _shared_settings(asked.kind, settings, store, held_out=not tests)
    if asked.kind == "folds":
        _check_parts(store, shared, asked.count)
    kind = f"folds-{asked.count}" if asked.kind == "folds" else asked.kind
    folder = out or Path("studies") / f"{store.path.parent.name}-{store.config.encoders_name}-{kind}"
    members, lacking = [], {}
    for name, (group, varied) in variants(asked, store.config, shared.seed).items():
        own = TrainingSettings(**{**_given(shared), **varied})
        cost = _cost(own, store, weights, paths.cache_root)
        if isinstance(cost, Cost):
            members.append(Member(name, group, own, folder / name, cost))
        elif asked.kind == "ablations":
            lacking[group] = f"{group} is left out, {cost}"
        else:
            raise UsageError(f"{name} can't be run, {cost}")
    if not members:
        raise UsageError(f"Nothing to study: {' '.join(lacking.values())}")
    study = Study(
        kind=asked.kind,
        settings=shared,
        folder=folder,
        members=tuple(members),
        lacking=tuple(lacking.values()),
        source=store.source,
        images=len(store.manifest.entries),
        content=_content(store, tests),
        tests=tuple(split.name for split in tests),
        weights=weights,
        paths=paths,
    )
    _check_folder(study)
    return study


def variants(asked: Asked, config: DSUNetConfig, first_seed: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """The members of a study by name, in the order in which they are run: of which group each is, and what it sets.

    Args:
        asked: what is to be varied.
        config: whose depth bounds a study of depth.
        first_seed: of the settings, from which repeats count.

    Raises `UsageError` for a depth that there is not.
    """
    if asked.kind == "folds":
        return {f"fold-{n}": ("folds", {"fold": f"{n}/{asked.count}"}) for n in range(1, asked.count + 1)}
    if asked.kind == "seeds":
        return {f"seed-{seed}": ("seeds", {"seed": seed}) for seed in range(asked.count)}
    [field], start = VARIES[asked.kind], FOLDER_STARTS[asked.kind]
    values = _depths(asked.depths, config) if asked.kind == "depth" else get_args(Ablation)
    found = {}
    for value in values:
        group = f"{start}{value}"
        for seed in range(first_seed, first_seed + asked.count):
            name = group if seed == first_seed else f"{group}-seed-{seed}"
            found[name] = group, {field: value, "seed": seed}
    return found


def _depths(asked: Sequence[str], config: DSUNetConfig) -> list[int]:
    """Numbers of adapted blocks, ascending, each once."""
    depth = config.hiera.depth
    for text in asked:
        if text != "all" and not (text.isdecimal() and int(text) <= depth):
            raise UsageError(
                f"--depths can't have {text!r}: this Hiera has {depth} blocks, so give numbers from 0 to {depth}, or "
                f"all."
            )
    return sorted({depth if text == "all" else int(text) for text in asked} or config.usual_depths)


def _cost(settings: TrainingSettings, store: FeatureStore, weights: EncoderWeights, cache_root: Path) -> Cost | str:
    """What a run reads of the store; or why it can't, a clause that ends with the command that stores what it lacks.

    Raises `UsageError` if it can't resume as asked.
    """
    config = config_asked(settings, store)
    available = store.available(settings.views)
    maps = [name for name in dict.fromkeys(config.injections.values()) if name not in available]
    if maps:
        places = {"--hiera-weights": weights.hiera, "--dino-weights": weights.dino}
        places["--cache-root"] = None if cache_root == _CACHE_ROOT else cache_root
        words = ["--features", ",".join(maps), "--views", settings.views]
        words += [word for option, path in places.items() if path is not None for word in (option, quote(str(path)))]
        words += ["--random-weights"] if weights.random else []
        return f"since the store lacks {', '.join(maps)} in the views {settings.views}: run {store.again(*words)}."
    point = resume_point(config, available, settings.start_feature)
    stored = settings.feature_dtype or store.feature_dtype
    sizes = {name: item_bytes(config, name, stored) for name in (*point.features, "mask")}
    views = {name: len({view_index(name, view) for view in settings.views.numbers}) for name in sizes}
    return Cost(
        reads=point.features,
        image_bytes=sum(sizes.values()),
        store_bytes=len(store.manifest.entries) * sum(sizes[name] * views[name] for name in sizes),
    )


def _find_store(settings: TrainingSettings, cache_root: Path, progress: Progress) -> FeatureStore:
    if settings.end_to_end:
        raise UsageError("A study needs one store, and end_to_end uses none: omit it.")
    encoders = encoders_asked(settings)
    return find_store(cache_root, settings.dataset, ("train", "all"), encoders, settings.tiling, progress)


def _test_splits(source: SourceFolder) -> tuple[Split, ...]:
    """The data set's test splits, which `dsu predict` takes. Raises `UsageError` for one without masks."""
    tests = [split for split in source.splits() if split.kind == "test"]
    for split in tests:
        if split.masks is None:
            raise UsageError(f"{split.name} has no masks for evaluation: add them, or move the test images elsewhere.")
    return tuple(tests)


def _shared_settings(
    kind: Kind, settings: TrainingSettings, store: FeatureStore, *, held_out: bool
) -> TrainingSettings:
    """What was given, naming the store that was found, without what the study varies."""
    source = store.source
    nothing_held_out = settings.val_fraction == 0 or (settings.val_fraction is None and source.benchmark)
    if held_out and kind != "folds" and settings.fold is None and nothing_held_out:
        raise UsageError(
            f"{source.split} has no test split and no held-out images for evaluation: give --val-fraction, such as 0.2."
        )
    if held_out and settings.keep == "best":
        raise UsageError(
            "keep: best would choose weights on the images used for evaluation: omit it to keep the last weights, "
            "or add a test split."
        )
    given = {name: value for name, value in _given(settings).items() if name not in VARIES[kind]}
    found = {"dataset": source.split, "tile": source.tile, "overlap": source.overlap}
    found |= store.config.encoder_settings | ({"keep": "last"} if held_out else {})
    return TrainingSettings(**{**given, **{name: value for name, value in found.items() if value is not None}})


def _given(settings: TrainingSettings) -> dict[str, Any]:
    """The fields that were given, so that those left open stay open, also to a resumed run."""
    named = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {name: value for name, value in named.items() if value not in (None, "auto")}


def _check_parts(store: FeatureStore, settings: TrainingSettings, parts: int) -> None:
    """Raise `UsageError` if a part would be empty: before the others are trained."""
    data = TrainingData(store.source, store.metadata, store.config, store, None, store.mask_format)
    weights = fold_weights(parts)
    if str(parts) not in deal(data.strata, weights, groups=data.groups(settings, weights, SILENT)).values():
        raise UsageError(f"{store.source.split} has too few images for {parts} folds: give a smaller -k.")


def _content(store: FeatureStore, tests: Sequence[Split]) -> str:
    """A digest of all samples: those trained on by their keys in the store, those that judge by their files.

    Which weights their features come from, and how masks are read, belong to it.
    """
    digest = hashlib.sha256(json.dumps([store.encoders, store.mask_format.to_json()], sort_keys=True).encode())
    for name, entry in store.manifest.samples():
        digest.update(f"{name}\t{entry.key}\n".encode())
    for split in tests:
        for pair in split.pairs:
            files = [file_sha256(path) for path in (pair.image, pair.mask) if path is not None]
            digest.update("\t".join((split.name, pair.name, *files, "\n")).encode())
    return digest.hexdigest()


def _check_folder(study: Study) -> None:
    """Raise `UsageError` if the folder, or a member's, holds what is not of this study."""
    if not study.folder.exists():
        return
    strangers = [
        path.parent.name
        for path in sorted(study.folder.glob(f"*/{SETTINGS_FILE}"))
        if not path.parent.name.startswith(FOLDER_STARTS[study.kind])
    ]
    if strangers:
        raise UsageError(
            f"{study.folder} contains other runs ({strangers[0]}): give the study its own folder with --out."
        )
    if (study.folder / SETTINGS_FILE).exists():
        check_same_run(study.folder, study.settings)
    results = [read_result(member.folder) for member in study.members]
    contents = {_noted_content(study.folder), *(result.content for result in results if result)}
    if contents - {None, study.content}:
        raise UsageError(
            f"{study.folder} was started with other images, masks or encoders of {study.source.split}, and all its "
            "runs must use the same: start again in another --out."
        )
    for member in study.members:
        if (member.folder / SETTINGS_FILE).exists():
            check_same_run(member.folder, settings_of_run(member.folder, member.settings))


def _noted_content(folder: Path) -> str | None:
    try:
        content = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))["content"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DsuError(f"{folder / STUDY_FILE} is damaged: remove it, and run the same command again.") from error
    return str(content)
