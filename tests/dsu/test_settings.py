from pathlib import Path

import pytest

from dsu.errors import UsageError
from dsu.settings import TrainingSettings
from dsu.settings_file import read_settings


def test_options_override_the_file_unless_they_are_none(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("epochs: 7\nlr: 1e-4\nviews: 2\n")
    settings = read_settings(TrainingSettings, {"epochs": 3, "lr": None}, file)
    assert (settings.epochs, settings.lr, str(settings.views)) == (3, 1e-4, "width")
    assert read_settings(TrainingSettings, {}) == TrainingSettings()
    file.write_text("# nothing\n")
    assert read_settings(TrainingSettings, {}, file) == TrainingSettings()


def test_an_option_can_turn_off_a_files_setting(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("balance: true\ncompile: true\n")
    settings = read_settings(TrainingSettings, {"balance": False, "compile": None}, file)
    assert (settings.balance, settings.compile) == (False, True)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch: 3", "epoch"),
        ("epochs: many", "epochs"),
        ("epochs: -1", "epochs"),
        ("lr: .nan", "lr"),
        ("lr: .inf", "lr"),
        ("views: 3", "views"),
        ("val_fraction: 1.5", "val_fraction"),
        ("ablation: Z", "ablation"),
        ("- a\n- b", "field: value"),
        ("epochs: [", "YAML"),
        ("precision: fp8", "precision"),
    ],
)
def test_errors_name_the_file_and_the_field(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_settings(TrainingSettings, {}, file)
    assert "bad.yaml" in str(caught.value)
    assert named in str(caught.value)
