"""Computations of `dsu bench` from its timings; the command's own tests run it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recorded_graph import RefusingGraph
from support import toy_network
from torch.utils.flop_counter import FlopCounterMode

from dsu.bench.commands import CommandRow, StageRow, measure_eval, measure_stages
from dsu.bench.machine import (
    GpuWork,
    ReadRow,
    Timing,
    disk_rate,
    images,
    matrix_rate,
    random_store,
    ratio,
    summed,
    take_turns,
)
from dsu.bench.measure import Report, markdown_table
from dsu.bench.scale import measure_scale
from dsu.bench.steps import (
    BARE_DINO,
    DINO_PART,
    END_TO_END,
    GROUPED,
    PUBLISHED,
    STORE,
    StepRow,
    measure_steps,
)
from dsu.config import build_config
from dsu.distributed import ALONE
from dsu.encoders.weights import load_encoders
from dsu.graphs import GraphRunner
from dsu.network.network import DSUNet
from dsu.network.resume import feature_shape, resume_point
from dsu.progress import SILENT
from dsu.runtime import choose_runtime
from dsu.settings import EncoderWeights, ExtractionSettings

CONFIG = build_config("toy", hiera_size=128, dino_size=126)


def test_the_papers_depths() -> None:
    assert build_config("large").usual_depths == [48, 24, 12, 4, 0]


def test_cases_take_turns_and_a_ratio_is_the_median_over_rounds() -> None:
    calls: list[str] = []
    runtime = choose_runtime("cpu", "fp32")
    taken = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, runtime, repeat=2)
    assert "".join(calls) == "aabb" * 3
    assert len(taken["a"].seconds) == 3
    # A slow round does not change the ratio.
    assert ratio(Timing((1.0, 10.0, 1.0)), Timing((2.0, 20.0, 3.0))) == 2.0
    assert matrix_rate(runtime, (64,)) > 0


def test_the_temporary_store_has_features_for_all_depths_and_is_removed(tmp_path: Path) -> None:
    with random_store(CONFIG, tmp_path, samples=70) as stored:
        available = set(stored.store.arrays) - {"mask"}
        for depth in CONFIG.usual_depths:
            adapted = CONFIG.model_copy(update={"adapt_last": depth})
            assert resume_point(adapted, available).block == adapted.first_adapted
        for name, path in stored.plain.items():
            plain = np.load(path)
            rows = [stored.store.manifest.row(sample) for sample in stored.names]
            assert np.array_equal(stored.store.reader([name]).read(rows, [0] * 70)[name], plain[rows])
        assert stored.written > 0 and stored.disk > 0
    assert list(tmp_path.iterdir()) == []


def test_random_images_fit_the_network() -> None:
    batch = images(CONFIG, 3, dino=True)
    assert batch.views.tolist() == [0, 1, 2] and set(batch.images) == {"pixels", "mask", "dino_pixels"}
    network = toy_network().eval()
    with torch.no_grad():
        assert network(**batch.inputs).logits.shape == (3, 1, 128, 128)


def test_eval_gives_the_same_figures_as_pysodmetrics() -> None:
    found = measure_eval(choose_runtime("cpu", "fp32"), 2, 2, 1)
    assert found.same and found.images == 4
    assert found.speedup == pytest.approx(found.ours / found.library)


def test_files_for_the_disk_rate_are_removed(tmp_path: Path) -> None:
    assert disk_rate([0, 1000, 5], tmp_path) > 0
    assert list(tmp_path.iterdir()) == []


def test_stage_one_is_measured_with_its_default_features(tmp_path: Path) -> None:
    encoders = load_encoders(CONFIG, EncoderWeights(), hiera=True, dino=True)[:2]
    network = DSUNet(CONFIG, *encoders, feature_dtype=torch.float16).eval()
    found = measure_stages(network, choose_runtime("cpu", "fp32"), 3, tmp_path)
    assert [mix.features for mix in found.mixes] == [ExtractionSettings().features, ("V",)]
    assert [mix.count for mix in found.mixes] == [12, 3]
    size = {name: 2 * math.prod(feature_shape(CONFIG, name)) for name in ("V", "S1", "S2", "S3", "S4")}
    index, checksum = 64 * 16 + 4, 4
    pixels_and_mask = 3 * (4 * 128 * 128 + 2 * checksum) + 2 * index
    v = 3 * (size["V"] + checksum) + index
    levels = sum(3 * (size[name] + checksum) + index for name in ("S1", "S2", "S3", "S4"))
    assert [mix.nbytes for mix in found.mixes] == [pixels_and_mask + 4 * v + levels, pixels_and_mask + v]
    assert found.mixes[0].written == pytest.approx(found.mixes[0].nbytes / 12 * found.mixes[0].rate)
    assert all(min(row.rate, row.network, row.host) > 0 for row in (*found.mixes, found.prediction))
    assert found.prediction.count == 3 and found.prediction.disk is None
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `SILENT` is told, while no graph can be captured."""
    told: list[str] = []
    monkeypatch.setattr(type(SILENT), "say", lambda _, text: told.append(text))
    monkeypatch.setattr("dsu.graphs.EAGER_CALLS", 0)
    monkeypatch.setattr(GraphRunner, "on", lambda device, world=ALONE: GraphRunner(device, RefusingGraph, world))
    return told


REFUSAL = " · without a CUDA graph, which could not be captured (operation not permitted when stream is capturing)"


def test_refused_graphs_of_stage_one_and_prediction_are_named(said: list[str], tmp_path: Path) -> None:
    measure_stages(toy_network(feature_dtype=torch.float16).eval(), choose_runtime("cpu", "fp32"), 2, tmp_path)
    tasks = ["encoders alone"] * 2 + ["encoding data-TR"] * 4 + ["network alone"] + ["predicting drawn"] * 2
    assert [text for text in said if REFUSAL in text] == [task + REFUSAL for task in tasks]


def test_refused_graphs_of_training_steps_are_named(said: list[str], tmp_path: Path) -> None:
    runtime, network = choose_runtime("cpu", "fp32"), toy_network(feature_dtype=torch.float16).eval()
    with random_store(CONFIG, tmp_path, samples=4) as stored:
        rows = measure_steps(network, stored, runtime, batch_size=1, rounds=1, compiled=False)
    assert [text for text in said if REFUSAL in text] == [row.name + REFUSAL for row in rows]


def row(name: str, seconds: float, reads: tuple[str, ...] = ("pixels", "V"), wait: float | None = 0.01) -> StepRow:
    return StepRow(name, reads, Timing((seconds,)), 8 / seconds, 1e12, 8 / seconds, 10**9, wait, {"pixels": 10**6})


def test_gpu_work_is_summed_over_kernels() -> None:
    kernel = SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, self_device_time_total=1500.0, count=3)
    host = SimpleNamespace(device_type=torch.autograd.DeviceType.CPU, self_device_time_total=9e9, count=1000)
    assert summed([kernel, host, kernel]) == GpuWork(kernels=6, busy=0.003, eager=None)


def test_gpu_work_has_additional_columns(report: Report) -> None:
    assert "kernels" not in report.to_markdown() and "batch 32" not in report.to_markdown()
    assert "The same at batch 32" in replace(report, wide=report.steps).to_markdown()
    with_work = replace(report, steps=tuple(replace(one, gpu=GpuWork(4297, 0.5, 2.0)) for one in report.steps))
    head, _, first, *_ = with_work.to_markdown().split("\n\n")[1].splitlines()
    assert [cell.strip() for cell in head.split("|")][-4:-1] == ["kernels", "busy", "eager ms"]
    assert [cell.strip() for cell in first.split("|")][-4:-1] == ["4,297", "12%", "2,000"]


@pytest.fixture
def report() -> Report:
    return Report(
        device="a GPU",
        libraries="torch 2",
        date="2026-01-01",
        preset="large",
        precision="bf16",
        batch_size=8,
        rounds=3,
        matrix_rate=1e13,
        steps=(
            row(BARE_DINO, 4.0, ()),
            row(DINO_PART, 4.1, ()),
            row(END_TO_END, 8.0, wait=None),
            row(PUBLISHED, 5.0),
            replace(row(f"{STORE}all", 2.0), item_bytes={"pixels": 10**6, "V": 10**6, "mask": 10**6}),
            replace(row(f"{STORE}0", 0.5, ("S4",)), item_bytes={"S4": 20 * 10**6, "mask": 10**6}),
        ),
        reading=(ReadRow(("pixels", "mask", "V"), 740_000, 4000.0, 0.6, 100.0),),
        stages=StageRow(
            images=8,
            mixes=(
                CommandRow(("V", "S1", "S2", "S3", "S4"), 32, 95.0, 100.0, 1900.0, nbytes=32 * 10**6, disk=1.9e8),
                CommandRow(("V",), 8, 79.2, 80.0, 792.0, nbytes=10**6, disk=1.9e8),
            ),
            prediction=CommandRow((), 8, 30.0, 40.0, 120.0),
        ),
        written=2e8,
        disk=2.5e8,
    )


def test_the_report_has_rates_ratios_and_hours(report: Report) -> None:
    text = report.to_markdown()
    assert "takes 0.40 times as long as the same step with padded windows" in text
    assert "takes 1.02 times as long as DINOv2 alone" in text
    # 4 images/s of 1 TFLOP each, on a machine with a peak of 10 TFLOP/s.
    assert "| 4 |" in " ".join(next(line for line in text.splitlines() if f"{STORE}all " in line).split())
    assert "40%" in text
    # 74 MB/s from the cold disk: N = all needs 4 x 3 MB/s, N = 0 needs 16 x 21.
    assert "fast enough for N = all; too slow for N = 0 (336 MB/s)" in text
    # 50 x 10,553 images at 4 images/s take 36.6 hours.
    assert "36.6" in text
    # Stage one with four views each, at 95 views/s, takes another 7.4 minutes.
    assert "36.8" in text
    assert "The store was written at 200 MB/s, 80% of the disk's own 250 MB/s" in text
    rows = [" ".join(line.split()) for line in text.splitlines() if line.endswith("|") and "/s" in line and "`" in line]
    assert rows == [
        "| `cache-features`, V in 4 views, S1 to S4 in one, views/s | 95 | 100 (95%) | 1,900 (5%) | 95 | 190 (50%) |",
        "| `cache-features`, V in 1 view, views/s | 79.2 | 80 (99%) | 792 (10%) | 9.9 | 190 (5%) |",
        "| `predict --end-to-end`, images/s | 30 | 40 (75%) | 120 (25%) | | |",
    ]
    assert report.to_json()["steps"][4]["timing"]["seconds"] == (2.0,)


def test_tables_are_aligned() -> None:
    lines = markdown_table(["", "s"], [["a", "1.25"], ["long", "10"]], left=1)
    assert lines.splitlines() == ["|      |    s |", "| ---- | ---: |", "| a    | 1.25 |", "| long |   10 |"]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_operations_of_a_convolution_include_both_gradients(groups: int, transposed: bool) -> None:
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer, x = kind(8, 8, 3, padding=1, groups=groups), torch.randn(2, 8, 5, 5, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 25 * layer.weight.numel()


def test_simulated_stores_are_measured_at_each_size_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(measure: Callable[..., object], *arguments: object) -> object:
        return measure(*arguments)

    monkeypatch.setattr("dsu.bench.scale._in_new_process", here)
    rows = measure_scale(tmp_path, (300, 3000))
    assert [row.samples for row in rows] == [300, 3000] and list(tmp_path.iterdir()) == []
    assert 5 < rows[1].manifest / rows[0].manifest < 15, "the manifest grows with the samples"
    # 1,000 new samples are more than the 300 old ones, so old entries are written again; later only new ones are.
    assert rows[1].added < rows[1].manifest
    assert all(seconds > 0 for row in rows for seconds in (row.begin, row.open, row.add, row.epoch, row.info))
    report = Report("cpu", "torch", "today", "toy", "fp32", 2, 3, 1.0, scale=rows).to_markdown()
    assert "| 3,000 |" in report.replace("  ", "") and "x)" in report
