"""Heads from the hub, with a local fake server."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import FakeHub, serving

from dsu import Segmenter
from dsu.config import build_config
from dsu.errors import DsuError, UsageError
from dsu.heads.head_file import HEAD_FILE, HeadInfo, predictions_folder, read_head_info, resolve_head, save_head
from dsu.hub import is_hub_name
from dsu.network.head import Head
from dsu.sharing.model_card import export_folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    config = build_config("toy", hiera_size=128, dino_size=126)
    torch.manual_seed(0)
    save_head(folder / HEAD_FILE, Head(config).state_dict(), HeadInfo(config=config))
    export_folder(folder / HEAD_FILE, folder / "exported")
    return folder / "exported"


@pytest.fixture
def hub(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a head and a repository without one; its cache and the working folder are empty."""
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in exported.iterdir()}
    with serving(FakeHub({"me/tiles": files, "me/other": {"README.md": b"words"}})) as hub:
        point_to(hub.address, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield hub


def point_to(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def refusal(name: str, revision: str | None = None) -> str:
    with pytest.raises(DsuError) as caught:
        resolve_head(name, revision=revision)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and name in message
    return message


def test_a_head_is_downloaded_once_and_predicts_like_its_folder(hub: FakeHub, exported: Path) -> None:
    fetched = Segmenter.from_pretrained("me/tiles", device="cpu")
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    local = Segmenter.from_pretrained(exported, device="cpu")
    assert np.array_equal(fetched(picture), local(picture))
    assert resolve_head("me/tiles").read_bytes() == (exported / HEAD_FILE).read_bytes()
    files = [path for path in hub.asked if "/resolve/" in path]
    assert files and all(path.endswith(HEAD_FILE) for path in files), "more than the head was fetched"


def test_offline_cached_heads_are_found_and_others_give_an_error(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    first = resolve_head("me/tiles")
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_head("me/tiles") == first and len(hub.asked) == asked
    assert "HF_HUB_OFFLINE is set" in refusal("me/unknown")


def test_an_unreachable_hub_gives_an_error_at_once(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hf_hub_download` itself would take 23 seconds."""
    point_to("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    began = time.perf_counter()
    assert "127.0.0.1:9 can't be reached: Connection refused" in refusal("me/tiles")
    assert time.perf_counter() - began < 10


def test_cached_files_are_used_if_the_hub_is_unreachable(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_head("me/tiles")
    point_to("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    began = time.perf_counter()
    assert resolve_head("me/tiles") == first
    assert time.perf_counter() - began < 10


def test_requests_to_the_hub_are_logged_in_advance(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    said_before = []
    answer = hub.answer
    monkeypatch.setattr(hub, "answer", lambda path: said_before.append(caplog.text) or answer(path))
    caplog.set_level("INFO", "dsu")
    resolve_head("me/tiles")
    assert f"asking {hub.address.removeprefix('http://')} for head.safetensors of me/tiles" in said_before[0]
    assert "HF_HUB_OFFLINE=1" in said_before[0]
    caplog.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    resolve_head("me/tiles")
    assert not caplog.text


def test_missing_repositories_revisions_and_files_are_named(hub: FakeHub) -> None:
    assert "neither as a local path nor as a repository" in refusal("me/unknown")
    assert "has no head.safetensors" in refusal("me/other")
    assert "no revision 'v9'" in refusal("me/tiles", "v9")
    hub.gated.add("me/tiles")
    assert "request access" in refusal("me/tiles", "v1")


def test_a_file_that_is_not_a_head_is_refused(hub: FakeHub) -> None:
    hub.repositories["me/other"][HEAD_FILE] = b"<html>not what you think</html>"
    with pytest.raises(DsuError, match="can't be read as a head"):
        Segmenter.from_pretrained("me/other")


def test_revisions_need_the_hub(hub: FakeHub, exported: Path) -> None:
    assert read_head_info(resolve_head("me/tiles", revision="v1")).config.preset == "custom"
    for given in (exported, None):
        with pytest.raises(UsageError, match="--revision"):
            resolve_head(given, revision="v1")


def test_local_paths_precede_repositories(hub: FakeHub, exported: Path) -> None:
    assert is_hub_name("me/tiles") and is_hub_name(Path("me/tiles"))
    for text in ("tiles", "me/tiles/deep", "/me/tiles", "../tiles", "me/head.safetensors", "~/tiles", "me/"):
        assert not is_hub_name(text), text
    Path("me").mkdir()
    with pytest.raises(UsageError, match=r"no head at me/tilse"):
        resolve_head("me/tilse")
    Path("me/tiles").symlink_to(exported)
    assert resolve_head("me/tiles") == Path("me/tiles") / HEAD_FILE
    assert not hub.asked


def test_predictions_are_never_written_into_the_hubs_cache_or_an_exported_folder(hub: FakeHub, exported: Path) -> None:
    fetched = resolve_head("me/tiles")
    assert predictions_folder("me/tiles", fetched) == Path("runs/me--tiles/predictions")
    assert predictions_folder(exported, exported / HEAD_FILE) == Path("runs/exported/predictions")
    assert predictions_folder(None, Path("runs/a") / HEAD_FILE) == Path("runs/a/predictions")
