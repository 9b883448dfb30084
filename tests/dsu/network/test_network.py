from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from dsu.encoders.frozen import padded_attention
from dsu.errors import UsageError
from dsu.network.network import ENCODER_ATTENTION, DSUNet, _attention_backends, to_stored
from dsu.network.resume import ResumePoint, earliest, resume_point, serving_features

Build = Callable[..., DSUNet]
Batch = tuple[Tensor, Tensor]
POINTS = ("pixels", "S1", "S2", "S3", "S4", *(f"B{block}" for block in range(1, 7)))


def learn(network: DSUNet, points: Mapping[str, Tensor], point: ResumePoint) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits and the head's gradients of one training step that starts from `point`."""
    network.zero_grad()
    given = {name: feature for name, feature in points.items() if name != "pixels"}
    outputs = list(network(points.get("pixels"), features=given, start_feature=point.start).side_logits)
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    return outputs, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def frozen(network: DSUNet, batch: Batch, point: ResumePoint) -> dict[str, Tensor]:
    """The features at `point`, newly encoded."""
    encoded = network.encode(*batch, [name for name in point.features if name != "pixels"])
    return encoded | ({"pixels": batch[0]} if point.start == "pixels" else {})


def assert_same(first: tuple[list[Tensor], dict[str, Tensor]], second: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1].keys() == second[1].keys()
    assert not [name for name, gradient in first[1].items() if not torch.equal(gradient, second[1][name])]


@pytest.mark.parametrize("ablation", ["none", "A", "B", "C"])
def test_given_features_are_used_and_give_the_same_logits(build: Build, batch: Batch, ablation: str) -> None:
    network = build(ablation=ablation).eval()
    point = earliest(network.config)
    outputs = network(*batch).side_logits
    assert [tuple(output.shape) for output in outputs] == [(2, 1, 128, 128)] * 3
    again = network(batch[0], features=network.encode(None, batch[1], point.guides)).side_logits
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


@pytest.mark.parametrize("adapt_last", range(8))
def test_every_resume_point_gives_the_same_bits_at_every_depth(build: Build, batch: Batch, adapt_last: int) -> None:
    """Logits and all gradients, in training mode, without rounding of the features."""
    network = build(adapt_last).train()
    config = network.config
    available = {*POINTS, "V"}
    reference = None
    for name in sorted(serving_features(config, available), reverse=True):  # from pixels first
        point = resume_point(config, available, wanted=name)
        result = learn(network, frozen(network, batch, point), point)
        reference = reference or result
        assert_same(reference, result)
    assert reference is not None
    assert set(reference[1]) == {f"head.{name}" for name, _ in network.head.named_parameters()}


@pytest.mark.parametrize("adapt_last", [7, 3, 0])
@pytest.mark.parametrize("feature_dtype", [None, torch.float16])
def test_features_do_not_depend_on_the_rest_of_the_batch(
    build: Build, batch: Batch, adapt_last: int, feature_dtype: torch.dtype | None
) -> None:
    """Features computed sample by sample, as for a store, compared with those of the whole batch."""
    network = build(adapt_last, feature_dtype=feature_dtype).train()
    point = resume_point(network.config, {*POINTS, "V"})
    live = frozen(network, batch, point)
    rows = [frozen(network, (batch[0][[i]], batch[1][[i]]), point) for i in range(2)]
    cached = {name: torch.cat([row[name] for row in rows]) for name in point.features}
    assert all(torch.equal(live[name], cached[name]) for name in point.features)
    assert_same(learn(network, live, point), learn(network, cached, point))


def test_encoded_features_are_contiguous_and_rounded(build: Build, batch: Batch) -> None:
    names = ("S1", "S2", "S3", "S4", "B1", "B4", "V", "V2")
    exact, rounded = build().encode(*batch, names), build(feature_dtype=torch.float16).encode(*batch, names)
    for name in names:
        assert exact[name].dtype == torch.float32
        assert rounded[name].dtype == torch.float16
        assert rounded[name].is_contiguous()
        assert torch.equal(rounded[name], exact[name].half())
        assert not rounded[name].requires_grad
    assert {name: tuple(exact[name].shape[1:]) for name in ("S1", "S4", "V", "V2")} == {
        "S1": (32, 32, 16),
        "S4": (4, 4, 128),
        "V": (4, 4, 48),
        "V2": (9, 9, 48),
    }


def test_to_stored_without_a_type_does_not_round() -> None:
    x = torch.randn(1, 3, 4, 5).permute(0, 2, 3, 1)
    assert torch.equal(to_stored(x, None), x)
    assert to_stored(x, None).is_contiguous()
    assert to_stored(x, torch.float16).dtype == torch.float16


def test_frozen_blocks_keep_no_graph(build: Build, batch: Batch) -> None:
    """Blocks between the resume point and the first adapter run without a backward pass."""
    network = build(2).train()
    assert network.hiera is not None
    needs_graph = {}
    for index, block in enumerate(network.hiera.blocks):
        block.mlp.register_forward_hook(
            lambda _m, _i, output, index=index: needs_graph.update({index: output.requires_grad})
        )
    network(*batch)
    assert needs_graph == {index: index >= 5 for index in range(7)}


def test_encoders_stay_frozen_and_in_evaluation_mode(build: Build, batch: Batch) -> None:
    network = build()
    assert network.train() is network
    assert network.training
    assert network.head.training
    for encoder in (network.hiera, network.dino):
        assert encoder is not None
        assert not any(module.training for module in encoder.modules())
        assert not any(p.requires_grad for p in encoder.parameters())
    sum(output.mean() for output in network(*batch).side_logits).backward()
    assert all(p.grad is None for encoder in (network.hiera, network.dino) for p in encoder.parameters())
    assert not network.eval().head.training


def test_levels_without_adapters_equal_sam2s(build: Build, batch: Batch) -> None:
    network = build(0).eval()
    assert network.hiera is not None
    with torch.no_grad():
        expected = network.hiera(batch[0])
        features = network.forward_intermediates(*batch)
    for level, reference in enumerate(expected, start=1):
        torch.testing.assert_close(features[f"S{level}"], reference, atol=1e-5, rtol=0)
        assert features[f"S{level}"].is_contiguous(memory_format=torch.channels_last)


def test_as_published_and_fast_are_the_same_network(build: Build, batch: Batch) -> None:
    """Logits and gradients in double precision, with biases that make padded tokens matter."""
    images = tuple(images.double() for images in batch)
    fast = build().double().train()
    assert fast.hiera is not None
    for parameter in fast.hiera.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.5)
    published = DSUNet(fast.config, fast.hiera, fast.dino, as_published=True).double().train()
    published.head.load_state_dict(fast.head.state_dict())
    point = earliest(fast.config)
    expected = learn(published, frozen(published, images, point), point)
    found = learn(fast, frozen(fast, images, point), point)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("adapt_last", [7, 3])
def test_gradient_checkpointing_changes_nothing(build: Build, batch: Batch, adapt_last: int) -> None:
    network = build(adapt_last).train()
    point = earliest(network.config)
    points = frozen(network, batch, point)
    kept = learn(network, points, point)
    network.gradient_checkpointing = True
    assert_same(kept, learn(network, points, point))


def test_adapters_change_only_the_levels_after_them(build: Build, batch: Batch) -> None:
    plain, adapted = build(0).eval(), build(6).eval()  # the first block has no adapter, and S1 is its output
    with torch.no_grad():
        before, after = plain.forward_intermediates(*batch), adapted.forward_intermediates(*batch)
    assert [torch.equal(before[f"S{level}"], after[f"S{level}"]) for level in (1, 2, 3, 4)] == [True, *[False] * 3]
    assert torch.equal(before["V"], after["V"])


@pytest.mark.parametrize(
    ("ablation", "injected"), [("none", {4}), ("A", set()), ("B", {1, 2, 3, 4}), ("C", {1, 2, 3, 4})]
)
def test_intermediates_have_the_papers_names(build: Build, batch: Batch, ablation: str, injected: set[int]) -> None:
    network = build(ablation=ablation).eval()
    with torch.no_grad():
        features = network.forward_intermediates(*batch)
    expected = {
        "S1",
        "S2",
        "S3",
        "S4",
        *network.config.injections.values(),
        "R1",
        "R2",
        "R3",
        "R4",
        "D1",
        "D2",
        "D3",
    }
    ends = [""] if injected == {4} else [str(level) for level in injected]
    expected |= {f"{kind}{end}" for kind in ("modulated", "fused") for end in ends}
    assert set(features) == expected
    side = 4 if ablation == "none" else 9
    assert {tuple(features[name].shape) for name in features if name[0] == "V"} <= {(2, 48, side, side)}
    assert [tuple(features[f"D{i}"].shape) for i in (1, 2, 3)] == [(2, 64, side, side) for side in (8, 16, 32)]


def test_ablation_b_fuses_each_block_into_its_level(build: Build, batch: Batch) -> None:
    """Replacing one block's map changes the maps of that block's level, and no others before the decoder."""
    network = build(ablation="B").eval()
    point = earliest(network.config)
    points = frozen(network, batch, point)
    assert set(point.guides) == {"V1", "V2", "V3", "V4"}
    levels, maps = network._levels_and_guides(batch[0], None, points, None)
    with torch.no_grad():
        before = network.head.intermediates(levels, maps)
        after = network.head.intermediates(levels, {**maps, "V2": torch.zeros_like(maps["V2"])})
    changed = {name for name in before if name[0] in "mfR" and not torch.equal(before[name], after[name])}
    assert changed == {"modulated2", "fused2", "R2"}


def test_an_absent_encoder_is_an_error_only_if_it_is_needed(build: Build, batch: Batch) -> None:
    whole = build(0).eval()
    point = resume_point(whole.config, {*POINTS, "V"})
    points = frozen(whole, batch, point)
    bare = DSUNet(whole.config, None, None).eval()
    bare.head.load_state_dict(whole.head.state_dict())
    assert torch.equal(bare(features=points).logits, whole(*batch).logits)
    with pytest.raises(UsageError, match="without Hiera"):
        bare.encode(*batch, ["S1"])
    with pytest.raises(UsageError, match="created without"):
        bare.encode(*batch, ["V"])


def test_under_autocast_features_have_the_types_of_an_end_to_end_pass(build: Build, batch: Batch) -> None:
    """bfloat16 from Hiera stage 2 on, the parameters' type before: the resume point does not change the logits."""
    network = build(2).eval()
    available = {*POINTS, "V"}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = network(*batch).logits
        for name in ("S1", "B1", "B2", "S2", "B5"):
            point = resume_point(network.config, available, wanted=name)
            assert torch.equal(network(features=frozen(network, batch, point)).logits, expected), name


def test_pixels_are_normalised_by_imagenets_statistics(build: Build) -> None:
    pixels = torch.tensor([[[[0, 128, 255]]]], dtype=torch.uint8)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    normalized = build()._normalize(pixels.permute(0, 3, 1, 2))
    assert normalized.shape == (1, 3, 1, 1)
    torch.testing.assert_close(normalized.flatten(), torch.tensor(expected))


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_blocks_give_the_same_numbers(
    build: Build, batch: Batch, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced with gradients, and run by torch's own operators: compiling kernels would take minutes here."""
    if padded:  # as on a GPU
        monkeypatch.setattr("dsu.encoders.frozen.unpadded_attention", padded_attention)
    network = build(2).double().train()
    point = resume_point(network.config, {*POINTS, "V"})
    points = frozen(network, (batch[0].double(), batch[1].double()), point)
    expected = learn(network, points, point)
    network.compile_adapted_blocks(backend="aot_eager")
    torch._dynamo.config.suppress_errors = False
    torch.testing.assert_close(learn(network, points, point), expected, atol=1e-9, rtol=1e-7)


def test_encoders_do_without_cudnns_attention_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros, tried = torch.zeros, list[int]()

    def attention(query: Tensor, *_: Tensor) -> Tensor:
        tried.append(query.shape[-1])
        if query.shape[-1] == 72:
            raise RuntimeError("cuDNN Frontend error: No execution plans support the graph.")
        return query

    monkeypatch.setattr(torch, "zeros", lambda *shape, device, dtype: zeros(*shape, dtype=dtype))
    monkeypatch.setattr("dsu.network.network.functional.scaled_dot_product_attention", attention)
    gpu = torch.device("cuda")
    assert _attention_backends(gpu, torch.bfloat16, frozenset({64})) == ENCODER_ATTENTION
    assert _attention_backends(gpu, torch.bfloat16, frozenset({64, 72})) == ENCODER_ATTENTION[1:]
    assert _attention_backends(torch.device("cpu"), torch.float32, frozenset({72})) == ENCODER_ATTENTION[1:]
    assert set(tried) == {64, 72}
    _attention_backends.cache_clear()
