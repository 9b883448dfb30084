"""Loading of weights, from files written here: in the published format, for encoders small enough for a test."""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from dsu.config import DinoSpec, DSUNetConfig, HieraSpec
from dsu.encoders.frozen import build_dino, build_hiera
from dsu.encoders.sources import MissingWeightsError
from dsu.encoders.weights import EncoderWeights, load_dino, load_hiera, read_checkpoint, weights_digest
from dsu.errors import DsuError, UsageError

HIERA = HieraSpec(name="custom", embed_dim=8, num_heads=1, stages=(1, 1, 1, 1), global_att_blocks=())
DINO = DinoSpec(name="custom", embed_dim=12, depth=2, num_heads=2)


def config(dino_size: int = 126, hiera: HieraSpec = HIERA, dino: DinoSpec = DINO) -> DSUNetConfig:
    return DSUNetConfig(hiera=hiera, dino=dino, hiera_size=128, dino_size=dino_size, adapt_last=0)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DSU_HIERA", "DSU_DINO"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trunk() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {name: torch.randn_like(value) for name, value in build_hiera(HIERA).state_dict().items()}


@pytest.fixture
def transformer() -> dict[str, Tensor]:
    """A state dict with timm's names, at DINOv2's published size of 518 pixels."""
    torch.manual_seed(4)
    return {name: torch.randn_like(value) for name, value in build_dino(DINO, 518).state_dict().items()}


def as_meta_publishes(timm: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The content of DINOv2's own file: like timm's, plus a mask token."""
    return {**timm, "mask_token": torch.zeros(1, DINO.embed_dim)}


def load(path: Path) -> str:
    return load_hiera(config(), EncoderWeights(hiera=path))[1]


def sam_checkpoint(trunk: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The content of SAM 2.1's file: the whole model under `model`, with the trunk and other parts."""
    others = {"image_encoder.neck.convs.0.conv.weight": torch.zeros(3), "maskmem_tpos_enc": torch.zeros(2)}
    return {"model": {f"image_encoder.trunk.{name}": value for name, value in trunk.items()} | others}


def test_hiera_is_loaded_from_a_sam_checkpoint(tmp_path: Path, trunk: dict[str, Tensor]) -> None:
    torch.save(sam_checkpoint(trunk), tmp_path / "sam.pt")
    loaded, digest = load_hiera(config(), EncoderWeights(hiera=tmp_path / "sam.pt"))
    assert all(torch.equal(value, trunk[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    torch.save(trunk, tmp_path / "bare.pt")
    save_file(trunk, tmp_path / "bare.safetensors")
    assert load(tmp_path / "bare.pt") == load(tmp_path / "bare.safetensors") == digest == weights_digest(loaded)


def test_an_environment_variable_can_name_the_file(
    tmp_path: Path, trunk: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(trunk, tmp_path / "bare.pt")
    spec = HIERA.model_copy(update={"name": "tiny"})
    monkeypatch.setenv("DSU_HIERA", str(tmp_path / "bare.pt"))
    assert load_hiera(config(hiera=spec), EncoderWeights())[1] == load(tmp_path / "bare.pt")
    monkeypatch.setenv("DSU_HIERA", str(tmp_path / "gone.pt"))
    with pytest.raises(DsuError, match=r"not at .*gone\.pt: check --hiera-weights or DSU_HIERA"):
        load_hiera(config(hiera=spec), EncoderWeights())


def test_metas_and_timms_files_give_the_same_weights(tmp_path: Path, transformer: dict[str, Tensor]) -> None:
    torch.save(as_meta_publishes(transformer), tmp_path / "dinov2_vit_pretrain.pth")
    save_file(transformer, tmp_path / "model.safetensors")
    for size in (518, 126):
        digests = {
            load_dino(config(size), EncoderWeights(dino=tmp_path / name))[1]
            for name in ("dinov2_vit_pretrain.pth", "model.safetensors")
        }
        assert len(digests) == 1


def test_the_position_table_is_resampled_as_in_timm(tmp_path: Path, transformer: dict[str, Tensor]) -> None:
    save_file(transformer, tmp_path / "model.safetensors")
    weights = EncoderWeights(dino=tmp_path / "model.safetensors")
    published, digest = load_dino(config(518), weights)
    assert torch.equal(published.pos_embed, transformer["pos_embed"])
    small, other = load_dino(config(126), weights)
    assert small.pos_embed.shape == (1, 1 + 9 * 9, 12)
    expected = resample_abs_pos_embed(transformer["pos_embed"], [9, 9], num_prefix_tokens=1)
    assert torch.equal(small.pos_embed, expected)
    assert other != digest
    rest = set(transformer) - {"pos_embed"}
    assert all(torch.equal(small.state_dict()[name], transformer[name]) for name in rest)


def wrong_size(folder: Path) -> Path:
    other = HieraSpec(name="custom", embed_dim=16, num_heads=1, stages=(1, 1, 1, 1), global_att_blocks=())
    torch.save(sam_checkpoint(build_hiera(other).state_dict()), folder / "x.pt")
    return folder / "x.pt"


def other_keys(folder: Path) -> Path:
    torch.save({"encoder.weight": torch.zeros(2)}, folder / "x.pt")
    return folder / "x.pt"


class _Code:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _run, ("ran",)


def _run(_: str) -> None:
    raise AssertionError("code from a checkpoint was run")


def code(folder: Path) -> Path:
    torch.save({"model": _Code()}, folder / "x.pt")
    return folder / "x.pt"


def plain_pickle(folder: Path) -> Path:
    (folder / "x.pt").write_bytes(pickle.dumps(_Code()))
    return folder / "x.pt"


def truncated(folder: Path) -> Path:
    torch.save(build_hiera(HIERA).state_dict(), folder / "x.pt")
    whole = (folder / "x.pt").read_bytes()
    (folder / "x.pt").write_bytes(whole[: len(whole) // 2])
    return folder / "x.pt"


def truncated_safetensors(folder: Path) -> Path:
    save_file(build_hiera(HIERA).state_dict(), folder / "x.safetensors")
    whole = (folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder / "x.safetensors"


def empty(folder: Path) -> Path:
    (folder / "x.pt").touch()
    return folder / "x.pt"


def no_tensors(folder: Path) -> Path:
    torch.save({"epoch": 3}, folder / "x.pt")
    return folder / "x.pt"


def a_page(folder: Path) -> Path:
    (folder / "x.pt").write_text("<html>404</html>")
    return folder / "x.pt"


def nothing(folder: Path) -> Path:
    return folder / "x.pt"


def a_folder(folder: Path) -> Path:
    (folder / "x.pt").mkdir()
    return folder / "x.pt"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (wrong_size, "is not a SAM 2.1 checkpoint of Hiera custom .*size mismatch.*published file of that size"),
        (other_keys, "is not a SAM 2.1 checkpoint of Hiera custom .*give the published file"),
        (code, "never runs code from a checkpoint"),
        (plain_pickle, "never runs code from a checkpoint|can't be read as a checkpoint"),
        (truncated, "can't be read as a checkpoint .*download it again"),
        (truncated_safetensors, "can't be read as a checkpoint .*download it again"),
        (empty, "can't be read as a checkpoint .*download it again"),
        (no_tensors, "is not a state dict of tensors"),
        (a_page, "HTML page|can't be read as a checkpoint"),
        (nothing, "are not at .*: check --hiera-weights or DSU_HIERA"),
        (a_folder, "are not at .*: check --hiera-weights or DSU_HIERA"),
    ],
)
def test_unusable_files_are_refused_in_one_sentence(tmp_path: Path, make: Callable[[Path], Path], reason: str) -> None:
    path = make(tmp_path)
    with pytest.raises(DsuError, match=reason) as caught:
        load_hiera(config(), EncoderWeights(hiera=path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.endswith(".")


def test_a_dino_file_of_another_size_is_refused(tmp_path: Path, transformer: dict[str, Tensor]) -> None:
    wider = build_dino(DINO.model_copy(update={"embed_dim": 24}), 518).state_dict()
    save_file(wider, tmp_path / "wide.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("wide", "other"):
        with pytest.raises(DsuError, match=f"{name}.safetensors is not a DINOv2 checkpoint of custom") as caught:
            load_dino(config(), EncoderWeights(dino=tmp_path / f"{name}.safetensors"))
        assert "\n" not in str(caught.value)


def test_reading_a_missing_checkpoint_names_it(tmp_path: Path) -> None:
    for name in ("gone.pt", "gone.safetensors"):
        with pytest.raises(DsuError, match=f"no checkpoint at .*{name}"):
            read_checkpoint(tmp_path / name)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


PUBLISHED_HIERA = HIERA.model_copy(update={"name": "base_plus"})
PUBLISHED_DINO = DINO.model_copy(update={"name": "vitl14"})

HIERA_WAYS = (
    "SAM 2.1's Hiera (base_plus)",
    "`hf download facebook/sam2.1-hiera-base-plus sam2.1_hiera_base_plus.pt",
    "--hiera-weights FILE (or DSU_HIERA)",
)
DINO_WAYS = (
    "DINOv2 (vitl14)",
    "`hf download timm/vit_large_patch14_dinov2.lvd142m model.safetensors",
    "--dino-weights FILE (or DSU_DINO)",
)


def cache_file(cache: Path, repository: str, filename: str) -> Path:
    """The path of a file in the hub's cache, in a new folder."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots" / "c0ffee").mkdir(parents=True)
    return folder / "snapshots" / "c0ffee" / filename


def missing(weights: EncoderWeights, dino: DinoSpec = PUBLISHED_DINO) -> str:
    with pytest.raises(MissingWeightsError) as caught:
        load_hiera(config(hiera=PUBLISHED_HIERA, dino=dino), weights)
    message = str(caught.value)
    assert "\n" not in message and "HF_HUB_OFFLINE is set" in message and "--preset toy" in message
    assert [way for way in HIERA_WAYS if way not in message] == []
    return message


def test_both_missing_encoders_are_named_with_the_ways_to_get_them(offline: Path, tmp_path: Path) -> None:
    message = missing(EncoderWeights())
    assert [way for way in DINO_WAYS if way not in message] == []
    with pytest.raises(MissingWeightsError) as caught:
        load_dino(config(dino=PUBLISHED_DINO), EncoderWeights())
    assert [way for way in DINO_WAYS if way not in str(caught.value)] == [] and "Hiera" not in str(caught.value)


def test_an_encoder_that_is_cached_given_or_unpublished_is_not_named_as_missing(offline: Path, tmp_path: Path) -> None:
    assert "DINOv2" not in missing(EncoderWeights(dino=tmp_path / "mine.pth"))
    assert "DINOv2" not in missing(EncoderWeights(), dino=DINO)
    cache_file(offline, "timm/vit_large_patch14_dinov2.lvd142m", "model.safetensors").write_bytes(b"weights")
    assert "DINOv2" not in missing(EncoderWeights())


def test_weights_in_the_hubs_cache_are_read_without_a_request(
    offline: Path, trunk: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("dsu.encoders.weights.download", lambda *_: pytest.fail("the hub was asked"))
    file = cache_file(offline, "facebook/sam2.1-hiera-base-plus", "sam2.1_hiera_base_plus.pt")
    torch.save(sam_checkpoint(trunk), file)
    assert load_hiera(config(hiera=PUBLISHED_HIERA), EncoderWeights())[1] == load(file)


def test_the_reason_of_a_failed_download_is_named(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repository: str, filename: str) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsu.encoders.weights.download", fail)
    with pytest.raises(MissingWeightsError, match=r"can't be downloaded \(No space left on device\): "):
        load_hiera(config(hiera=PUBLISHED_HIERA), EncoderWeights())
    with pytest.raises(MissingWeightsError, match="access to the Hugging Face hub is off"):
        load_hiera(config(hiera=PUBLISHED_HIERA), EncoderWeights(download=False))


def test_unpublished_sizes_need_a_file() -> None:
    with pytest.raises(UsageError, match=r"Hiera \(custom\) has no official weights.*--hiera-weights FILE"):
        load_hiera(config(), EncoderWeights())
    with pytest.raises(UsageError, match=r"DINOv2 \(custom\) has no official weights.*--dino-weights FILE"):
        load_dino(config(), EncoderWeights())


def test_random_weights_are_the_same_at_every_call_and_do_not_change_the_generator() -> None:
    torch.manual_seed(11)
    first = [load(config(), EncoderWeights(random=True)) for load in (load_hiera, load_dino)]
    drawn = torch.rand(3)
    torch.manual_seed(11)
    assert torch.equal(drawn, torch.rand(3))
    second = [load(config(), EncoderWeights(random=True)) for load in (load_hiera, load_dino)]
    assert [digest for _, digest in first] == [digest for _, digest in second]
    assert first[0][0].pos_embed.any()


def test_the_digest_depends_on_names_types_shapes_and_values() -> None:
    layer = torch.nn.Linear(2, 2)
    digest = weights_digest(layer)
    assert len(digest) == 64
    assert digest == weights_digest(layer)
    with torch.no_grad():
        layer.bias[0] += 1
    assert weights_digest(layer) != digest
    assert weights_digest(torch.nn.Linear(2, 2).half()) != weights_digest(torch.nn.Linear(2, 2))
    layer.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
    other = torch.nn.Linear(4, 1)
    other.load_state_dict({"weight": torch.zeros(1, 4), "bias": torch.zeros(1)})
    assert weights_digest(layer) != weights_digest(other)
