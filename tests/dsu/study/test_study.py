"""Means, spreads and pooled scores against independent computations; tables and figures."""

import math
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from safetensors.numpy import save_file

from dsu.config import build_config
from dsu.errors import UsageError
from dsu.evaluation.evaluate import PredictionPair, evaluate
from dsu.settings import TrainingSettings
from dsu.study.plan import Cost, Member, Study, StudyRequest, variants
from dsu.study.reporting import _draw_cases, default_figures, draw_study, study_tables
from dsu.study.results import (
    Finished,
    Result,
    SetResult,
    pooled,
    read_result,
    result_of_set,
    spread,
    spreads,
    write_result,
)


def cases(folder: Path, count: int, empty: int) -> list[PredictionPair]:
    """Synthetic maps and masks; the last `empty` masks have no object."""
    rng = np.random.default_rng(count)
    folder.mkdir()
    found = []
    for index in range(count):
        mask = np.zeros((24, 32), np.uint8)
        if index < count - empty:
            mask[4 + index : 14 + index, 8:20] = 255
        noisy = np.clip(mask * rng.uniform(0.3, 1) + rng.uniform(0, 120, mask.shape), 0, 255).astype(np.uint8)
        paths = folder / f"{index}-map.png", folder / f"{index}-mask.png"
        for array, path in zip((noisy, mask), paths, strict=True):
            Image.fromarray(array).save(path)
        found.append(PredictionPair(f"{folder.name}-{index}", *paths))
    return found


def finished(name: str, group: str, sets: dict[str, SetResult], seconds: list[float]) -> Finished:
    member = Member(name, group, TrainingSettings(), Path(name), Cost(("pixels", "V"), 500_000, 10**9))
    return Finished(member, Result("0" * 64, "1" * 64, "a machine", 20, 3, seconds, sets))


def scored(**figures: float) -> dict[str, SetResult]:
    return {"tiles-VAL": SetResult(figures, 5, 0, {}, [])}


def test_pooled_figures_equal_those_of_one_evaluation_of_all_images(tmp_path: Path) -> None:
    parts = [cases(tmp_path / "one", 4, 1), cases(tmp_path / "two", 7, 2), cases(tmp_path / "three", 3, 0)]
    folds = [
        finished(f"fold-{index}", "folds", {"set": result_of_set(evaluate(part, normalize=False))}, [1.0])
        for index, part in enumerate(parts)
    ]
    found = pooled(folds, "set")
    together = result_of_set(evaluate([case for part in parts for case in part], normalize=False)).figures
    assert set(together) - set(found) == {"F_max", "E_max", "F_max_object", "E_max_object"}
    for figure, value in found.items():
        assert value == pytest.approx(together[figure], abs=1e-12), figure
    unweighted = fmean(fold.result.sets["set"].figures["S"] for fold in folds)
    assert abs(unweighted - found["S"]) > 1e-3, "folds of different sizes: the mean over folds differs"


def test_spread_divides_by_n_minus_1() -> None:
    found = spread([1.0, 2.0, 4.0])
    assert (found.mean, found.sd, found.count) == (
        pytest.approx(7 / 3),
        pytest.approx(np.std([1, 2, 4], ddof=1)),
        3,
    )
    assert math.isnan(spread([1.0]).sd) and math.isnan(spread([]).mean)


def test_groups_of_one_have_no_spread_and_undefined_figures_are_left_out() -> None:
    members = [
        finished("depth-0", "depth-0", scored(S=0.5), [1]),
        finished("depth-4", "depth-4", scored(S=0.6, AUROC=0.7), [1]),
        finished("depth-4-seed-1", "depth-4", scored(S=0.8), [1]),
    ]
    found = spreads(members, "tiles-VAL", ("S", "AUROC"))
    assert list(found) == ["depth-4"]
    assert found["depth-4"]["S"].mean == pytest.approx(0.7) and found["depth-4"]["S"].count == 2
    assert found["depth-4"]["AUROC"].count == 1


def test_tables_of_depth_have_costs_and_those_of_seeds_mean_and_spread() -> None:
    seeds = [finished(f"seed-{n}", "seeds", scored(S=0.5 + 0.1 * n, MAE=0.1), [60.0, 5.0]) for n in range(2)]
    [table] = study_tables("seeds", seeds, ("S", "MAE", "IoU"))
    assert table.headings == ("tiles-VAL", "S ↑", "MAE ↓", "IoU ↑", "time")
    assert [*table.members, *table.summaries] == [
        ("seed-0", "0.5000", "0.1000", "–", "1:05"),
        ("seed-1", "0.6000", "0.1000", "–", "1:05"),
        ("mean", "0.5500", "0.1000", "–", "1:05"),
        ("sd", "0.0707", "0.0000", "–", "0:00"),
    ]
    assert "| mean | 0.5500 |" in table.to_markdown()
    latex = table.to_latex()
    assert latex.startswith("\\begin{tabular}{lrrrr}\n\\toprule\ntiles-VAL & S $\\uparrow$ & MAE $\\downarrow$")
    assert "seed-1 & 0.6000 & 0.1000 & -- & 1:05 \\\\\n\\midrule\nmean & 0.5500" in latex
    [table] = study_tables("depth", [finished("depth-0", "depth-0", scored(S=0.5), [60.0, 6.0, 6.0])], ("S",))
    assert table.members == [("depth-0", "0.5000", "1:12", "6", "2", "0.50", "1")]


def test_dots_of_single_runs_are_hollow_and_not_connected() -> None:
    def lines(seeds: int) -> list[tuple[str, bool]]:
        """Line style of each plotted line, and whether its marks are hollow."""
        members = [
            finished(f"depth-{depth}-seed-{seed}", f"depth-{depth}", scored(S=0.5 + 0.1 * seed), [1])
            for depth in (0, 4)
            for seed in range(seeds)
        ]
        axes = Figure().subplots()
        _draw_cases(axes, "depth", members, lambda one: one.result.sets["tiles-VAL"].figures["S"])
        drawn = [line for line in axes.lines if line.get_color() == "#08519c"]
        return [(str(line.get_linestyle()), line.get_markerfacecolor() == "none") for line in drawn]

    assert lines(1) == [("None", True)] * 2
    assert lines(2) == [("None", False)] * 2 + [("-", False)]


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ((0.0, 0.0), (0, 0.11)),  # nothing below 0
        ((1.0, 0.9, 0.5), (0.3, 1)),
        ((0.0, 1.0), (0, 1)),  # the band exceeds both ends
        ((0.912, 0.913), (0.86, 0.97)),  # a random difference looks small
    ],
)
def test_axis_limits_stay_within_0_to_1_and_at_least_a_tenth_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[float, ...], limits: tuple[float, float]
) -> None:
    drawn: list[tuple[float, float]] = []
    save = Figure.savefig

    def saved(self: Figure, *arguments: Any, **options: Any) -> None:
        drawn.extend(axes.get_ylim() for axes in self.axes if axes.get_visible())
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    seeds = [finished(f"seed-{n}", "seeds", scored(misses=value), [1.0]) for n, value in enumerate(values)]
    study = cast(Study, SimpleNamespace(kind="seeds", source=SimpleNamespace(split="tiles")))
    draw_study(study, seeds, ("misses",), tmp_path / "study.png")
    [(low, high)] = drawn
    assert 0 <= low < high <= 1 and high - low > 0.099 and (tmp_path / "study.png").is_file()
    assert (low, high) == pytest.approx(limits, abs=0.03)


def test_images_without_an_object_change_the_default_figures() -> None:
    plain = finished("seed-0", "seeds", scored(S=1), [1])
    assert default_figures([plain]) == ("S", "F_adaptive", "E_mean", "MAE", "IoU")
    sets: dict[str, Any] = {"tiles-VAL": SetResult({}, 5, 2, {}, [])}
    told = default_figures([plain, finished("seed-1", "seeds", sets, [1])])
    assert {"false_alarms", "misses", "AUROC", "IoU_object", "F_adaptive_object"} < set(told) and "IoU" not in told


def test_a_result_counts_only_for_the_head_that_was_evaluated(tmp_path: Path) -> None:
    from dsu.heads.head_file import head_sha256

    head = tmp_path / "head.safetensors"
    save_file({"side": np.zeros(3)}, head)
    result = Result(head_sha256(head), "1" * 64, "a machine", 5, 1, [1.5], scored(S=0.25))
    write_result(tmp_path, result)
    assert read_result(tmp_path) == result
    save_file({"side": np.zeros(3)}, head, metadata={"dsu": "its threshold, say"})
    assert read_result(tmp_path) == result, "only tensors count, not metadata"
    save_file({"side": np.ones(3)}, head)
    assert read_result(tmp_path) is None
    (tmp_path / "evaluation.json").write_text('{"sets": 3}')
    assert read_result(tmp_path) is None


def test_varied_settings_of_each_member() -> None:
    large = build_config("large")

    def varied(asked: StudyRequest, first_seed: int = 0) -> list[dict[str, Any]]:
        return [settings for _, settings in variants(asked, large, first_seed).values()]

    assert varied(StudyRequest("folds", 2)) == [{"fold": "1/2"}, {"fold": "2/2"}]
    assert varied(StudyRequest("seeds", 2), 7) == [{"seed": 0}, {"seed": 1}]
    assert varied(StudyRequest("depth"), 7) == [{"adapt_last": depth, "seed": 7} for depth in (0, 4, 12, 24, 48)]
    chosen = variants(StudyRequest("depth", 2, ("all", "0", "48")), large, 7)
    assert list(chosen) == ["depth-0", "depth-0-seed-8", "depth-48", "depth-48-seed-8"]
    assert [group for group, _ in chosen.values()] == ["depth-0", "depth-0", "depth-48", "depth-48"]
    assert [settings["ablation"] for settings in varied(StudyRequest("ablations"))] == ["none", "A", "B", "C"]
    for odd in ("49", "-1", "half", ""):
        with pytest.raises(UsageError, match="from 0 to 48"):
            variants(StudyRequest("depth", 1, (odd,)), large, 0)
