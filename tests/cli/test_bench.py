import json
from pathlib import Path

import pytest
from support import TINY, Dsu

from dsu.bench import PARTS


@pytest.mark.slow
def test_bench_measures_the_network_and_leaves_no_files(dsu: Dsu) -> None:
    arguments = (
        "--parts",
        "steps,reading,stages",
        "--random-weights",
        "--rounds",
        1,
        "--images",
        2,
        "--batch-size",
        2,
        "--json",
        "new/bench.json",
        "--quiet",
    )
    text = dsu("bench", *TINY, *arguments).output
    for expected in ("end to end, N = all", "from the store, N = 0", "of memory maps", "cache-features", "predict"):
        assert expected in text
    figures = json.loads(Path("new/bench.json").read_text())
    steps = {step["name"]: step for step in figures["steps"]}
    assert steps["end to end, N = all"]["flop"] > steps["from the store, N = all"]["flop"] > 0
    assert steps["from the store, N = all, as published"]["flop"] > steps["from the store, N = all"]["flop"]
    assert steps["from the store, N = 0"]["wait"] is not None
    assert figures["evaluation"] is None
    assert figures["stages"]["images"] == 2
    assert list(Path("features").iterdir()) == []


def test_bench_measures_all_parts_by_default(dsu: Dsu, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsu.bench import measure

    asked: list[str] = []

    def bench(*_: object, parts: list[str], **__: object) -> measure.Report:
        asked.extend(parts)
        return measure.Report("a CPU", "torch 2", "2026-01-01", "toy", "fp32", 2, 3, 1e12)

    monkeypatch.setattr(measure, "bench", bench)
    assert "a CPU" in dsu("bench", *TINY, "--json", "new/measured.json").output
    assert json.loads(Path("new/measured.json").read_text())["device"] == "a CPU", "the folder is created"
    assert asked == [part for part in PARTS if part != "scale"], "that takes minutes: only when asked for"


def test_bench_names_unknown_parts(dsu: Dsu) -> None:
    assert "steps, reading, stages, eval, scale" in dsu("bench", "--parts", "speed", exit_code=2).output
    assert "--rounds" in dsu("bench", "--rounds", 0, exit_code=2).output
