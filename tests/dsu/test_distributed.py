"""Several processes give the same result as one: tested with real processes that communicate by gloo, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import first_step, start, stopped, trained, trainer

from dsu.distributed import ALONE, World
from dsu.errors import UsageError
from dsu.training.run_notes import run_notes

TIMES = {"seconds", "images_per_second", "data_wait", "peak_memory_gb"}

Results = list[list[dict[str, Any]]]


def farthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for row, other in zip(found["history"], expected["history"], strict=True):
        names = row.keys() - TIMES
        assert names == other.keys() - TIMES
        assert {name: row[name] for name in names} == pytest.approx({name: other[name] for name in names}, abs=1e-9)
    assert farthest(found["state"], expected["state"]) < 1e-8


def assert_same_steps(results: Results, counts: tuple[int, ...], folder: Path) -> None:
    """Every process has a single process's gradients, losses and norms' buffers, and the reported number of
    exchanges."""
    for number, count in enumerate(counts):
        expected = first_step(ALONE, folder, count)
        exchanges = 2 * trainer(ALONE, folder, epochs=3).network.head.norm_groups + 1
        for process in results:
            found = process[number]
            assert farthest(found["gradients"], expected["gradients"]) < 1e-12
            assert farthest(found["buffers"], expected["buffers"]) < 1e-12
            assert torch.allclose(found["losses"], expected["losses"], atol=1e-12, rtol=0)
            assert found["exchanges"] == exchanges


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Twenty steps of a single process."""
    return trained(ALONE, tmp_path_factory.mktemp("alone"), epochs=10)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """Several runs of two processes, one after the other; in the last run one process dies."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "by one").mkdir()
    stopped(ALONE, folder / "by one", epochs=3)
    return folder, start(
        folder,
        2,
        ("first_step", {"count": 2}),
        ("first_step", {"count": 1}),
        ("trained", {"epochs": 10, "folder": "whole"}),
        ("stopped", {"epochs": 3, "folder": "by two"}),
        ("trained", {"epochs": 3, "folder": "by one"}),
        ("killed", {"victim": 1, "epochs": 3}),
    )


def test_a_step_of_two_processes_equals_that_of_one(two: tuple[Path, Results], tmp_path: Path) -> None:
    """The second batch has only one sample, so one of the processes has none."""
    assert_same_steps(two[1], (2, 1), tmp_path)


def test_twenty_steps_of_two_processes_equal_those_of_one(two: tuple[Path, Results], alone: dict[str, Any]) -> None:
    folder, results = two
    first, second = (process[2] for process in results)
    assert first["before"] == second["before"] == alone["before"], "validation is bit-identical, however it is divided"
    assert_same_run(first, alone)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    for row, other in zip(first["history"], second["history"], strict=True):
        assert {name: row[name] for name in row.keys() - TIMES} == {name: other[name] for name in row.keys() - TIMES}
    assert {path.name for path in (folder / "whole").iterdir()} == {
        *("checkpoint.pt", "metrics.csv", "best.safetensors", "last.safetensors", "head.safetensors")
    }


def test_a_checkpoint_can_be_resumed_by_any_number_of_processes(two: tuple[Path, Results], tmp_path: Path) -> None:
    """Two processes, then one, and vice versa; within the first epoch in which the adapters train."""
    folder, results = two
    expected = trained(ALONE, tmp_path, epochs=3)
    assert results[0][3] == results[1][3] == {"epoch": 2, "step": 1}
    assert_same_run(trained(ALONE, folder / "by two", epochs=3), expected)
    for process in results:
        assert_same_run(process[4], expected)


def test_if_one_dies_the_others_end(two: tuple[Path, Results]) -> None:
    survivor, victim = two[1]
    assert len(victim) == 5
    assert "process of this run ended" in survivor[5]["said"] and "--resume" in survivor[5]["said"]


@pytest.mark.slow
def test_a_process_that_waits_for_another_ends_on_sigterm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, 2, ("terminated", {})) == [[], [{}]]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "A process of this run ended" in said[0]


@pytest.mark.slow
def test_four_processes_equal_one(alone: dict[str, Any], tmp_path: Path) -> None:
    """Full batches have two samples, so two processes never have any."""
    steps = [("first_step", {"count": 2}), ("first_step", {"count": 1}), ("trained", {"epochs": 10})]
    results = start(tmp_path, 4, *steps)
    assert_same_steps(results, (2, 1), tmp_path)
    for process in results:
        assert process[2]["before"] == alone["before"]
        assert_same_run(process[2], alone)


def test_a_run_reports_its_processes(tmp_path: Path) -> None:
    one = trainer(World(size=2, connected=True), tmp_path, batch_size=8, epochs=3)
    notes = run_notes(one, None, one.runtime)
    assert "processes: 2 divide batches of 8; 73 exchanges per step (norms, gradients)" in notes
    assert not any("processes" in note for note in run_notes(trainer(ALONE, tmp_path, epochs=3), None, one.runtime))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 1, 3, 8, 50])
def test_parts_are_consecutive_and_differ_by_at_most_one(size: int, count: int) -> None:
    parts = [list(range(count))[World(rank, size).part(count)] for rank in range(size)]
    assert [thing for part in parts for thing in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "40007"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-07,11],login", "gpu03"),
        ("gpu7", "gpu7"),
        ("a-1,b-2", "a-1"),
        ("rack[2,4]n[01-04]-ib", "rack2n01-ib"),
    ],
)
def test_slurms_variables_define_rank_and_rendezvous(nodes: str, first: str) -> None:
    found = World.of_environment({**STEP, "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_ID": "1"})
    assert found == World(5, 8, 1, f"tcp://{first}:10008")


def test_without_a_launcher_there_is_one_process() -> None:
    """A batch script has SLURM_NTASKS but is a single process; only srun starts several."""
    assert World.of_environment({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == World.of_environment({}) == ALONE
    assert World.of_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == World(3, 4, 1)
    with pytest.raises(UsageError, match="incomplete or no numbers"):
        World.of_environment({"RANK": "3", "WORLD_SIZE": "four"})


def test_every_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    world = World(6, 8, 2, connected=True)
    assert [world.device(asked) for asked in ("auto", "cuda", "cpu")] == ["cuda:2", "cuda:2", "cpu"]
    for process, asked in ((world, "cuda:0"), (World(4, 8, 4, connected=True), "cuda")):
        with pytest.raises(UsageError, match="has 4 GPUs: start at most 4"):
            process.device(asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert World(6, 8, 2, "tcp://gpu1:10000", connected=True).device("cuda") == "cuda:0", (
        "srun may show each only one GPU"
    )
    assert ALONE.device("auto") == "auto"
