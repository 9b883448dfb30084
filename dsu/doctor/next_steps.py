"""What to do next, from what `dsu.doctor` found."""

import os
from collections.abc import Mapping
from pathlib import Path

from dsu.doctor.findings import Finding

__all__ = ["next_steps"]


def next_steps(sections: Mapping[str, tuple[Finding, ...]], data_root: Path, runs: Path) -> list[str]:
    """What is broken first; else the next of the four commands, and what it will fetch.

    Args:
        sections: what was found, by section.
        data_root: where benchmarks lie.
        runs: where run folders lie.
    """
    by_name = {finding.what: finding for found in sections.values() for finding in found}
    broken = [finding.remedy or finding.text for finding in by_name.values() if finding.state == "broken"]
    if broken:
        return broken
    steps = [finding.remedy for finding in sections["machine"] if finding.remedy]
    if by_name["trained heads"].value:
        return [*steps, *_with_a_head(runs)]
    if by_name["stores"].value:
        return [*steps, "Train from the features that are stored: `dsu train-head`."]
    large = by_name["large"]
    if large.state != "fine" and by_name["hub"].value:
        steps.append(f"{large.remedy} The hub may not be asked (HF_HUB_OFFLINE): give them by path.")
    elif large.state != "fine":
        steps.append("The first `dsu cache-features` fetches the weights that are not here from the hub.")
    train = [name.removesuffix("-TR") for name in by_name["benchmarks"].value if name.endswith("-TR")]
    where = f" --data-root {data_root}" if train and data_root != Path("data") and "DSU_DATA" not in os.environ else ""
    what = f"{train[0] if train else 'FOLDER'}{where}"
    return [*steps, f"Store features: `dsu cache-features {what}`; or try it all first: `dsu demo`."]


def _with_a_head(runs: Path) -> list[str]:
    """What is left to do with the newest head, which commands take by themselves."""
    newest = max(runs.glob("*/head.safetensors"), key=lambda path: path.stat().st_mtime).parent
    predictions = newest / "predictions"
    if (predictions / "metrics.json").exists():
        return [
            f"All four steps are done, {newest} is judged: see `dsu eval --report report.html` and `dsu head list`.",
            "Use its head: `dsu predict FOLDER --out masks`; or begin anew: `dsu cache-features NAME|FOLDER`.",
        ]
    if predictions.is_dir():
        return [f"Judge what {newest} predicted: `dsu eval`."]
    return ["Use the newest head: `dsu predict [FOLDER]`, then `dsu eval`."]
