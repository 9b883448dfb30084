"""A head as a folder that the Hugging Face hub takes: the head, its settings as JSON, and a model card."""

import json
from pathlib import Path
from typing import Any, Final

from dsu.data.benchmarks import COD_TEST, PAGES
from dsu.errors import UsageError
from dsu.files import atomic_write, make_folder
from dsu.heads.head_file import CONFIG_FILE, HEAD_FILE, HeadInfo, head_bytes, load_head
from dsu.hub import is_repository
from dsu.progress import counted
from dsu.sharing.card_metrics import eval_results, metrics_section
from dsu.sharing.head_facts import HeadFacts, head_facts

__all__ = ["CARD_FILE", "export_folder", "model_card", "public_info"]

CARD_FILE: Final = "README.md"

_PUBLIC: Final = ("split", "dataset", "kind", "benchmark", "tile", "overlap")
"""What is told of the data set: not where its images lie, nor what those that were held out are called."""

_CITATION: Final = """```bibtex
@misc{xu2025dsunet,
  title = {DSU-Net: An Improved U-Net Model Based on DINOv2 and SAM2 with Multi-scale Cross-model Feature Enhancement},
  author = {Xu, Yimin and others},
  year = {2025},
  eprint = {2503.21187},
  archivePrefix = {arXiv}
}
@misc{ravi2024sam2,
  title = {SAM 2: Segment Anything in Images and Videos},
  author = {Ravi, Nikhila and others},
  year = {2024},
  eprint = {2408.00714},
  archivePrefix = {arXiv}
}
@misc{oquab2023dinov2,
  title = {DINOv2: Learning Robust Visual Features without Supervision},
  author = {Oquab, Maxime and others},
  year = {2023},
  eprint = {2304.07193},
  archivePrefix = {arXiv}
}
```"""


def export_folder(
    head: Path, out: Path, *, name: str | None = None, licence: str = "apache-2.0", overwrite: bool = False
) -> list[Path]:
    """Write a head with its model card and `config.json` into a folder.

    The head's tensors are the same to the bit. Of its data set only what is public is kept: see `public_info`.

    Args:
        head: its file.
        out: the folder, to be made.
        name: OWNER/NAME that the card calls it by; None makes one of the folder's name.
        licence: of the head, by its identifier on the hub.
        overwrite: write over files of an earlier export; others in the folder are left alone.

    Returns the files. Raises `UsageError` where something stands in the way, and `DsuError` as `load_head` and
    `atomic_write`.
    """
    if name is not None and not is_repository(name):
        raise UsageError(f"--name {name} is no OWNER/NAME as the hub has them: give letters, digits, '.', '_' and '-'.")
    _check_free(head, out, overwrite)
    facts = head_facts(head)
    state, info = load_head(head)
    named = name or f"OWNER/{out.resolve().name}"
    public = public_info(info)
    contents = {
        HEAD_FILE: head_bytes(state, public),
        CONFIG_FILE: (json.dumps(_config(facts, public), indent=2) + "\n").encode(),
        CARD_FILE: model_card(facts, named, licence).encode(),
    }
    make_folder(out)
    for filename, content in contents.items():
        atomic_write(out / filename, content)
    return [out / filename for filename in contents]


def public_info(info: HeadInfo) -> HeadInfo:
    """What of a head's metadata is for others: without paths of this machine and names of samples."""
    dataset = {key: info.dataset[key] for key in _PUBLIC if key in info.dataset}
    training = {**info.training}
    if isinstance(training.get("init_from"), str):
        training["init_from"] = Path(training["init_from"]).name
    return info.model_copy(update={"dataset": dataset, "training": training})


def model_card(facts: HeadFacts, name: str, licence: str = "apache-2.0") -> str:
    """The model card of a head as Markdown with the YAML that the hub reads in front.

    Args:
        facts: of the head.
        name: OWNER/NAME, as others are to call it.
        licence: of the head, by its identifier on the hub.
    """
    sections = [
        f"# {name.rpartition('/')[2]}",
        _what_it_is(facts),
        f"## How to use\n\n{_how_to_use(name)}",
        f"## Data\n\n{_data(facts)}",
        f"## Settings\n\n{_settings(facts)}",
        f"## Metrics\n\n{metrics_section(facts)}",
        f"## Encoders\n\n{_encoders(facts)}",
        f"## Limits\n\n{_limits(facts)}",
        f"## How it was made\n\n{_how_it_was_made(facts)}",
        f"## Citation\n\n{_CITATION}",
    ]
    return f"---\n{_front_matter(facts, name, licence)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _check_free(head: Path, out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give another folder with --out.")
    # A run's own head says where its images are, which `predict` without a SOURCE goes by.
    if out.is_dir() and (out.resolve() == head.parent.resolve() or (out / "settings.yaml").exists()):
        raise UsageError(f"{out} is a run's folder: give a folder of its own with --out.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UsageError(f"{out} is not empty: give another --out, or --overwrite to write over an earlier export.")


def _config(facts: HeadFacts, public: HeadInfo) -> dict[str, Any]:
    """Read by people and tools; dsu itself goes by the head's file alone."""
    fields = {**facts.to_json(), **public.model_dump(mode="json"), "encoders": facts.to_json()["encoders"]}
    return {"library_name": "dsu-net", **{key: value for key, value in fields.items() if key not in ("path", "bytes")}}


def _front_matter(facts: HeadFacts, name: str, licence: str) -> str:
    from huggingface_hub import ModelCardData

    results = eval_results(facts)
    repositories = [encoder.source.repository for encoder in facts.encoders if encoder.source]
    card = ModelCardData(
        license=licence,
        library_name="dsu-net",
        pipeline_tag="image-segmentation",
        tags=["dsu", "dsu-net", "image-segmentation", "sam2", "dinov2", *_task_tags(facts)],
        base_model=repositories or None,
        datasets=[str(facts.info.dataset.get("dataset", facts.data_name))] if facts.benchmark else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        model_name=name.rpartition("/")[2] if results else None,
    )
    if repositories:
        card["base_model_relation"] = "adapter"
    return card.to_yaml().strip()


def _task_tags(facts: HeadFacts) -> list[str]:
    if not facts.benchmark:
        return []
    camouflaged = str(facts.info.dataset.get("dataset")) in {"COD", *(name.removesuffix("-TE") for name in COD_TEST)}
    return ["camouflaged-object-detection" if camouflaged else "salient-object-detection"]


def _what_it_is(facts: HeadFacts) -> str:
    of = f", trained on {facts.data_name}" if facts.data_name else ""
    had = "drawn at random, alike everywhere" if facts.random else "fetched from where they are published"
    return (
        f"A head of DSU-Net{of}: adapters, feature fusion and decoder, {facts.parameters / 1e6:.3f} M parameters, that "
        f"make masks of one foreground from what frozen encoders see, {' and '.join(e.name for e in facts.encoders)}. "
        f"The encoders are not in this repository: they are {had}."
    )


def _how_to_use(name: str) -> str:
    return (
        "With the package `dsu-net`, installed from its source (`dsu` in the package registry is another program):\n\n"
        "```python\nfrom dsu import Segmenter\n"
        f'segmenter = Segmenter.from_pretrained("{name}")\n'
        'mask = segmenter("photo.jpg")  # float32 (height, width) in [0, 1]\n```\n\n'
        f"Or for a folder of images: `dsu predict FOLDER --head {name} --out masks`."
    )


def _data(facts: HeadFacts) -> str:
    if facts.data_name is None:
        return "Not noted in the head."
    page = PAGES.get(str(facts.info.dataset.get("dataset")))
    where = f"the training split of a public benchmark ({page})" if facts.benchmark and page else "its maker's own data"
    were = "was" if facts.held_out == 1 else "were"
    held = f" {counted(facts.held_out, facts.unit)} {were} held out to validate on." if facts.held_out else ""
    return f"{facts.data_name}, {where}.{held} No image is in this repository."


def _settings(facts: HeadFacts) -> str:
    info, config = facts.info, facts.info.config
    rows = [
        ("input", ", ".join(f"{encoder.name} at {encoder.size} px" for encoder in facts.encoders)),
        ("adapters", facts.adapters),
        ("features rounded to", info.feature_dtype or "nothing"),
        ("state after epoch", str(info.epoch)),
    ]
    if config.ablation != "none":
        rows.append(("ablation", f"{config.ablation} of the paper's Tables VII and VIII"))
    rows += facts.recipe.items()
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _encoders(facts: HeadFacts) -> str:
    lines = ["| encoder | weights | licence | sha256 of the weights as loaded |", "|---|---|---|---|"]
    for encoder in facts.encoders:
        source = encoder.source
        link = f"[{source.repository}](https://huggingface.co/{source.repository})" if source else ""
        weights = "random, the same for everyone" if encoder.random else link or "not published ones"
        licence = {"apache-2.0": "Apache 2.0"}.get(source.licence, source.licence) if source else ""
        lines.append(f"| {encoder.name} | {weights} | {licence} | `{encoder.sha256 or 'not noted'}` |")
    return "\n".join(lines) + "\n\nSAM 2's Hiera and DINOv2 are Meta's. Other weights than these are refused."


def _limits(facts: HeadFacts) -> str:
    limits = [
        "It marks one foreground, and knows no classes and no instances.",
        "It knows what its training data showed; on other kinds of images, try it first.",
        "Images are resized to squares, so that what is thin or tiny in large images may be lost.",
        "The training data's own terms may restrict what it may be used for.",
    ]
    if facts.random:
        limits.insert(0, "**Its encoders are random ones: it is for trying things out and segments nothing well.**")
    return "\n".join(f"- {limit}" for limit in limits)


def _how_it_was_made(facts: HeadFacts) -> str:
    if "imported_from" in facts.info.training:
        return f"Converted with dsu {facts.info.version} from a checkpoint of the authors' program."
    if facts.info.training.get("end_to_end"):
        return f"With dsu {facts.info.version}, end to end. `{CONFIG_FILE}` has every setting."
    return (
        f"With dsu {facts.info.version}, in two stages: the frozen encoders ran once over the training images "
        f"(`dsu cache-features`), and the head was trained from what they gave (`dsu train-head`), which is the same "
        f"as training end to end. `{CONFIG_FILE}` has every setting."
    )
