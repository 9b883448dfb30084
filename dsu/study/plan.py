"""Plan a study: its folder, members, varied settings, the features that each member reads, and the evaluation data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Final, Literal, get_args

from dsu.config import Ablation, DSUNetConfig
from dsu.data.datasets import Paths, SourceFolder
from dsu.data.images import file_sha256
from dsu.data.pairing import Split
from dsu.data.splitting import assign_shares, fold_weights
from dsu.data.views import view_index
from dsu.errors import DsuError, UsageError
from dsu.features.stores import FeatureStore, find_training_store
from dsu.heads.head_file import is_finished
from dsu.network.resume import item_bytes, resume_point
from dsu.progress import SILENT, Progress
from dsu.settings import EncoderWeights, TrainingSettings
from dsu.study.results import read_result
from dsu.training.run_folders import SETTINGS_FILE, check_same_run, has_state, settings_of_run
from dsu.training.training_data import TrainingData, requested_config, requested_encoders

STUDY_FILE: Final = "study.json"

Kind = Literal["folds", "seeds", "depth", "ablations"]

VARIES: Final[Mapping[Kind, tuple[str, ...]]] = {
    "folds": ("fold", "val_fraction"),
    "seeds": ("seed",),
    "depth": ("adapt_last",),
    "ablations": ("ablation",),
}
"""The settings that each kind of study sets itself."""

FOLDER_STARTS: Final[Mapping[Kind, str]] = {
    "folds": "fold-",
    "seeds": "seed-",
    "depth": "depth-",
    "ablations": "ablation-",
}
"""Prefixes of the members' folder names."""

_CACHE_ROOT: Final = Path("features")
"""The commands' default folder of stores."""


@dataclass(frozen=True)
class StudyRequest:
    """The kind and size of a study.

    Attributes:
        kind: the kind of study.
        count: number of folds; for other kinds the number of seeds per case, starting at the settings' seed (at 0 in a
            study of seeds).
        depths: for a study of depth: numbers of adapted blocks, or `all`; empty: those that suit the Hiera.
    """

    kind: Kind
    count: int = 1
    depths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """The arrays that a run reads, and their sizes.

    Attributes:
        reads: the arrays that a step resumes from.
        image_bytes: bytes per image, including its mask.
        store_bytes: uncompressed bytes of all samples in all views that the run may draw.
    """

    reads: tuple[str, ...]
    image_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class Member:
    """One run of a study.

    Attributes:
        name: the folder's name, such as `fold-1`.
        group: the case that it repeats; mean and spread are computed over the members of a group.
        settings: its training settings.
        folder: an ordinary run folder.
        cost: the arrays that it reads from the store.
    """

    name: str
    group: str
    settings: TrainingSettings
    folder: Path
    cost: Cost

    @property
    def state(self) -> Literal["done", "trained", "begun", "to do"]:
        """Its progress."""
        if is_finished(self.folder):
            return "trained" if read_result(self.folder) is None else "done"
        return "begun" if has_state(self.folder) else "to do"


@dataclass(frozen=True)
class Study:
    """A planned study.

    Attributes:
        kind: the kind of study.
        settings: the settings that all members share.
        folder: the study's folder, which contains the members' folders.
        members: in the order of execution.
        left_out: one sentence for each case without stored features, with the command that stores them.
        source: the training split.
        images: number of samples in the training split.
        content: a hash of these samples and the test files, to detect other images or masks.
        tests: names of the test splits used for evaluation; if empty, members are evaluated on held-out images.
        weights: where the encoders' weights come from.
        paths: the folders of data sets and stores.
    """

    kind: Kind
    settings: TrainingSettings
    folder: Path
    members: tuple[Member, ...]
    left_out: tuple[str, ...]
    source: SourceFolder
    images: int
    content: str
    tests: tuple[str, ...]
    weights: EncoderWeights
    paths: Paths

    @property
    def evaluated_on(self) -> str:
        """The evaluation data, in words."""
        if self.kind == "folds":
            return "each on its own fold, so that every image is evaluated once"
        return ", ".join(self.tests) or f"the same held-out images of {self.source.split}"


def open_study(
    request: StudyRequest,
    settings: TrainingSettings,
    *,
    paths: Paths,
    weights: EncoderWeights,
    out: Path | None = None,
    progress: Progress = SILENT,
) -> Study:
    """Find the store, the members and their evaluation data, without writing anything.

    The evaluation data never choose a member's weights. If members are evaluated on held-out images (folds always,
    other kinds if the data set has no test split), their last weights are the result, since the best of many epochs on
    the same images would be biased.

    Args:
        request: the kind and size of the study.
        settings: the settings that all members share; the study overrides those that it varies.
        paths: the folders of data sets and stores.
        weights: where the encoders' weights come from.
        out: the study's folder; None: one named after data, encoders and kind, below `studies/`.
        progress: receives messages.

    Raises `UsageError` if no member can be trained or evaluated, or if `out` contains another study.
    """
    store = _find_store(settings, paths.cache_root, progress)
    tests = () if request.kind == "folds" else _test_splits(store.source)
    shared = _shared_settings(request.kind, settings, store, held_out=not tests)
    if request.kind == "folds":
        _check_parts(store, shared, request.count)
    kind = f"folds-{request.count}" if request.kind == "folds" else request.kind
    folder = out or Path("studies") / f"{store.path.parent.name}-{store.config.encoders_name}-{kind}"
    members, left_out = [], {}
    for name, (group, varied) in variants(request, store.config, shared.seed).items():
        own = TrainingSettings(**{**_given_fields(shared), **varied})
        cost = _cost(own, store, weights, paths.cache_root)
        if isinstance(cost, Cost):
            members.append(Member(name, group, own, folder / name, cost))
        elif request.kind == "ablations":
            left_out[group] = f"{group} is left out, {cost}"
        else:
            raise UsageError(f"{name} can't be run, {cost}")
    if not members:
        raise UsageError(f"Nothing to study: {' '.join(left_out.values())}")
    study = Study(
        kind=request.kind,
        settings=shared,
        folder=folder,
        members=tuple(members),
        left_out=tuple(left_out.values()),
        source=store.source,
        images=len(store.manifest.entries),
        content=_content(store, tests),
        tests=tuple(split.name for split in tests),
        weights=weights,
        paths=paths,
    )
    _check_folder(study)
    return study


def variants(request: StudyRequest, config: DSUNetConfig, first_seed: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """The members of a study by name, in the order in which they are run: each one's group and varied settings.

    Args:
        request: the kind and size of the study.
        config: the network; its Hiera's depth is the upper limit in a study of depth.
        first_seed: the settings' seed; repeated runs use this and the following ones.

    Raises `UsageError` if a depth is not a number from 0 to Hiera's depth.
    """
    if request.kind == "folds":
        return {f"fold-{n}": ("folds", {"fold": f"{n}/{request.count}"}) for n in range(1, request.count + 1)}
    if request.kind == "seeds":
        return {f"seed-{seed}": ("seeds", {"seed": seed}) for seed in range(request.count)}
    [field], start = VARIES[request.kind], FOLDER_STARTS[request.kind]
    values = _depths(request.depths, config) if request.kind == "depth" else get_args(Ablation)
    found = {}
    for value in values:
        group = f"{start}{value}"
        for seed in range(first_seed, first_seed + request.count):
            name = group if seed == first_seed else f"{group}-seed-{seed}"
            found[name] = group, {field: value, "seed": seed}
    return found


def _depths(requested: Sequence[str], config: DSUNetConfig) -> list[int]:
    """The requested numbers of adapted blocks, ascending and without duplicates."""
    depth = config.hiera.depth
    for text in requested:
        if text != "all" and not (text.isdecimal() and int(text) <= depth):
            raise UsageError(
                f"--depths can't have {text!r}: this Hiera has {depth} blocks, so give numbers from 0 to {depth}, or "
                f"all."
            )
    return sorted({depth if text == "all" else int(text) for text in requested} or config.usual_depths)


def _cost(settings: TrainingSettings, store: FeatureStore, weights: EncoderWeights, cache_root: Path) -> Cost | str:
    """What a run reads from the store; or a clause that says what is not stored and which command stores it.

    Raises `UsageError` if the run can't resume from the requested feature.
    """
    config = requested_config(settings, store)
    available = store.available(settings.views)
    maps = [name for name in dict.fromkeys(config.injections.values()) if name not in available]
    if maps:
        places = {"--hiera-weights": weights.hiera, "--dino-weights": weights.dino}
        places["--cache-root"] = None if cache_root == _CACHE_ROOT else cache_root
        words = ["--features", ",".join(maps), "--views", settings.views]
        words += [word for option, path in places.items() if path is not None for word in (option, quote(str(path)))]
        words += ["--random-weights"] if weights.random else []
        return f"since the store lacks {', '.join(maps)} in the views {settings.views}: run {store.command(*words)}."
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
    encoders = requested_encoders(settings)
    return find_training_store(cache_root, settings.dataset, encoders, settings.tiling, progress)


def _test_splits(source: SourceFolder) -> tuple[Split, ...]:
    """The data set's test splits, as `dsu predict` finds them. Raises `UsageError` if one has no masks."""
    tests = [split for split in source.splits() if split.kind == "test"]
    for split in tests:
        if split.masks is None:
            raise UsageError(f"{split.name} has no masks for evaluation: add them, or move the test images elsewhere.")
    return tuple(tests)


def _shared_settings(
    kind: Kind, settings: TrainingSettings, store: FeatureStore, *, held_out: bool
) -> TrainingSettings:
    """The given settings without those that the study varies, completed by the store's data set and encoders."""
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
    given = {name: value for name, value in _given_fields(settings).items() if name not in VARIES[kind]}
    found = {"dataset": source.split, "tile": source.tile, "overlap": source.overlap}
    found |= store.config.encoder_settings | ({"keep": "last"} if held_out else {})
    return TrainingSettings(**{**given, **{name: value for name, value in found.items() if value is not None}})


def _given_fields(settings: TrainingSettings) -> dict[str, Any]:
    """The fields that were given. All others stay unset: a resumed run keeps its own values for them."""
    named = {name: getattr(settings, name) for name in settings.model_fields_set}
    return {name: value for name, value in named.items() if value not in (None, "auto")}


def _check_parts(store: FeatureStore, settings: TrainingSettings, parts: int) -> None:
    """Raise `UsageError` if a fold would be empty, before any fold is trained."""
    data = TrainingData(store.source, store.metadata, store.config, store, None, store.mask_format)
    weights = fold_weights(parts)
    if str(parts) not in assign_shares(data.strata, weights, groups=data.groups(settings, weights, SILENT)).values():
        raise UsageError(f"{store.source.split} has too few images for {parts} folds: give a smaller -k.")


def _content(store: FeatureStore, tests: Sequence[Split]) -> str:
    """A hash of all samples: training samples by their keys in the store, test samples by their files.

    It includes the hashes of the encoders' weights and the mask format.
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
    """Raise `UsageError` if the study's folder, or a member's, contains something from another study."""
    if not study.folder.exists():
        return
    foreign = [
        path.parent.name
        for path in sorted(study.folder.glob(f"*/{SETTINGS_FILE}"))
        if not path.parent.name.startswith(FOLDER_STARTS[study.kind])
    ]
    if foreign:
        raise UsageError(
            f"{study.folder} contains other runs ({foreign[0]}): give the study its own folder with --out."
        )
    if (study.folder / SETTINGS_FILE).exists():
        check_same_run(study.folder, study.settings)
    results = [read_result(member.folder) for member in study.members]
    contents = {_recorded_content(study.folder), *(result.content for result in results if result)}
    if contents - {None, study.content}:
        raise UsageError(
            f"{study.folder} was started with other images, masks or encoders of {study.source.split}, and all its "
            "runs must use the same: start again in another --out."
        )
    for member in study.members:
        if (member.folder / SETTINGS_FILE).exists():
            check_same_run(member.folder, settings_of_run(member.folder, member.settings))


def _recorded_content(folder: Path) -> str | None:
    try:
        content = json.loads((folder / STUDY_FILE).read_text(encoding="utf-8"))["content"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DsuError(f"{folder / STUDY_FILE} is damaged: remove it, and run the same command again.") from error
    return str(content)
