"""What `dsu cache` prints."""

import json
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsu.progress import counted
from dsu_cli.console import bytes_text, key_table, out, table

if TYPE_CHECKING:
    from dsu.features.upkeep import ArrayState, StoreState, Verification
    from dsu_cache import Finding

__all__ = ["print_json", "store_report", "stores_table", "verification_lines"]

_SHOWN = 5
"""How many samples are named one by one."""

_OTHER_COLUMNS = 62
"""Letters that the columns beside a store's name want where the arrays are folded."""
_LEAST_NAME = 18

_DIGITS = 12
"""Of a digest, that are enough to tell weights apart; `--json` has all."""


def print_json(value: Any) -> None:
    """One JSON document on standard output, and nothing else there."""
    print(json.dumps(value, indent=1))


def stores_table(states: Sequence["StoreState"]) -> Table:
    """One row a store. Where it is narrow, the arrays are folded first, and names at hyphens only."""
    shown = table(("split", "encoders", "samples", "arrays", "size", "state", "last change"), {"samples", "size"})
    names = [_folded(state.split or state.path.parent.name) for state in states]
    shown.columns[0].no_wrap = True
    # What is not to be folded would else be cut off on a very narrow terminal.
    shown.columns[0].min_width = max((len(line) for name in names for line in name.splitlines()), default=0)
    for name, state in zip(names, states, strict=True):
        shown.add_row(
            name,
            state.path.name,
            f"{state.samples:,}" if state.split else "",
            " ".join(array.name for array in state.arrays),
            bytes_text(state.nbytes),
            _state_text(state),
            f"{state.changed:%Y-%m-%d %H:%M}",
        )
    return shown


def _folded(name: str) -> str:
    """A name on as few lines as leave the other columns their room."""
    return textwrap.fill(name, max(_LEAST_NAME, out.width - _OTHER_COLUMNS))


def store_report(state: "StoreState") -> RenderableType:
    """All that is known of one store: facts, then a row an array."""
    facts = [("store", str(state.path)), ("state", str(_state_text(state)))]
    facts += [("damaged", reason) for reason in state.damage]
    if state.split:
        there = "" if state.source_there else " (not there any more)"
        facts += [
            ("images", f"{state.samples:,} of {state.split}, from {state.source}{there}"),
            ("encoders", f"{state.encoders}{_random_text(state.random)}"),
        ]
        facts += [(f"  {encoder}", digest) for encoder, digest in _weights(state.arrays)]
        facts += [("compressor", state.compressor or "none"), ("orphaned rows", f"{state.orphaned_rows:,}")]
    if state.writer:
        facts.append(("written by", state.writer))
    facts += [("size", bytes_text(state.nbytes)), ("last change", f"{state.changed:%Y-%m-%d %H:%M:%S}")]
    drift = {item for array in state.arrays for item in array.drift}
    facts += [("other version", item) for item in sorted(drift)]
    return Group(key_table(facts), *([_arrays_table(state.arrays)] if state.arrays else []), "")


def _arrays_table(arrays: Sequence["ArrayState"]) -> Table:
    """A row an array; what they lack is a column only where something does."""
    lacking = [_lacks(array) for array in arrays]
    headings = ("array", "a sample", "type", "views", "shards", "size", *(["lacks"] if any(lacking) else []))
    shown = table(headings, {"views", "shards", "size"})
    for array, lacks in zip(arrays, lacking, strict=True):
        cells = (
            array.name,
            "x".join(map(str, array.item_shape)),
            array.dtype,
            str(len(array.views)),
            f"{array.shards - array.missing_shards} of {array.shards}",
            bytes_text(array.nbytes),
            Text(lacks, style="yellow"),
        )
        shown.add_row(*cells[: len(headings)])
    return shown


def verification_lines(result: "Verification") -> tuple[list[str], list[str]]:
    """What is wrong, a sentence each and the way out at the end; and what is to be said beside it."""
    if result.unopenable:
        return [result.unopenable], []
    problems = [f"{result.path}/{_finding_text(finding)}." for finding in result.findings]
    for names, what in ((result.changed, "changed"), (result.new, "new"), (result.gone, "gone")):
        if names:
            problems.append(f"{result.split}: {_named(names)} {what} since the features were made.")
    read = "features, images and masks" if result.source_there else "features"
    remarks = [f"{result.split}: {bytes_text(result.nbytes)} of {read} read."]
    if not result.source_there:
        remarks.append(f"{result.split}: its images are not at {result.reference} any more, so they were not compared.")
    if result.passed:
        return problems, [f"{result.path} is whole.", *remarks]
    again = f"`dsu cache-features {result.reference}`"
    if result.unmarked and any(finding.commit for finding in result.findings):
        problems.append(
            f"{result.path}: nothing was marked as missing ({result.unmarked}), so {again} keeps it as it is."
        )
    else:
        marked = f"{result.marked:,} marked as missing, their data left where it is; " if result.marked else ""
        problems.append(f"{result.path}: {marked}{again} with the same options computes exactly what is named here.")
    return problems, remarks


def _finding_text(finding: "Finding") -> str:
    text = str(finding)
    if finding.shard is not None:
        text += f" (array {finding.array}, view {finding.shard.view}, shard {finding.shard.shard})"
    if finding.unreadable:
        return f"{text}: damaged {_named(finding.unreadable)}, to be computed with {len(finding.samples):,} in all"
    return f"{text}: {_named(finding.samples)} lost" if finding.samples else text


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{counted(len(names), 'samples')} ({shown})"


def _state_text(state: "StoreState") -> Text:
    if state.damage:
        return Text("damaged", style="bold red")
    if state.writer:
        return Text("being written", style="yellow")
    if state.complete:
        return Text("complete", style="green")
    lacking = {name for array in state.arrays for name in array.missing_samples}
    return Text(f"{counted(len(lacking), 'samples')} incomplete" if lacking else "nothing stored", style="yellow")


def _random_text(random: bool | None) -> str:
    return {True: " (random weights)", False: " (pretrained weights)", None: ""}[random]


def _weights(arrays: Sequence["ArrayState"]) -> list[tuple[str, str]]:
    found = {(array.encoder, array.weights) for array in arrays if array.encoder and array.weights}
    return sorted((encoder, f"sha256 {weights[:_DIGITS]}") for encoder, weights in found if encoder is not None)


def _lacks(array: "ArrayState") -> str:
    if not array.views:
        return "everything"
    if not array.missing_shards:
        return ""
    return f"{counted(array.missing_shards, 'shards')}: {_named(array.missing_samples)}"
