"""Common mistakes with the Python API: each gives an error of one sentence or a warning."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import toy_network
from torch import Tensor

from dsu.config import build_config
from dsu.data.datasets import Paths
from dsu.data.decoding import ImageProcessor
from dsu.data.views import Views
from dsu.datasets import ImageDataset
from dsu.errors import DsuError, UsageError
from dsu.features.extraction import cache_features
from dsu.features.samples import FeatureDataset
from dsu.loss import SegmentationLoss
from dsu.network.network import DSUNet, DSUNetOutput
from dsu.prediction.segmenter import Segmenter
from dsu.runtime import choose_runtime
from dsu.settings import EncoderWeights, ExtractionSettings


@pytest.fixture(scope="module")
def folder(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store with the synthetic training images."""
    root = tmp_path_factory.mktemp("features")
    settings, weights = ExtractionSettings(features=("V",), views=Views(1)), EncoderWeights(random=True)
    config = build_config("toy", hiera_size=128, dino_size=126)
    cache_features(str(drawn / "train"), config, settings, weights, paths=Paths(drawn, root), device="cpu")
    return next(root.glob("*/"))


@pytest.fixture
def model() -> DSUNet:
    return toy_network(adapt_last=2).eval()


@pytest.fixture
def inputs(model: DSUNet) -> dict[str, Tensor]:
    sides = {"pixel_values": model.config.hiera_size, "guide_values": model.config.dino_size}
    return {name: torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8) for name, side in sides.items()}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"region": "dice"}, "region can't be 'dice': choose iou, tversky"),
        ({"bce": "weigted"}, "did you mean 'weighted'"),
        ({"tversky_beta": 70}, "between 0 and 1"),
        ({"focal_gamma": -1.0}, "at least 0"),
    ],
)
def test_unknown_terms_of_the_loss_are_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SegmentationLoss(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda mask: mask.byte(), "is uint8, but the loss needs floats"),
        (lambda mask: mask > 0, "is bool, but"),
        (lambda mask: mask * 255, "maximum is 255.*divide it by 255"),
        (lambda mask: mask[:, 0], r"\(2, 8, 8\) and the logits are \(2, 1, 8, 8\)"),
    ],
)
def test_invalid_masks_are_refused(change: Callable[[Tensor], Tensor], said: str) -> None:
    output = DSUNetOutput((torch.zeros(2, 1, 8, 8),) * 3)
    SegmentationLoss()(output, torch.ones(2, 1, 8, 8))
    with pytest.raises(UsageError, match=said):
        SegmentationLoss()(output, change(torch.ones(2, 1, 8, 8)))


def test_trainable_encoders_are_refused(model: DSUNet, inputs: dict[str, Tensor]) -> None:
    model.train().requires_grad_(True)
    with pytest.raises(UsageError, match="encoders' parameters require gradients"):
        model(**inputs)
    model.eval()(**inputs)


def test_unnormalised_floats_are_refused(model: DSUNet, inputs: dict[str, Tensor]) -> None:
    normalised = {name: (x.float() / 255 - model.mean) / model.std for name, x in inputs.items()}
    assert torch.allclose(model(**normalised).logits, model(**inputs).logits, atol=1e-4)
    with pytest.raises(UsageError, match="must be normalised, but these reach"):
        model(inputs["pixel_values"].float(), inputs["guide_values"])


def test_missing_and_mismatching_inputs_are_named(model: DSUNet, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match="V of DINOv2 can't be computed without guide_values"):
        model(inputs["pixel_values"])
    with pytest.raises(UsageError, match="S1 of Hiera can't be computed without pixel_values"):
        model.encode(None, inputs["guide_values"], ["S1"])
    with pytest.raises(UsageError, match="nothing to start from"):
        model()
    features = model.encode(**inputs, names=["V"])
    with pytest.raises(UsageError, match=r"numbers of samples \(\[1, 2\]\)"):
        model(inputs["pixel_values"], features={"V": features["V"][:1]})
    with pytest.raises(UsageError, match=r"V is .* channels last"):
        model(inputs["pixel_values"], features={"V": features["V"].permute(0, 3, 1, 2)})


def test_a_refused_device_is_not_suggested() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match=r"'cuda' can't be used: choose an available one \(only cpu\)"):
        choose_runtime("cuda", "auto")


def test_unknown_names_of_samples_are_refused_at_once(model: DSUNet, drawn: Path, folder: Path) -> None:
    images = ImageDataset(drawn / "train", model)
    for make in (
        lambda names: FeatureDataset(folder, model, names=names),
        lambda names: ImageDataset(drawn / "train", model, names=names),
    ):
        assert list(make(images.names[:2]).names) == images.names[:2]
        with pytest.raises(UsageError, match=f"no sample foo: give a list.*{images.names[0]}"):
            make(["foo"])
        with pytest.raises(UsageError, match="give a list of names"):
            make(images.names[0])
    with pytest.raises(UsageError, match="can't be read for 'toy'"):
        FeatureDataset(next(folder.iterdir()), "toy")


def test_other_objects_than_models_are_refused(model: DSUNet, drawn: Path) -> None:
    with pytest.raises(UsageError, match="'toy' is not a model"):
        ImageDataset(drawn, "toy")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is not a model"):
        ImageProcessor(3)  # type: ignore[arg-type]
    assert ImageProcessor(model).config == model.config  # type: ignore[arg-type]


def test_images_without_a_mask_give_a_warning(drawn: Path, tmp_path: Path, model: DSUNet) -> None:
    import shutil

    shutil.copytree(drawn / "train", tmp_path / "set")
    [first, *_] = sorted((tmp_path / "set" / "masks").iterdir())
    first.unlink()
    with pytest.warns(UserWarning, match="1 image .*without a mask"):
        data = ImageDataset(tmp_path / "set", model)
    assert first.stem not in data.names


def test_a_head_records_its_training_data(model: DSUNet, drawn: Path, folder: Path, tmp_path: Path) -> None:
    from dsu.heads.head_file import load_head, resolve_head

    data = FeatureDataset(folder, model, names=FeatureDataset(folder, model).names[1:])
    model.save_pretrained(tmp_path / "head", trained_on=data)
    _, info = load_head(resolve_head(tmp_path / "head"))
    assert info.dataset["held_out"] == [data.store.manifest.names[0]]
    for name, facts in data.store.metadata.items():
        assert info.was_trained_on(facts.image_sha256, facts.pixels_sha256) == (name in data.names)
    images = ImageDataset(drawn / "train", model, names=data.names[:1])
    model.save_pretrained(tmp_path / "other", trained_on=images)
    _, info = load_head(resolve_head(tmp_path / "other"))
    assert [*map(len, (info.trained_on, info.dataset))] == [12, 0], "one digest, cut short"


def test_a_segmenter_for_a_model_in_memory(model: DSUNet, tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    model.train()
    found = Segmenter(model)(image)
    assert found.shape == (40, 60) and not model.training
    model.save_pretrained(tmp_path / "head")
    with pytest.raises(DsuError, match="nothing"):
        Segmenter.load(tmp_path / "nothing")


def test_a_head_is_loaded_without_dinov2(model: DSUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are not needed."""
    model.save_pretrained(tmp_path / "head")
    monkeypatch.delattr("dsu.encoders.weights.load_dino")
    loaded = DSUNet.from_pretrained(tmp_path / "head", load_guide=False)
    assert loaded.dino is None and loaded.hiera is not None and not loaded.training
