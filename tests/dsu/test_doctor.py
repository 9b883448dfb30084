"""`dsu doctor`: broken installations, missing files, and the next step."""

import json
import os
import sys
from pathlib import Path

import pytest

from dsu.doctor import Diagnosis, Fact, diagnose


@pytest.fixture(autouse=True)
def _plain_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder and hub cache, without environment variables."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    for name in ("DSU_DATA", "DSU_CACHE", "DSU_HIERA", "DSU_DINO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def look(data_root: str = "data", cache_root: str = "features") -> Diagnosis:
    return diagnose(Path(data_root), Path(cache_root))


def facts(found: Diagnosis) -> dict[str, Fact]:
    return {fact.what: fact for fact in found.facts}


def broken(found: Diagnosis) -> set[str]:
    return {what for what, fact in facts(found).items() if fact.state == "broken"}


def test_a_new_machine_works_and_the_next_step_is_to_store_features() -> None:
    found = look()
    assert found.working and broken(found) == set()
    assert facts(found)["torch"].text and facts(found)["python"].text
    assert facts(found)["large"].state == "note" and facts(found)["toy"].state == "fine"
    assert "downloads missing weights" in found.next_steps[0] and "dsu demo" in found.next_steps[-1]
    assert not any(Path().iterdir()), "the checks left files behind"
    assert json.loads(json.dumps(found.to_json()))["working"] is True


def test_weights_are_found_in_the_hubs_cache_without_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> str:
        raise AssertionError("the hub was used")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    repository = tmp_path / "hub" / "models--facebook--sam2.1-hiera-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("c0ffee")
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee" / "sam2.1_hiera_tiny.pt").write_bytes(b"weights")
    tiny = facts(look())["tiny"]
    assert tiny.text == "Hiera tiny in the hub's cache, DINOv2 vits14 missing"
    assert "model.safetensors from huggingface.co/timm/vit_small" in (tiny.remedy or "")
    assert tiny.value["dino"] is None and tiny.value["hiera"].endswith("sam2.1_hiera_tiny.pt")


def test_a_variable_with_a_missing_file_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSU_HIERA", "gone.pt")
    found = look()
    assert not found.working and broken(found) == {"DSU_HIERA"}
    assert "gone.pt" in found.next_steps[0] and "unset it" in found.next_steps[0]
    (tmp_path / "gone.pt").write_bytes(b"weights")
    found = look()
    assert found.working and "Hiera large by DSU_HIERA" in facts(found)["large"].text


def test_missing_files_are_named_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    [first, *_] = look().next_steps
    assert "sam2.1_hiera_large.pt" in first and "--dino-weights" in first and "HF_HUB_OFFLINE" in first


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_root_is_broken(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    found = look(cache_root="locked/features")
    assert broken(found) == {"cache root"} and "--cache-root" in found.next_steps[0]


def test_a_cache_root_below_a_file_is_broken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words")
    found = look(cache_root="file/features")
    assert broken(found) == {"cache root"} and not found.to_json()["folders"]["cache root"]["writable"]


def test_a_read_only_hub_cache_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    (tmp_path / "file").write_text("words")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    found = look()
    assert found.working and facts(found)["hub's cache"].state == "note"


def test_a_library_that_is_missing_or_can_not_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsu.doctor as doctor

    real = doctor.version

    def lacking(name: str) -> str:
        if name == "timm":
            raise doctor.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor, "version", lacking)
    found = look()
    assert broken(found) == {"timm"} and "timm" in found.next_steps[0]
    assert "machine" not in found.sections, "what needs the libraries is not tried"


def test_a_torchvision_built_for_another_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsu.doctor.requires", lambda name: ["numpy", "torch==1.0.0"])
    found = look()
    assert broken(found) == {"torchvision's torch"} and "together" in found.next_steps[0]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert broken(look()) >= {"import torch"}


def test_the_section_that_loads_torch_is_last(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setitem(sys.modules, "torch", None)
    found = diagnose(Path("data"), Path("features"), on_section=lambda section, facts: told.append(section))
    assert told == [*found.sections] == ["libraries", "weights", "data", "folders", "machine"]
    assert broken(found) == {"import torch"} and found.sections["machine"][0].state == "broken"


def test_gpus_are_listed_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsu.doctor import _gpus

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"Card {index}")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (20 * 10**9, 24 * 10**9))
    assert [card.text for card in _gpus()] == ["Card 0, 24.0 GB, 20.0 free", "Card 1, 24.0 GB, 20.0 free"]


def test_a_gpu_that_does_not_respond_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", fail)
    found = look()
    assert broken(found) == {"device"} and "nvidia-smi" in found.next_steps[0]


def test_an_unreadable_data_root_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(root: Path) -> None:
        raise PermissionError(13, "Permission denied", str(root))

    monkeypatch.setattr("dsu.data.benchmarks.survey", locked)
    found = look("locked")
    assert broken(found) == {"data root"} and "Make locked readable" in found.next_steps[0]


def test_the_next_step_depends_on_stores_and_heads(tmp_path: Path, drawn: Path) -> None:
    import shutil

    for part, name in (("train", "DUTS-TR"), ("test", "DUTS-TE")):
        shutil.copytree(drawn / part, tmp_path / "data" / "DUTS" / name)
    found = look()
    assert facts(found)["benchmarks"].value == {"DUTS-TR": 12, "DUTS-TE": 5}
    assert "dsu cache-features DUTS`" in found.next_steps[-1]
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    assert "cache-features DUTS --data-root elsewhere" in look("elsewhere").next_steps[-1]
    (tmp_path / "features" / "DUTS-TR" / "toy").mkdir(parents=True)
    (tmp_path / "features" / "DUTS-TR" / "toy" / "zarr.json").write_text("{}")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "head.safetensors").write_bytes(b"")
    assert "dsu predict" in look().next_steps[-1] and facts(look())["trained heads"].value == ["a"]
    (tmp_path / "runs" / "a" / "predictions").mkdir()
    assert look().next_steps == ("Evaluate what runs/a predicted: `dsu eval`.",)
    (tmp_path / "runs" / "a" / "predictions" / "metrics.json").write_text("{}")
    first, second = look().next_steps
    assert "All four steps are done, runs/a is evaluated" in first and "dsu predict FOLDER" in second


def test_the_next_step_is_about_the_newest_head(tmp_path: Path) -> None:
    for name, written in (("old", 1), ("new", 2)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "head.safetensors").write_bytes(b"")
        os.utime(tmp_path / "runs" / name / "head.safetensors", (written, written))
    (tmp_path / "runs" / "old" / "predictions").mkdir()
    assert "`dsu predict [FOLDER]`" in look().next_steps[-1]


def test_whether_the_hub_would_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert facts(look())["hub"].text.startswith("is used if weights are missing here")
    for variable in ("DSU_HIERA", "DSU_DINO"):
        (tmp_path / "weights.pt").write_bytes(b"weights")
        monkeypatch.setenv(variable, "weights.pt")
    assert facts(look())["hub"].text == "is not needed"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in facts(look())["hub"].text


def test_an_unknown_memory_size_is_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr("psutil.virtual_memory", fail)
    found = look()
    assert found.working and facts(found)["memory"].text.startswith("not known")
