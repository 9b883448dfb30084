"""Facts about heads, and folders for the hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from support import TINY, Dsu

from dsu.config import build_config
from dsu.data.tiles import Tiling
from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HEAD_FILE, HeadInfo, head_sha256, load_head, read_head_info, save_head
from dsu.metrics.figures import METRICS
from dsu.network.head import Head
from dsu.settings import EncoderWeights
from dsu.sharing.head_facts import head_facts
from dsu.sharing.model_card import CARD_FILE, export_folder, model_card

SECRET = "/home/someone/secret"


def make_head(folder: Path, preset: str = "toy", **fields: Any) -> Path:
    """Write a head as if trained on DUTS; `fields` replace fields of its info."""
    config = build_config(preset)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    dataset = {"split": "DUTS-TR", "dataset": "DUTS", "kind": "train", "benchmark": True, "reference": "DUTS"}
    info = HeadInfo(
        config=config,
        **{
            "encoders": {"hiera": "a" * 64, "dino": "b" * 64},
            "dataset": {**dataset, "data_root": SECRET, "held_out": ["patient_7", "patient_9"]},
            "training": {"epochs": 3, "batch_size": 8, "lr": 0.001, "random_weights": False},
            "epoch": 3,
            "metrics": {"val_S": 0.5, "val_MAE": 0.25},
            **fields,
        },
    )
    save_head(folder / HEAD_FILE, Head(config).state_dict(), info)
    return folder / HEAD_FILE


def write_evaluation(head: Path, *, images: int = 5019, extra: dict[str, Any] | None = None, **record: Any) -> None:
    """Write the files of `dsu predict` and `dsu eval` next to a head."""
    folder = head.parent / "predictions"
    folder.mkdir()
    made = {"head_sha256": head_sha256(head), "kind": "mask", "threshold": None, "sets": {"DUTS-TE": {}}, **record}
    (folder / "predictions.json").write_text(json.dumps(made))
    figures = {metric: 0.01 * index for index, metric in enumerate(METRICS, start=1)}
    found = {**figures, "images": images, **(extra or {}), "conventions": {"map": "min-max normalised, image by image"}}
    (folder / "metrics.json").write_text(json.dumps({"DUTS-TE": found, "elsewhere": found}))


def front_matter(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_parameters_and_encoders_of_the_papers_head(tmp_path: Path) -> None:
    facts = head_facts(make_head(tmp_path, "large"))
    assert facts.parameters == 7_225_830, "the paper's trainable parameters, without the batch norms' statistics"
    assert [encoder.name for encoder in facts.encoders] == ["Hiera large", "DINOv2 vitl14"]
    sources = [encoder.source for encoder in facts.encoders]
    assert [source and source.repository for source in sources] == [
        "facebook/sam2.1-hiera-large",
        "timm/vit_large_patch14_dinov2.lvd142m",
    ]
    assert {source and source.licence for source in sources} == {"apache-2.0"}
    assert not facts.info.random and facts.held_out == 2 and facts.path.stat().st_size > 28e6
    assert json.loads(json.dumps(facts.to_json()))["encoders"][0]["licence"] == "apache-2.0"


def test_weights_from_a_file_are_not_named_as_the_published_ones(tmp_path: Path) -> None:
    own = head_facts(make_head(tmp_path, "tiny", training={"known_encoders": ["dino"]}))
    assert [bool(encoder.source) for encoder in own.encoders] == [False, True]
    card = model_card(own, "me/x")
    assert f"| Hiera tiny | from a file, not known to be the published ones |  | `{'a' * 64}` |" in card
    assert front_matter(card)["base_model"] == ["timm/vit_small_patch14_dinov2.lvd142m"]
    assert "identified by their digests below" in card and "fetched from where" not in card


def test_stage_one_records_weights_from_files(dsu: Dsu, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSU_DINO", "mine.pth")
    dsu("cache-features", drawn, *TINY, "--features", "V", "--views", "none", "--quiet")
    monkeypatch.delenv("DSU_DINO")
    dsu("train-head", "--epochs", 1, "--views", "none", "--adapt-last", 0, "--out", "run", "--quiet")
    assert read_head_info(Path("run") / HEAD_FILE).known_encoders == ("hiera",)


def test_the_card_names_random_encoders_and_a_network_without_dinov2(tmp_path: Path) -> None:
    assert head_facts(make_head(tmp_path / "toy")).info.random
    drawn = make_head(tmp_path / "tiny", "tiny", training={"random_weights": True})
    assert head_facts(drawn).info.random and not head_facts(drawn).encoders[0].source
    assert "random weights" in model_card(head_facts(drawn), "me/x")
    config = build_config("toy", ablation="A")
    save_head(tmp_path / HEAD_FILE, Head(config).state_dict(), HeadInfo(config=config))
    assert [encoder.name for encoder in head_facts(tmp_path / HEAD_FILE).encoders] == ["Hiera toy"]


def test_the_hubs_own_parser_reads_the_card(tmp_path: Path) -> None:
    head = make_head(tmp_path / "run", "large")
    write_evaluation(head)
    [*_, card_file] = export_folder(head, tmp_path / "out", name="me/duts-large")
    assert card_file.name == CARD_FILE
    card = ModelCard.load(card_file, ignore_metadata_errors=False)
    fields = card.data.to_dict()
    assert fields["license"] == "apache-2.0" and fields["library_name"] == "dsu-net"
    assert fields["pipeline_tag"] == "image-segmentation" and fields["datasets"] == ["DUTS"]
    assert "salient-object-detection" in fields["tags"] and fields["base_model_relation"] == "adapter"
    assert fields["base_model"] == ["facebook/sam2.1-hiera-large", "timm/vit_large_patch14_dinov2.lvd142m"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["S"] == pytest.approx(0.01) and results["Dice"] == pytest.approx(0.11) and len(results) == 11
    assert {result.dataset_name for result in card.data.eval_results} == {"DUTS-TE"}, "of a set that was not predicted"
    for section in ("How to use", "Data", "Settings", "Metrics", "Encoders", "Limits", "How it was made", "Citation"):
        assert f"\n## {section}\n" in card.text
    for said in ('from_pretrained("me/duts-large")', "5,019", "Apache 2.0", "2503.21187", "2408.00714", "2304.07193"):
        assert said in card.text


def test_figures_of_a_part_of_a_benchmark_are_marked(tmp_path: Path) -> None:
    head = make_head(tmp_path)
    write_evaluation(head, images=12)
    facts = head_facts(head)
    assert facts.evaluated["DUTS-TE"]["not_comparable"] == "evaluated on 12 of the set's 5,019 images"
    card = model_card(facts, "me/x")
    assert "**DUTS-TE is not comparable with published scores: evaluated on 12 of the set's 5,019 images.**" in card
    [index] = front_matter(card)["model-index"]
    assert index["results"][0]["dataset"]["name"] == "DUTS-TE (evaluated on 12 of the set's 5,019 images)"


def test_figures_of_a_part_of_an_own_set_are_marked(tmp_path: Path) -> None:
    head = make_head(tmp_path)
    write_evaluation(head, images=3, extra={"missing": 2}, sets={"tiles-VAL": {}, "elsewhere": {}})
    card = model_card(head_facts(head), "me/x")
    assert "**elsewhere was evaluated on 3 of the set's 5 images.**" in card


def test_figures_of_a_whole_set_have_no_remark(tmp_path: Path) -> None:
    head = make_head(tmp_path)
    write_evaluation(head)
    assert "not_comparable" not in head_facts(head).evaluated["DUTS-TE"]
    assert "not comparable" not in model_card(head_facts(head), "me/x")


def test_images_without_an_object_are_in_the_card(tmp_path: Path) -> None:
    head = make_head(tmp_path)
    write_evaluation(
        head, extra={"images_without_object": 19, "false_alarms": 0.125, "AUROC": None, "IoU_object": 0.75}
    )
    card = model_card(head_facts(head), "me/x")
    assert "| images without an object | 19 |" in card and "| false alarms (lower is better) | 0.1250 |" in card
    assert "| intersection over union, with an object (higher is better) | 0.7500 |" in card and "AUROC" not in card


def test_validation_metrics_are_the_result_without_an_evaluation(tmp_path: Path) -> None:
    fields = front_matter(model_card(head_facts(make_head(tmp_path)), "me/x"))
    [index] = fields["model-index"]
    assert index["results"][0]["dataset"]["name"] == "DUTS-TR, held-out images"
    assert {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]} == {"S": 0.5, "MAE": 0.25}
    bare = front_matter(model_card(head_facts(make_head(tmp_path, metrics={}, dataset={}, training={})), "me/x"))
    assert "model-index" not in bare and "datasets" not in bare and bare["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "record", [{"head_sha256": "0" * 64}, {"kind": "overlay"}, {"threshold": 0.5}, {"sets": None}, {"sets": {}}]
)
def test_figures_of_other_predictions_are_ignored(tmp_path: Path, record: dict[str, Any]) -> None:
    head = make_head(tmp_path)
    write_evaluation(head, **record)
    assert head_facts(head).evaluated == {}


def test_names_with_special_characters_do_not_break_the_front_matter(tmp_path: Path) -> None:
    name = 'tiles: "new"\n- [x] | ---'
    head = make_head(tmp_path, dataset={"split": name, "dataset": name, "kind": "train", "benchmark": False})
    [index] = front_matter(model_card(head_facts(head), "me/x"))["model-index"]
    assert index["results"][0]["dataset"]["name"] == f"{name}, held-out images"


def test_an_export_keeps_the_tensors_and_has_no_paths_or_file_names(tmp_path: Path) -> None:
    head = make_head(tmp_path / "run")
    files = export_folder(head, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in files)
    before, after = load_file(head), load_file(files[0])
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for path in files:
        content = path.read_bytes()
        assert SECRET.encode() not in content and b"patient" not in content and str(tmp_path).encode() not in content
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["config"]["preset"] == "toy" and config["training"]["epochs"] == 3
    assert config["dataset"] == {"split": "DUTS-TR", "dataset": "DUTS", "kind": "train", "benchmark": True}
    assert load_head(files[0])[1].encoders == {"hiera": "a" * 64, "dino": "b" * 64}
    assert "2 images were held out" in (tmp_path / "out" / CARD_FILE).read_text()


def test_files_are_replaced_only_with_overwrite_and_a_run_never(tmp_path: Path) -> None:
    head = make_head(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"not empty.*--overwrite"):
        export_folder(head, out)
    export_folder(head, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "precious" and (out / HEAD_FILE).exists()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="run folder"):
            export_folder(head, head.parent, overwrite=overwrite)
        with pytest.raises(UsageError, match="is a file"):
            export_folder(head, out / "notes.txt", overwrite=overwrite)


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(tmp_path / "run")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DsuError, match="No space left"):
        export_folder(head, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_random_toy_weights_are_reproducible() -> None:
    """As the card says: two loads of the toy encoders have the same hash."""
    from dsu.encoders.weights import load_hiera

    config = build_config("toy")
    assert load_hiera(config, EncoderWeights())[1] == load_hiera(config, EncoderWeights())[1]


def test_public_info_keeps_the_tiling_and_has_no_paths() -> None:
    info = HeadInfo(
        config=build_config("toy"),
        dataset={"split": "own", "reference": "/home/me/own", "data_root": "/home/me", "tile": 512, "overlap": 64},
        training={"init_from": "/home/me/runs/DUTS-TR-large", "epochs": 3},
    )
    public = info.public
    assert public.tiling == Tiling(512, 64)
    assert public.training == {"init_from": "DUTS-TR-large", "epochs": 3}
    assert "/home" not in public.model_dump_json()
