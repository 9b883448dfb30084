"""Captured steps are bit-identical to eager ones, tested with a fake graph on the CPU and real ones on a GPU."""

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from recorded_graph import RecordedGraph, RefusingGraph
from support import toy_network

from dsu.batches import Batch
from dsu.distributed import World
from dsu.graphs import EAGER_CALLS, CudaGraph, GraphRunner, _no_collection
from dsu.heads.head_file import HeadInfo
from dsu.network.network import DSUNet
from dsu.network.resume import earliest, resume_point
from dsu.prediction.inference import Predictor
from dsu.runtime import choose_runtime
from dsu.settings import TrainingSettings
from dsu.training.optimizer import load_optimizer, make_optimizer, optimizer_state, set_learning_rate
from dsu.training.trainer import Trainer, TrainingPhase

SIDE, GUIDE = 128, 126
STEPS = EAGER_CALLS + 4


def batches(sizes: list[int], seed: int = 0, features: tuple[str, ...] = ()) -> Iterator[Batch]:
    """Random images in random views; with `features`, as in a store."""
    generator = torch.Generator().manual_seed(seed)
    network = toy_network(feature_dtype=torch.float16)
    for number, size in enumerate(sizes):

        def draw(*shape: int) -> torch.Tensor:
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

        views = torch.randint(0, 4, (size,), generator=generator).tolist()
        names = [f"{number}.{index}" for index in range(size)]
        batch = Batch.of(
            names,
            views,
            pixels=draw(size, SIDE, SIDE, 3),
            mask=draw(size, SIDE, SIDE),
            dino_pixels=draw(size, GUIDE, GUIDE, 3),
        )
        if features:
            inputs = batch.flipped().inputs
            found = network.encode(inputs["pixel_values"], inputs["guide_values"], features)
            batch = Batch.of(names, views, pixels=batch.images["pixels"], mask=batch.images["mask"], features=found)
        yield batch


def trainer(
    folder: Path,
    *,
    adapt_last: int = 7,
    start: str = "pixels",
    captured: bool,
    device: str = "cpu",
    precision: str = "fp32",
    deterministic: bool = False,
    **settings: object,
) -> Trainer:
    """A trainer with captured or eager steps; on a CPU, its optimiser is the one for GPUs, which a graph can replay."""
    resolved = TrainingSettings(sheet_every=0, **settings)  # type: ignore[arg-type]
    ablation = {} if resolved.ablation == "none" else {"ablation": resolved.ablation}
    network = toy_network(adapt_last, feature_dtype=torch.float16, **ablation).train()
    config = network.config
    point = resume_point(config, {start, "S1", "S2", "S3", "S4", *config.injections.values()}, start)
    made = Trainer(
        network,
        TrainingPhase(point, None, None),  # type: ignore[arg-type]  # batches are given
        resolved,
        HeadInfo(config=config),
        choose_runtime(device, precision, deterministic=deterministic),  # type: ignore[arg-type]
        keep_best=False,
        out=folder,
    )
    graph = CudaGraph if device == "cuda" else RecordedGraph
    if device == "cpu":
        rate = torch.tensor(resolved.lr)
        made.optimizer = torch.optim.AdamW(network.head.parameters(), lr=rate, weight_decay=5e-4, fused=True)
    made._steps.make_graph = made._evaluations.make_graph = graph if captured else None
    return made


def assert_same_steps(eager: Trainer, captured: Trainer, given: list[Batch]) -> None:
    for number, batch in enumerate(given):
        rate = 1e-3 / (1 + number)
        losses = []
        for way in (eager, captured):
            set_learning_rate(way.optimizer, rate)
            losses.append(way.step(batch))
        assert torch.equal(*losses), number
    own, theirs = (way.network.head.state_dict() for way in (eager, captured))
    assert not [name for name in own if not torch.equal(own[name], theirs[name])]


@pytest.mark.parametrize(
    ("start", "adapt_last", "settings"),
    [
        ("pixels", 7, {}),
        ("pixels", 7, {"gradient_checkpointing": True}),
        ("pixels", 7, {"region": "tversky", "bce": "focal"}),
        ("pixels", 7, {"bce": "weighted"}),
        ("S2", 3, {}),
        ("S4", 0, {}),
        ("pixels", 7, {"ablation": "A"}),
        ("pixels", 7, {"ablation": "B"}),
        ("pixels", 7, {"ablation": "C"}),
        ("pixels", 7, {"precision": "bf16"}),
        ("S2", 3, {"precision": "bf16", "gradient_checkpointing": True}),
    ],
)
def test_captured_steps_equal_eager_steps(
    tmp_path: Path, start: str, adapt_last: int, settings: dict[str, object]
) -> None:
    """Different samples, views and learning rates in every step, and a short batch, which runs eagerly."""
    eager, captured = (
        trainer(tmp_path, adapt_last=adapt_last, start=start, captured=way, **settings) for way in (False, True)
    )
    features = () if start == "pixels" else tuple(eager.main.point.features)
    given = list(batches([3] * (EAGER_CALLS + 2) + [2] + [3] * 2, features=features))
    assert_same_steps(eager, captured, given)
    assert captured._steps.captured
    assert captured._steps._captured.graph.replays == 4  # type: ignore[union-attr, attr-defined]


def test_captured_steps_from_stored_and_live_features_are_equal(tmp_path: Path) -> None:
    """Two graphs of the same training: one with batches from the store, one with images."""
    live, stored = (trainer(tmp_path, captured=True) for _ in range(2))
    images, features = list(batches([2] * STEPS)), list(batches([2] * STEPS, features=("V",)))
    for one, other in zip(images, features, strict=True):
        assert torch.equal(live.step(one), stored.step(other))


def test_captured_evaluation_uses_the_current_weights(tmp_path: Path) -> None:
    way = trainer(tmp_path, captured=True)
    given = list(batches([2] * STEPS))
    for batch in given:
        way.step(batch)
        way.network.eval()
        found = way._evaluations.run(way._eager_evaluation, way._ready(batch))
        outputs, _ = way.forward(batch)
        assert torch.equal(found["D3"], outputs[-1])
        way.network.train()
    assert way._evaluations.captured


def test_a_new_phase_is_captured_again(tmp_path: Path) -> None:
    eager, captured = (trainer(tmp_path, adapt_last=3, captured=way, epochs=9) for way in (False, True))
    frozen = resume_point(eager.network.config.model_copy(update={"adapt_last": 0}), {"S1", "S2", "S3", "S4", "V"})
    features = list(batches([2] * STEPS, features=frozen.features))
    for way in (eager, captured):
        way.frozen_adapters = TrainingPhase(frozen, None, None)  # type: ignore[arg-type]
        way.settings = way.settings.model_copy(update={"freeze_adapter_epochs": 1})
    assert_same_steps(eager, captured, features)
    adapters = [name for name, p in captured.network.head.named_parameters() if name.startswith("adapters")]
    assert all(captured.network.head.get_parameter(name).grad is None for name in adapters)
    for way in (eager, captured):
        way.epoch = 1
    assert_same_steps(eager, captured, list(batches([2] * STEPS)))


def test_a_resumed_step_is_exact_for_checkpoints_from_any_device(tmp_path: Path) -> None:
    """The saved learning rate is a number; the run keeps its own tensor, `fused` and `capturable`."""
    first, second, undisturbed = (trainer(tmp_path, captured=True) for _ in range(3))
    given = list(batches([2] * (2 * STEPS)))
    for batch in given[:STEPS]:
        undisturbed.step(batch)
        first.step(batch)
    saved = optimizer_state(first.optimizer)
    assert type(saved["param_groups"][0]["lr"]) is float
    saved["param_groups"][0] |= {"fused": False, "capturable": True, "foreach": True}
    rate = second.optimizer.param_groups[0]["lr"]
    second.network.head.load_state_dict(first.network.head.state_dict())
    load_optimizer(second.optimizer, saved)
    group = second.optimizer.param_groups[0]
    assert group["lr"] is rate
    assert (group["fused"], group["capturable"], group["foreach"]) == (True, False, None)
    for batch in given[STEPS:]:
        assert torch.equal(undisturbed.step(batch), second.step(batch))


def test_on_a_cpu_the_optimizer_is_plain() -> None:
    settings = TrainingSettings(lr=0.01)
    optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(3))], settings, torch.device("cpu"))
    set_learning_rate(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.param_groups[0]["capturable"]


def test_a_short_last_batch_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(len(inputs))
        return module.forward

    compile_blocks = DSUNet.compile_adapted_blocks
    monkeypatch.setattr(DSUNet, "compile_adapted_blocks", lambda network: compile_blocks(network, backend=count))
    made = trainer(tmp_path, captured=False, compile=True, batch_size=3)
    whole, short, again = batches([3, 2, 3])
    made.step(whole)
    done = len(compiled)
    assert done > 0 and torch.isfinite(made.step(short)).all()
    made.step(again)
    assert len(compiled) == done


def test_outputs_are_not_overwritten_by_later_calls() -> None:
    graphs = GraphRunner(torch.device("cpu"), RecordedGraph)

    def doubled(batch: Batch) -> dict[str, torch.Tensor]:
        return graphs.run(lambda given: {"sum": 2 * given.features["x"].sum(0)}, batch)

    given = [Batch.of(["a"], [0], features={"x": torch.full((1, 2), float(number))}) for number in range(8)]
    found = [doubled(batch)["sum"].tolist() for batch in given]
    kept = [doubled(batch)["sum"] for batch in given]
    assert found == [one.tolist() for one in kept] == [[2.0 * number] * 2 for number in range(8)]


def test_a_failed_capture_runs_eagerly_and_has_a_reason() -> None:
    graphs = GraphRunner(torch.device("cpu"), RefusingGraph)
    batch = Batch.of(["a"], [0], features={"x": torch.ones(1, 2)})
    for _ in range(EAGER_CALLS + 3):
        assert graphs.run(lambda given: dict(given.features), batch)["x"].tolist() == [[1.0, 1.0]]
    assert graphs.refusal == "operation not permitted when stream is capturing"
    assert not graphs.captured


def test_threads_take_turns_with_a_graph() -> None:
    """Its inputs and outputs are fixed tensors, which two threads would overwrite for each other."""
    graphs = GraphRunner(torch.device("cpu"), RecordedGraph)

    def doubled(number: int) -> list[float]:
        batch = Batch.of(["a"], [0], features={"x": torch.full((1, 64), float(number))})
        return graphs.run(lambda given: {"sum": 2 * given.features["x"].sum(0)}, batch)["sum"].tolist()  # type: ignore[no-any-return]

    numbers, interval = range(400), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(doubled, numbers))
    finally:
        sys.setswitchinterval(interval)
    assert graphs.captured
    assert found == [[2.0 * number] * 64 for number in numbers]


def test_no_garbage_is_collected_during_a_capture() -> None:
    with _no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_capture_that_fails_in_another_process_is_not_used() -> None:
    """A graph with exchanges between processes must be replayed by all of them."""

    class Two(World):
        def all_gather(self, value: object) -> list[object]:
            return [value, "out of memory"]

    graphs = GraphRunner(torch.device("cpu"), RecordedGraph, Two())
    batch = Batch.of(["a"], [0], features={"x": torch.ones(1, 2)})
    for _ in range(EAGER_CALLS + 3):
        assert graphs.run(lambda given: dict(given.features), batch)["x"].tolist() == [[1.0, 1.0]]
    assert graphs.refusal == "out of memory" and not graphs.captured


def test_processes_decide_by_the_whole_batch_whether_a_graph_is_replayed() -> None:
    """With 7 samples instead of 8, two processes get 3 and 4: neither may replay the graph for 4 and 4."""
    graphs = GraphRunner(torch.device("cpu"), RecordedGraph)
    batch = Batch.of("abcd", [0] * 4, features={"x": torch.ones(4, 2)})
    for _ in range(EAGER_CALLS + 1):
        graphs.run(lambda given: dict(given.features), replace(batch, whole=8))
    assert graphs._captured is not None and isinstance(graphs._captured.graph, RecordedGraph)
    before = graphs._captured.graph.replays
    graphs.run(lambda given: dict(given.features), replace(batch, whole=7))
    assert graphs._captured.graph.replays == before
    graphs.run(lambda given: dict(given.features), replace(batch, whole=8))
    assert graphs._captured.graph.replays == before + 1


def test_prediction_needs_two_graphs_for_all_sizes_of_batches() -> None:
    network, runtime = toy_network(feature_dtype=torch.float16).eval(), choose_runtime("cpu", "fp32")
    eager, captured = (Predictor(network, runtime, earliest(network.config), 4) for _ in range(2))
    captured._single.make_graph = captured._several.make_graph = RecordedGraph
    for batch in batches([4, 4, 1, 3, 1, 2, 4, 1, 1, 3, 1, 5]):
        unflipped = replace(batch, views=torch.zeros_like(batch.views))
        found, expected = captured(unflipped), eager(unflipped)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for graphs in (captured._single, captured._several):
        assert graphs._captured is not None and isinstance(graphs._captured.graph, RecordedGraph)
    assert captured._single._captured.graph.replays == 2 and captured._several._captured.graph.replays == 3


def test_the_fake_graph_repeats_decisions_of_the_host() -> None:
    """So the tests detect a branch on the host: the branch of the captured batch is repeated for all."""

    def flipped_on_the_host(batch: Batch) -> dict[str, torch.Tensor]:
        x = batch.features["x"]
        return {"x": x.flip(1) if batch.views[0] else x + 0}

    graphs = GraphRunner(torch.device("cpu"), RecordedGraph)
    x = torch.tensor([[1.0, 2.0]])
    for _ in range(EAGER_CALLS + 1):
        graphs.run(flipped_on_the_host, Batch.of(["a"], [0], features={"x": x}))
    found = graphs.run(flipped_on_the_host, Batch.of(["a"], [1], features={"x": x}))
    assert found["x"].tolist() == [[1.0, 2.0]], "frozen, as on a GPU"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_captured_steps_include_exchanges_between_processes(tmp_path: Path, device: str, precision: str) -> None:
    """In a world of one process: a whole batch gives the same step as without a world, and parts can be captured."""
    shares = [(3, 3)] * (EAGER_CALLS + 1) + [(3, 7), (3, 30), (3, 3)]
    given = list(batches([3] * len(shares)))
    divided = [
        replace(batch, share=torch.tensor(share, dtype=torch.float64), whole=8)
        for batch, share in zip(given, shares, strict=True)
    ]
    store = distributed.HashStore()
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        alone, eager, captured = (
            trainer(tmp_path, captured=way == 2, device=device, precision=precision, deterministic=True)
            for way in range(3)
        )
        eager.world = captured.world = captured._steps.world = World(connected=True)
        tolerance = {"rtol": 1e-2 if precision == "bf16" else 1e-4, "atol": 0.0}
        torch.testing.assert_close(eager.step(divided[0]), alone.step(given[0]), **tolerance)
        captured.step(divided[0])
        assert_same_steps(eager, captured, divided[1:])
        assert captured._steps.captured and captured._steps.refusal is None
        captured._forget_graphs()
    finally:
        distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"adapt_last": 0, "start": "S4"}])
def test_on_a_gpu_cuda_graphs_equal_eager_steps(tmp_path: Path, precision: str, settings: dict[str, object]) -> None:
    eager, captured = (
        trainer(tmp_path, captured=way, device="cuda", precision=precision, deterministic=True, **settings)  # type: ignore[arg-type]
        for way in (False, True)
    )
    features = () if "start" not in settings else tuple(eager.main.point.features)
    assert_same_steps(eager, captured, list(batches([3] * STEPS + [2], features=features)))
    assert captured._steps.refusal is None
    assert captured._steps.captured


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_features_do_not_depend_on_the_batch_the_graph_or_the_mode(precision: str) -> None:
    runtime = choose_runtime("cuda", precision)  # type: ignore[arg-type]
    network = runtime.place(toy_network(feature_dtype=torch.float16).eval())
    names = ("V", "S1", "S2", "S3", "S4")

    @torch.no_grad()
    def encode(batch: Batch) -> dict[str, torch.Tensor]:
        inputs = batch.flipped().inputs
        with runtime.autocast():
            return network.encode(inputs["pixel_values"], inputs["guide_values"], names)

    [batch] = (batch.to(runtime.device) for batch in batches([8]))
    expected, graphs = encode(batch), GraphRunner.on(runtime.device)
    for size in (1, 3, 8):
        part = batch.part(0, size)
        found = [graphs.run(encode, part) for _ in range(EAGER_CALLS + 2)][-1]
        with replace(runtime, deterministic=True).training():
            strict = encode(part)
        for name in names:
            assert torch.equal(found[name], expected[name][:size]), (name, size)
            assert torch.equal(strict[name], expected[name][:size]), (name, size)
