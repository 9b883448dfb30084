"""Bad options and settings files: the message names the option or field, the value and what is allowed."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from house import House, stage_one
from rubbish import Refused
from support import Dsu

# ---- options ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--features", "Q"), ("'Q'", "V1 to V4", "S1 to S4", "B1 to B6")),
        (("--features", "V,B99"), ("'B99'", "B1 to B6")),
        (("--features", "S5"), ("'S5'", "S1 to S4")),
        (("--features", "V99"), ("'V99'", "choose V")),
        (("--views", "3"), ("--views must be none, width or flips", "not '3'")),
        (("--level-views", "0"), ("--level-views must be none, width or flips",)),
        (("--feature-dtype", "int8"), ("--feature-dtype must be 'float16' or 'float32', not 'int8'",)),
        (("--compressor", "gzip"), ("--compressor must be 'zstd' or 'blosc', not 'gzip'",)),
        (("--encoder-batch-size", "0"), ("--encoder-batch-size must be greater than 0",)),
        (("--encoder-batch-size", "5000"), ("--encoder-batch-size must be at most 4096",)),
        (("--precision", "fp8"), ("--precision must be 'auto', 'fp32' or 'bf16', not 'fp8'",)),
        (("--device", "quantum"), ("'quantum'", "cpu, cuda or cuda:N")),
        (("--device", "meta"), ("'meta'", "cpu, cuda or cuda:N")),
        (("--device", "cuda:77"), ("'cuda:77'", "choose an available one (")),
        (("--preset", "huge"), ("preset", "'huge'", "large, base, small, tiny, toy")),
        (("--preset", "lage"), ("'lage'", "did you mean 'large'?")),
        (("--compressor", "zst"), ("--compressor", "did you mean 'zstd'?")),
        (("--hiera-size", "999999"), ("hiera_size must be at most 4096, not 999999",)),
        (("--hiera", "giant"), ("Hiera", "'giant'", "large, base_plus, small, tiny")),
        (("--dino", "vitg14"), ("DINOv2", "'vitg14'", "vitl14, vitb14, vits14")),
        (("--hiera-size", "100"), ("hiera_size", "128")),
        (("--hiera-size", "200"), ("32", "200", "try 192")),
        (("--dino-size", "100"), ("14", "100", "try 98")),
        (("--images", "images"), ("--images and --masks belong together",)),
        (("--images", "photos", "--masks", "gt"), ("photos", "test, train", "--images and --masks")),
    ],
)
def test_options_of_stage_one(refused: Refused, drawn: Path, options: Sequence[str], words: Sequence[str]) -> None:
    refused(stage_one(drawn, *options), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(refused: Refused, house: House) -> None:
    for command in (stage_one(house.data), house.train(), house.predict()):
        refused([*command, "--device", "cuda"], "'cuda'", "choose an available one (only cpu)")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--adapt-last", "99"), ("--adapt-last 99", "7 blocks")),
        (("--adapt-last", "-1"), ("--adapt-last must be at least 0, not -1",)),
        (("--val-fraction", "1.5"), ("--val-fraction must be less than 1, not 1.5",)),
        (("--keep", "best", "--val-fraction", "0"), ("keep", "val_fraction above 0")),
        (("--keep", "first"), ("--keep must be 'last' or 'best', not 'first'",)),
        (("--ablation", "Z"), ("--ablation must be 'none', 'A', 'B' or 'C', not 'Z'",)),
        (("--ablation", "B"), ("V1, V2, V3, V4", "dsu cache-features", "--features V1,V2,V3,V4")),
        (("--views", "3"), ("--views must be none, width or flips, or flips+K",)),
        (("--views", "flips+99"), ("K up to 60, not 'flips+99'",)),
        (("--overlap", "8"), ("--overlap needs --tile: give both",)),
        (("--tile", "64", "--overlap", "40"), ("can't overlap by 40", "half the --tile")),
        (("--fold", "3/2"), ("--fold must be a fold of at least two, such as 2/5",)),
        (("--focal-gamma", "0.5"), ("--focal-gamma must be at least 1",)),
        (("--tversky-beta", "1"), ("--tversky-beta must be less than 1",)),
        (("--init-from", "nothing"), ("There is no head at nothing",)),
        (("--batch-size", "0"), ("--batch-size must be greater than 0, not 0",)),
        (("--lr", "nan"), ("--lr must be a finite number, not nan",)),
        (("--lr", "-1"), ("--lr must be greater than 0, not -1",)),
        (("--hiera-size", "-32"), ("--hiera-size must be greater than 0, not -32",)),
        (("--preset", "toi"), ("'toi'", "did you mean 'toy'?")),
        (("--seed", "-1"), ("--seed must be at least 0, not -1",)),
        (("--seed", "99999999999999999999"), ("--seed must be less than 9223372036854775808",)),
        (("--val-every", "0"), ("--val-every must be greater than 0, not 0",)),
        (("--start-feature", "S2"), ("'S2'", "choose pixels")),
        (("--start-feature", "B99"), ("'B99'", "choose pixels")),
        (("--precision", "fp8"), ("--precision must be 'auto', 'fp32' or 'bf16', not 'fp8'",)),
        (("--device", "quantum"), ("'quantum'", "cpu, cuda or cuda:N")),
        (("--preset", "huge"), ("'huge'", "large, base, small, tiny, toy")),
        (("--preset", "tiny"), ("made with tiny", "dsu cache-features", "same options of network and tiles")),
    ],
)
def test_options_of_stage_two(refused: Refused, house: House, options: Sequence[str], words: Sequence[str]) -> None:
    refused(house.train(*options), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--threshold", "2"), ("--threshold must be at most 1, not 2",)),
        (("--threshold", "nan"), ("--threshold must be a finite number, not nan",)),
        (("--normalize", "yes"), ("--normalize must be 'minmax' or 'none', not 'yes'",)),
        (("--kind", "x"), ("--kind must be 'mask', 'overlay' or 'cutout', not 'x'",)),
        (("--kind", "masks"), ("--kind must be", "did you mean 'mask'?")),
        (("--batch-size", "0"), ("--batch-size must be greater than 0, not 0",)),
        (("--precision", "fp8"), ("--precision must be 'auto', 'fp32' or 'bf16', not 'fp8'",)),
    ],
)
def test_options_of_prediction(refused: Refused, house: House, options: Sequence[str], words: Sequence[str]) -> None:
    refused(house.predict(*options), *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--normalize", "yes"), ("--normalize", "minmax, none")),
        (("--workers", "0"), ("workers", "1 or more")),
        (("nonsense",), ("'nonsense'", "shapes-TE")),
        (("ECSSD",), ("ECSSD", "it contains")),
        (("--truth", "absent"), ("absent", "neither a folder")),
        (("one", "two", "--truth", "."), ("--truth", "at most one name")),
    ],
)
def test_options_of_evaluation(refused: Refused, house: House, options: Sequence[str], words: Sequence[str]) -> None:
    refused(["eval", *options, "--predictions", house.predictions], *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", "0"), ("--steps", "from 1 to")),
        (("--batch-size", "0"), ("--batch-size must be greater than 0, not 0",)),
        (("--views", "3"), ("--views must be none, width or flips, or flips+K",)),
        (("--ablation", "D"), ("--ablation must be", "not 'D'")),
        (("--start-feature", "S9"), ("'S9'", "choose")),
        (("--seed", "-2"), ("--seed must be at least 0",)),
        (("--precision", "int4"), ("--precision must be", "not 'int4'")),
        (("--device", "tpu"), ("'tpu'", "cpu, cuda or cuda:N")),
        (("--preset", "smal"), ("'smal'", "did you mean 'small'?")),
        (("nowhere",), ("of nowhere", "dsu cache-features nowhere")),
        (("--adapt-last", "99"), ("--adapt-last 99", "7 blocks")),
        (("--cache-root", "x"), ("below x", "dsu cache-features")),
        (("--config", "absent.yaml"), ("absent.yaml", "No such file")),
    ],
)
def test_options_of_the_check_of_equivalence(
    refused: Refused, house: House, options: Sequence[str], words: Sequence[str]
) -> None:
    refused(["check-equivalence", "--cache-root", house.features, *options], *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train-head", "--epochs", "many"),
        ("train-head", "--lr", "fast"),
        ("cache-features",),
        ("cache-features", "x", "--foreground", "white"),
        ("predict", "--threshold", "half"),
        ("eval", "--workers", "all"),
        ("predict", "--nonsense"),
        ("nonsense",),
    ],
)
def test_invalid_numbers_and_unknown_options(dsu: Dsu, arguments: Sequence[str]) -> None:
    said = dsu(*arguments, exit_code=2).output
    wrong = next((word for word in arguments if word.startswith("--")), "Missing argument")
    assert "Usage: " in said and ((wrong in said) or "No such command" in said)


# ---- settings files ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("can't be read", "No such file")),
        ("epochs: [1", ("not valid YAML",)),
        ("- epochs\n- lr\n", ("field: value", "epochs: 20")),
        ("1: 2\n", ("field: value",)),
        ("just words", ("field: value",)),
        ("epoch: 3\n", ("epoch is not a known field; did you mean 'epochs'?",)),
        ("Learning: 3\n", ("Learning is not a known field; known fields are device, precision",)),
        ("epochs: many\n", ("epochs must be a whole number, not 'many'",)),
        ("epochs: 2.5\n", ("epochs must be a whole number, not 2.5",)),
        ("epochs: [3]\n", ("epochs must be a whole number, not [3]",)),
        ("epochs: {a: 3}\n", ("epochs must be a whole number, not {'a': 3}",)),
        ("epochs: yes\n", ("epochs must be a value, not yes",)),
        ("epochs:\n", ("epochs must be a whole number, not None",)),
        ("epochs: 3\nepochs: 4\n", ("epochs is given twice in line 2",)),
        ("lr: .nan\n", ("lr must be a finite number, not nan",)),
        ("lr: .inf\n", ("lr must be a finite number, not inf",)),
        ("lr: -0.1\n", ("lr must be greater than 0, not -0.1",)),
        ("hiera_size: -352\n", ("hiera_size must be greater than 0, not -352",)),
        ("seed: 1e400\n", ("seed must be",)),
        ("val_fraction: 1.0\n", ("val_fraction must be less than 1, not 1.0",)),
        ("weight_decay: heavy\n", ("weight_decay must be a number, not 'heavy'",)),
        ("views: 3\n", ("views must be none, width or flips, or flips+K", "not 3")),
        ("device: 5\n", ("device must be text, not 5",)),
        ("dataset: [a, b]\n", ("dataset must be text, not ['a', 'b']",)),
        ("end_to_end: perhaps\n", ("end_to_end must be true or false, not 'perhaps'",)),
        ("bce: other\n", ("bce must be 'plain', 'weighted' or 'focal', not 'other'",)),
        ("epochs: many\nlr: -1\n", ("epochs must be a whole number, not 'many'; lr must be greater than 0, not -1",)),
        ("stages: 2021-02-30\n", ("not valid YAML",)),
        ("epochs: !!python/object/apply:os.mkdir [ran]\n", ("not valid YAML", "could not determine a constructor")),
        ("epochs: &a [*a]\n", ("epochs must be a whole number",)),
        ("epochs: " + "[" * 4000, ("not valid YAML", "nested too deeply")),
        (
            "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
            + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
            + "epochs: *a11\n",
            ("epochs must be a whole number",),
        ),
        ("epochs: " + "9" * 5000, ("not valid YAML", "4300 digits")),
    ],
)
def test_settings_files(refused: Refused, house: House, tmp_path: Path, text: str | None, words: Sequence[str]) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    command = ["train-head", "--cache-root", house.features, "--config", "mine.yaml"]
    refused(command, "mine.yaml", *words)


def test_a_settings_file_that_is_not_text(refused: Refused, house: House, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00\x80")
    refused(house.train("--config", "mine.yaml"), "mine.yaml", "not valid YAML")
    refused(house.train("--config", tmp_path), tmp_path, "can't be read")


def test_errors_in_options_do_not_name_the_settings_file(refused: Refused, house: House, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    error = refused(
        house.train("--config", "mine.yaml", "--val-fraction", "7"), "--val-fraction must be less than 1, not 7"
    )
    assert "mine.yaml" not in error


# ---- the rest ----


def test_an_interruption_gives_one_sentence(refused: Refused, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsu.features.extraction.extract", interrupt)
    refused(stage_one(drawn), "Stopped.", "run the same command again", status=130)


def test_too_little_memory_gives_one_sentence(refused: Refused, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]

    def exhaust(*arguments: object, **options: object) -> None:
        raise errors.pop()

    monkeypatch.setattr("dsu.features.extraction.extract", exhaust)
    while errors:
        refused(stage_one(drawn), "too little memory", "--batch-size", "--preset", status=1)


def test_a_runs_settings_file_can_be_used_as_config(dsu: Dsu, house: House) -> None:
    written = yaml.safe_load((house.run / "settings.yaml").read_text())
    assert written["epochs"] == 1
    dsu(*house.train("--config", house.run / "settings.yaml"))
