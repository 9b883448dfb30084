import inspect
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support import empty_weights
from torch import nn

from dsu.config import DINOS, HIERAS, PRESETS, DSUNetConfig, build_config
from dsu.encoders.frozen import build_dino, build_hiera
from dsu.errors import UsageError
from dsu.network.head import Head


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.fixture(scope="module")
def large() -> Head:
    with torch.device("meta"):
        return Head(build_config("large"))


def test_the_papers_head_has_the_exact_number_of_parameters(large: Head) -> None:
    assert count(large.adapters) == 1_714_416
    assert count(large.modulations) == 1_234_176
    assert count(large.fusions) == 1_775_475
    assert count(large.receptive_fields) == 2_222_592
    assert count(large.decoders, large.sides) == 279_171
    assert count(large) == 7_225_830
    assert all(p.requires_grad and p.is_meta for p in large.parameters())


def test_the_papers_encoders_have_the_exact_number_of_parameters(large: Head) -> None:
    config = build_config("large")
    with empty_weights():  # sam2's constructor reads tensor values, which torch's meta device does not allow
        hiera = build_hiera(config.hiera)
        dino = build_dino(config.dino, config.dino_size)
    assert count(hiera) == 212_149_296
    assert count(dino) == 304_367_616
    taps = 2 * 4 * config.dino.embed_dim * 4
    assert taps == 32_768
    assert count(hiera, dino, large) + taps == 523_775_510
    assert round(100 * count(large) / 523_775_510, 2) == 1.38
    assert hiera.channel_list[::-1] == [config.hiera.level_dim(level) for level in (1, 2, 3, 4)]
    assert not any(p.requires_grad for p in (*hiera.parameters(), *dino.parameters()))


@pytest.mark.parametrize(("name", "letter"), [("large", "l"), ("base_plus", "b+"), ("small", "s"), ("tiny", "t")])
def test_hiera_specs_equal_sam2s_configs(name: str, letter: str) -> None:
    import sam2
    from omegaconf import OmegaConf
    from sam2.modeling.backbones.hieradet import Hiera

    root = Path(next(iter(sam2.__path__))) / "configs" / "sam2.1" / f"sam2.1_hiera_{letter}.yaml"
    trunk = OmegaConf.to_container(OmegaConf.load(root).model.image_encoder.trunk)
    assert isinstance(trunk, dict)
    trunk.pop("_target_")
    ours = HIERAS[name].model_dump(exclude={"name"})
    defaults = {key: parameter.default for key, parameter in inspect.signature(Hiera).parameters.items() if key in ours}
    assert {key: _plain(value) for key, value in ours.items()} == {
        key: _plain(value) for key, value in (defaults | trunk).items()
    }


def _plain(value: object) -> object:
    return list(value) if isinstance(value, Sequence) else value


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds(preset: str) -> None:
    config = build_config(preset)
    assert config.preset == preset
    assert config.adapt_last == config.hiera.depth
    assert DSUNetConfig.model_validate_json(config.model_dump_json()) == config
    with empty_weights():
        hiera = build_hiera(config.hiera)
        build_dino(config.dino, config.dino_size)
        head = Head(config)
    dims = [config.hiera.input_dim(block) for block in range(config.hiera.depth)]
    assert dims == [block.dim for block in hiera.blocks]
    assert [adapter.down.in_features for adapter in head.adapters.values()] == dims
    assert list(head.adapters) == [str(block) for block in range(config.hiera.depth)]


def test_the_papers_grids() -> None:
    config = build_config()
    assert [config.level_grid(level) for level in (1, 2, 3, 4)] == [88, 44, 22, 11]
    assert config.dino_grid == 37
    assert config.injections == {4: "V"}
    assert config.hiera.stage_starts == (0, 2, 8, 44)


def test_invalid_sizes_are_refused_with_a_suggestion() -> None:
    with pytest.raises(UsageError, match="multiple of 32, not 350: try 352"):
        build_config(hiera_size=350)
    with pytest.raises(UsageError, match="multiple of 14, not 512: try 518"):
        build_config(dino_size=512)
    with pytest.raises(UsageError, match=r"hiera_size.*128"):
        build_config(hiera_size=96)
    assert build_config(hiera_size=384, dino_size=224).preset == "custom"


@pytest.mark.parametrize("size", range(129, 250, 7))
def test_suggested_sizes_are_valid(size: int) -> None:
    for option in ("hiera_size", "dino_size"):
        try:
            build_config("toy", **{option: size})
        except UsageError as error:
            named = int(str(error).split("try ")[1].rstrip("."))
            build_config("toy", **{option: named})


def test_more_adapters_than_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match=r"last 49 blocks.* has 48 blocks"):
        build_config(adapt_last=49)
    with pytest.raises(UsageError, match="adapt_last"):
        build_config(adapt_last=-1)
    assert build_config(adapt_last=0).first_adapted == 48


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"preset": "huge"}, "no preset called 'huge': choose one of large, base"),
        ({"hiera": "huge"}, "no Hiera called 'huge'"),
        ({"dino": "vitg14"}, "no DINOv2 called 'vitg14': choose one of vitl14"),
    ],
)
def test_errors_for_unknown_names_list_the_known_ones(names: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_config(**names)


def test_ablations_use_the_blocks_of_the_papers_tables() -> None:
    assert build_config(ablation="A").injections == {}
    assert build_config(ablation="B").injections == {1: "V6", 2: "V12", 3: "V18", 4: "V24"}
    assert build_config(ablation="C").injections == dict.fromkeys((1, 2, 3, 4), "V24")
    assert build_config("toy", ablation="B").injections == {1: "V1", 2: "V2", 3: "V3", 4: "V4"}


@pytest.mark.parametrize("ablation", ["A", "B", "C"])
def test_ablations_have_a_modulation_and_a_fusion_per_level(ablation: str) -> None:
    with torch.device("meta"):
        head = Head(build_config(ablation=ablation))
    levels = [] if ablation == "A" else ["1", "2", "3", "4"]
    assert list(head.modulations) == list(head.fusions) == levels
    for level, dim in zip(levels, (144, 288, 576, 1152), strict=False):
        assert head.modulations[level].pointwise.weight.shape == (dim, 1024, 1, 1)


def test_dinov2_sizes_are_the_published_ones() -> None:
    assert {name: (spec.embed_dim, spec.depth, spec.num_heads) for name, spec in DINOS.items() if name != "toy"} == {
        "vitl14": (1024, 24, 16),
        "vitb14": (768, 12, 12),
        "vits14": (384, 12, 6),
    }
