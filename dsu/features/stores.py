"""Which store holds a data set's features, what its arrays are made of, and whether they still hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from dsu.choices import FeatureDtype, Precision
from dsu.config import DSUNetConfig
from dsu.data.datasets import SampleMetadata, inspect
from dsu.data.masks import MaskFormat
from dsu.data.sources import SourceFolder
from dsu.data.tiles import Tiling
from dsu.data.views import Views, view_index
from dsu.errors import DsuError, UsageError
from dsu.features.fingerprints import fingerprint
from dsu.network.resume import ResumePoint
from dsu.progress import SILENT, Progress
from dsu.runtime import Runtime
from dsu_cache import CacheError, CorruptError, Store, check_readable, is_store

__all__ = [
    "SourceFolder",
    "again",
    "available_features",
    "check_samples",
    "ensure_readable",
    "find_store",
    "find_stores",
    "fingerprint",
    "open_store",
    "sample_key",
    "store_folders",
    "store_path",
]


def store_path(cache_root: Path, split: str, config: DSUNetConfig) -> Path:
    """One store a split, a pair of encoders and their input sizes; depth and ablation share it."""
    return cache_root / split / encoders_name(config)


def encoders_name(config: DSUNetConfig) -> str:
    """The preset's name, or the parts' where they are no preset's."""
    if config.preset != "custom":
        return config.preset
    return f"hiera-{config.hiera.name}-{config.hiera_size}+dino-{config.dino.name}-{config.dino_size}"


def open_store(path: Path) -> Store:
    """The store in a folder. Raises `DsuError` or `CacheError` naming the folder where it can't be opened.

    Arrays whose metadata is damaged count as missing: who reads asks `ensure_readable` first.
    """
    try:
        return Store.open(path)
    except CorruptError as error:
        raise DsuError(
            f"The store {path} is damaged beyond mending ({_below(path, error)}): remove it (`dsu cache remove "
            f"{path}`) and run `dsu cache-features` again."
        ) from error


def ensure_readable(store: Store) -> None:
    """Check metadata, and that no one is writing, before anything is read.

    Raises `DsuError` naming the damaged file, and `BusyError` naming the process.
    """
    try:
        check_readable(store)
    except CorruptError as error:
        raise DsuError(
            f"The store {store.path} is damaged ({_below(store.path, error)}): run "
            f"{again(store)} again, it computes only what is damaged."
        ) from error


def _below(folder: Path, error: CorruptError) -> str:
    """What is wrong, with files named below the store's folder, which the sentence names already."""
    return str(error).replace(f"{folder}/", "")


def store_folders(cache_root: Path) -> list[Path]:
    """The folders of all stores below the cache root, damaged ones too, the one written last first."""
    folders = [folder for folder in cache_root.glob("*/*/") if is_store(folder)]
    return sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)


def source_of(store: Store) -> SourceFolder:
    """How the images of a store were found."""
    try:
        return SourceFolder(**_mapping(store, "source"))
    except TypeError as error:
        raise _foreign(store) from error


def config_of(store: Store) -> DSUNetConfig:
    """The encoders and sizes that a store was made with (its depth of adaptation has no meaning)."""
    try:
        return DSUNetConfig.model_validate(_mapping(store, "config"))
    except ValidationError as error:
        raise _foreign(store) from error


def encoders_of(store: Store) -> dict[str, str]:
    """Digests of the weights that a store's features come from."""
    return _mapping(store, "encoders")


def mask_format_of(store: Store) -> MaskFormat:
    """How a store's masks were read. Raises `DsuError` for a store without masks."""
    if "mask" not in store.arrays:
        raise DsuError(f"The store {store.path} has no masks: they are needed to train, and to compare with.")
    return MaskFormat.from_json(cast(dict[str, Any], store.arrays["mask"].fingerprint.fields["mask_format"]))


def _mapping(store: Store, name: str) -> dict[str, Any]:
    value = store.attributes.get(name)
    if not isinstance(value, Mapping):
        raise _foreign(store)
    return dict(value)


def _foreign(store: Store) -> DsuError:
    return DsuError(f"The store {store.path} was not written by this dsu: remove it, or give another --cache-root.")


def again(store: Store, options: str = "") -> str:
    """The command that made a store, to be typed again where something of it is missing, with other `options`."""
    preset = config_of(store).preset
    words = f" --preset {preset}" if preset not in ("large", "custom") else ""
    return f"`dsu cache-features {source_of(store).asked}{words}{options and f' {options}'}`"


def find_store(
    cache_root: Path,
    name: str | None,
    kinds: Sequence[str],
    encoders: str | None = None,
    tiling: Tiling | None = None,
) -> tuple[Store, SourceFolder]:
    """The store of a data set's split of one of `kinds`, written last; `name` None takes any data set.

    `name` is a data set, a split or a folder; `encoders` restricts to one pair of encoders, `tiling` to images that
    were cut so (None: to nothing, but of a named data set whole images go first). Raises `UsageError`
    saying what to run where there is none, and `DsuError` where there is a damaged one.
    """
    found = find_stores(cache_root, name, encoders)
    if name is not None and tiling is None:
        found.sort(key=lambda item: item[1].tiling is not None)
    for store, source in found:
        if source.kind in kinds and tiling in (None, source.tiling):
            ensure_readable(store)
            return store, source
    for folder in store_folders(cache_root) if name is None else ():
        if encoders in (None, folder.name):
            open_store(folder)  # A damaged store is the likelier reason, and opening it says so.
    what = "training features" if "train" in kinds else "features"
    of = f" of {name}" if name else ""
    made_with = f" made with {encoders}" if encoders else ""
    made_with += f" of tiles {tiling}" if tiling else ""
    likewise = " with the same options of network and tiles" if encoders or tiling else ""
    raise UsageError(
        f"There are no {what}{of}{made_with} below {cache_root}: run `dsu cache-features {name or 'NAME|FOLDER'}` "
        f"first{likewise}, or give --end-to-end."
    )


def find_stores(cache_root: Path, name: str | None, encoders: str | None) -> list[tuple[Store, SourceFolder]]:
    """All stores of a data set, a split or a folder (None: of any), the one written last first.

    Raises `DsuError` where one that is asked for is damaged; others' damage does not matter.
    """
    found = []
    for folder in store_folders(cache_root):
        if encoders not in (None, folder.name):
            continue
        try:
            store = open_store(folder)
        except (CacheError, DsuError):
            if name is not None and _is_split_of(folder.parent.name, Path(name).name):
                raise
            continue
        source = source_of(store)
        if name is None or _means(name, source):
            found.append((store, source))
    return found


def _is_split_of(split: str, name: str) -> bool:
    """Whether a split's name is a data set's, or begins with it: all there is to go by where a store is damaged."""
    return f"{split}-".casefold().replace("_", "-").startswith(f"{name}-".casefold().replace("_", "-"))


def _means(name: str, source: SourceFolder) -> bool:
    plain = name.casefold().replace("_", "-")
    if plain in (source.split.casefold().replace("_", "-"), source.dataset.casefold().replace("_", "-")):
        return True
    return Path(name).expanduser().resolve() == Path(source.reference)


def sample_key(facts: SampleMetadata) -> str:
    """What a row is keyed by: the content of image and mask."""
    return f"{facts.content}:{facts.mask_sha256}"


def available_features(store: Store, views: Views) -> set[str]:
    """Points and maps that hold every sample in all of `views`.

    Raises as `ensure_readable`.
    """
    ensure_readable(store)
    return {
        name
        for name in store.arrays
        if name != "mask" and not store.missing(name, [view_index(name, view) for view in views.numbers])
    }


def recorded_precision(store: Store) -> Precision:
    """The precision at which a store's features were computed; auto where it has none."""
    return cast(Precision, next((p for _, p in _recorded(store, "precision")), "auto"))


def recorded_feature_dtype(store: Store) -> FeatureDtype:
    """The type in which a store keeps its features."""
    return cast(FeatureDtype, next((kind for _, kind in _recorded(store, "type")), "float16"))


def recorded_encoder_batch_size(store: Store) -> int | None:
    """How many samples the encoders saw at once; None where no feature is stored."""
    return next((int(size) for _, size in _recorded(store, "encoder batch size")), None)


def _recorded(store: Store, field: str) -> list[tuple[str, Any]]:
    return [(n, a.fingerprint.fields[field]) for n, a in store.arrays.items() if field in a.fingerprint.fields]


def check_arrays(
    store: Store, point: ResumePoint, digests: Mapping[str, str], runtime: Runtime, feature_dtype: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Compare what is to be read with what this run's encoders would compute.

    An encoder that the run does not load (its features come from the store alone) is taken to be the store's.
    Returns the digests of both encoders, and what was made with another library version or device, to warn of.
    Raises `StaleError` listing the differing fields.
    """
    config = config_of(store)
    known = {**encoders_of(store), **digests}
    mask_format = mask_format_of(store) if "mask" in store.arrays else MaskFormat()
    wanted = {
        name: fingerprint(
            name,
            config,
            mask_format=mask_format,
            feature_dtype=feature_dtype,
            runtime=runtime,
            digests=known,
            encoder_batch_size=recorded_encoder_batch_size(store) or 0,
        )
        for name in (*point.features, "mask")
        if name in store.arrays
    }
    drift = store.check(wanted, "Run `dsu cache-features` again with --rebuild, or run with the store's settings.")
    return known, tuple(map(str, drift))


def stored_facts(store: Store) -> dict[str, SampleMetadata]:
    """What every sample was when it was stored. Raises `DsuError` where that is not in the manifest."""
    try:
        return {name: SampleMetadata.from_json(entry.info) for name, entry in store.manifest.entries.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise _foreign(store) from error


def check_samples(store: Store, source: SourceFolder, progress: Progress = SILENT) -> dict[str, SampleMetadata]:
    """Facts of every stored sample, after comparing the data set with the manifest.

    Sizes and times are compared; a file is hashed again only where they differ. Raises `DsuError` naming what is
    new, changed or gone. A data set that is no longer there is said, and the store is used as it is.
    """
    stored = stored_facts(store)
    split = source.find()
    if split is None:
        progress.say(f"The images of {source.split} are not at {source.place} any more: using the store as it is.")
        return stored
    facts = inspect(split, stored, progress, foreground=source.foreground).facts
    new = sorted(set(facts) - set(stored))
    gone = sorted(set(stored) - set(facts))
    changed = sorted(n for n in set(facts) & set(stored) if sample_key(facts[n]) != store.manifest.entries[n].key)
    if new or gone or changed:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (("new", new), ("changed", changed), ("gone", gone))
            if names
        ]
        raise DsuError(
            f"{source.split} is not what its features were made of: {', '.join(parts)}. Run {again(store)} "
            f"again: it computes only those."
        )
    return facts
