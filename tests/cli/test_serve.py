"""`dsu serve` as a process: its address, its end, its messages, and hostile or many clients."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from loud import loud_network, save_loud_head
from served import photograph, png, serving
from support import Dsu

from dsu.heads.head_file import HEAD_FILE

EDGE = "XXedgeXX"
BEFORE = f'--{EDGE}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'.encode()
HEAD = f"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary={EDGE}\r\n"
AFTER = f"\r\n--{EDGE}--\r\n".encode()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_loud_head(tmp_path_factory.mktemp("run") / HEAD_FILE, loud_network(adapt_last=3)).parent


def post(port: int, data: bytes, query: str = "") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    kind = {"Content-Type": f"multipart/form-data; boundary={EDGE}"}
    try:
        connection.request("POST", f"/predict{query}", BEFORE + data + AFTER, kind)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def get(port: int, path: str) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        found: dict[str, object] = json.loads(connection.getresponse().read())
        return found
    finally:
        connection.close()


def test_the_server_prints_its_address_and_ends_by_ctrl_c(run_folder: Path) -> None:
    """Even while a client is still sending its request."""
    with serving("--head", run_folder) as (port, _, process), socket.create_connection(("127.0.0.1", port)) as slow:
        assert get(port, "/health") == {"status": "ok", "requests": 0}
        assert post(port, png(photograph()))[0] == 200
        slow.sendall(f"{HEAD}Content-Length: 100000\r\n\r\n".encode() + BEFORE)
        while get(port, "/health")["requests"] == 0:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Stopped: no more images are accepted." in err and "Traceback" not in out + err


LONG = """
import sys, time
from dsu.prediction.segmenter import Segmenter
inner = Segmenter.segment
def segment(self, pictures):
    import torch
    end, some = time.monotonic() + 60, torch.ones(1000, 1000)
    while time.monotonic() < end:
        some = (some @ some).tanh()
    return inner(self, pictures)
Segmenter.segment = segment
from dsu_cli.main import run
run()
"""
"""`dsu` with a head whose batches take a minute."""


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_long_batch(run_folder: Path) -> None:
    with serving("--head", run_folder, program=LONG) as (port, _, process):
        client = threading.Thread(target=post, args=(port, png(photograph())))
        client.start()
        while get(port, "/health")["requests"] == 0:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=40)
        client.join()
    assert process.returncode == 130 and err.endswith("error: Stopped: no more images are accepted.\n")


def test_a_used_port_is_reported_before_loading_heads(dsu: Dsu, run_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = dsu("serve", "--head", run_folder, "--port", port, exit_code=2).output
    assert f"127.0.0.1:{port} can't be listened on (Address already in use): give another --port" in said
    assert "loading" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--head", "nowhere"), "There is no head at nowhere"),
        ((), "There is no trained head below runs/"),
        (("--port", "70000"), "--port must be at most 65535"),
        (("--host", "no.such.host.invalid"), "no.such.host.invalid:8000 can't be listened on"),
        (("--batch-size", "0"), "--batch-size must be greater than 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_heads_that_can_not_be_served(dsu: Dsu, options: tuple[str, ...], said: str) -> None:
    result = dsu("serve", *options, exit_code=2)
    assert said in result.output and len(result.output.strip().splitlines()) == 1


def test_a_head_given_twice_is_refused(dsu: Dsu, run_folder: Path) -> None:
    said = dsu("serve", "--port", "0", "--head", run_folder, "--head", run_folder, exit_code=2).output
    assert f"--head contains {run_folder} twice" in said


def test_missing_packages_are_named_with_the_pip_command(dsu: Dsu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsu.errors.find_spec", lambda name: None)
    said = dsu("serve", exit_code=2).output
    assert (
        "Serving needs fastapi, uvicorn, python-multipart: run `pip install fastapi uvicorn python-multipart`" in said
    )


@pytest.mark.slow
def test_hostile_clients_need_little_memory_and_do_not_block_others(run_folder: Path) -> None:
    """A gigabyte, very slow uploads, and a disconnect, while other requests are answered."""
    with serving("--head", run_folder, "--upload-seconds", 3, "--queue", 4) as (port, process, _):
        photo = png(photograph())
        post(port, photo)
        before = process.memory_info().rss

        slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        for one in slow:
            one.sendall(f"{HEAD}Content-Length: 100000\r\n\r\n".encode() + BEFORE)
        assert post(port, photo)[0] == 200  # the fourth of four requests

        with socket.create_connection(("127.0.0.1", port)) as gigabyte:
            gigabyte.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
            block, peak, answered = bytes(1 << 20), 0, b""
            gigabyte.settimeout(30)
            for _ in range(1024):
                try:
                    gigabyte.sendall(b"100000\r\n" + block + b"\r\n")
                except OSError:  # cut off
                    break
                peak = max(peak, process.memory_info().rss)
            answered = gigabyte.recv(4096)
        assert b" 400 " in answered or b" 413 " in answered
        assert peak - before < 100e6, f"{(peak - before) / 1e6:.0f} MB"

        time.sleep(1)
        for one in slow:
            one.settimeout(10)
            answered = one.recv(4096)
            assert b" 408 " in answered and b"did not arrive in 3 seconds" in answered + one.recv(4096)
            one.close()
        gone = socket.create_connection(("127.0.0.1", port))
        gone.sendall(f"{HEAD}Content-Length: 100000\r\n\r\n".encode() + BEFORE)
        gone.close()
        assert [post(port, photo)[0] for _ in range(5)] == 5 * [200]
        assert get(port, "/health")["requests"] == 0


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_twenty_clients_at_once(run_folder: Path, seconds: int, record_property: Callable[[str, object], None]) -> None:
    photos = [png(photograph(seed)) for seed in range(20)]
    statuses: list[int] = []
    with serving("--head", run_folder) as (port, process, _):
        alone = [post(port, photo, "?threshold=0.99")[0] for photo in photos]
        before, peak, end = process.memory_info().rss, 0, time.monotonic() + seconds

        def client(number: int) -> None:
            while time.monotonic() < end:
                kind = ("mask", "overlay", "cutout", "table")[number % 4]
                statuses.append(post(port, photos[number], f"?kind={kind}")[0])

        clients = [threading.Thread(target=client, args=(number,)) for number in range(20)]
        for one in clients:
            one.start()
        while any(one.is_alive() for one in clients):
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.1)
        assert get(port, "/health") == {"status": "ok", "requests": 0}
    assert set(alone) == {200} and set(statuses) == {200}, statuses
    assert len(statuses) >= 20
    assert peak - before < 300e6, f"{(peak - before) / 1e6:.0f} MB"
    record_property("requests of 20 clients", len(statuses))
    print(
        f"{len(statuses)} answers in {seconds} s, {(peak - before) / 1e6:.0f} MB more at most ({os.cpu_count()} cores)"
    )
