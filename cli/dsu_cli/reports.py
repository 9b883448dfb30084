"""Tables that commands print."""

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsu_cli.console import bytes_text, key_table

if TYPE_CHECKING:
    from dsu.equivalence import Comparison, Report
    from dsu.features.extraction import CachePlan

__all__ = ["equivalence_report", "extraction_table"]


def extraction_table(plan: "CachePlan") -> RenderableType:
    """What stage one is about to do: device, images, bytes by array, free disk."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, right in (("split", False), ("images", True), ("to do", True), ("array", False), ("bytes", True)):
        table.add_column(heading, justify="right" if right else "left")
    total = 0
    for extraction in plan.splits:
        cells = (
            extraction.split.name,
            f"{len(extraction.inspection.facts):,}",
            f"{extraction.images:,}",
        )
        for name, count in extraction.bytes_by_array.items():
            table.add_row(*cells, name, bytes_text(count))
            total += count
            cells = ("", "", "")
        if not extraction.todo:
            table.add_row(*cells, "all there", "0 B")
        for warning in extraction.drift:
            table.add_row("", "", "", Text(f"other version: {warning}", style="yellow"), "")
    facts = key_table(
        (
            ("device", plan.runtime.describe()),
            ("to write", f"{bytes_text(total)} (free: {bytes_text(plan.free_bytes)})"),
        )
    )
    return Group(table, facts)


def equivalence_report(report: "Report") -> RenderableType:
    """A row a stored tensor, the logits and the loss; gradients and weights by part, the worst one named."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for heading in ("difference", "relative", "allowance"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=len(heading))
    table.add_column("", no_wrap=True, min_width=4)
    if any(row.absolute for row in report.rows):
        table.add_column("worst at", overflow="fold")
    for label, rows in _equivalence_groups(report):
        worst = max(rows, key=lambda row: (not row.passed, row.absolute))
        where = (worst.where or (worst.what if len(rows) > 1 else "")) if worst.absolute else ""
        verdict = Text("pass", style="green") if worst.passed else Text("FAIL", style="bold red")
        cells: list[str | Text] = [
            label,
            f"{worst.absolute:.3g}",
            f"{worst.relative:.3g}",
            f"{worst.allowance:.3g}",
            verdict,
            where,
        ]
        table.add_row(*cells[: len(table.columns)])
    rounding = report.rounding
    facts = key_table(
        (
            ("compared", f"{report.steps} steps of {report.batch_size}, from {' + '.join(report.features)}"),
            ("device", report.runtime),
            (
                "float16 store",
                f"against float32: logits {rounding.logits:.3g}, masks {rounding.grey_levels} grey levels, "
                f"MAE {rounding.mae:.3g} (initial head, first batch)",
            ),
        )
    )
    return Group(table, facts)


def _equivalence_groups(report: "Report") -> list[tuple[str, list["Comparison"]]]:
    groups: dict[str, list[Comparison]] = {}
    for row in report.rows:
        part = row.what.partition(".")[0]
        label = row.what if row.stage in ("stored", "logits", "masks", "loss") else f"{row.stage}s of {part}"
        groups.setdefault(label, []).append(row)
    return [(f"{label} ({len(rows)})" if len(rows) > 1 else label, rows) for label, rows in groups.items()]
