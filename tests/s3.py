"""An S3 server (moto) in a separate process that can be killed and restarted, and a proxy that injects failures.

moto keeps all data in memory. So every request that changes data is written to a journal before it is answered, and a
restarted server replays the journal.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import obstore
from obstore.store import S3Store

__all__ = ["BUCKET", "Proxy", "Server"]

BUCKET = "features"


class Server:
    """The server, with one bucket; `environment` gives the variables to reach it.

    Example:
        >>> with Server(tmp_path) as server:
        ...     subprocess.run(["dsu", "cache", "push", "shapes", "s3://features/here"], env=server.environment)
    """

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one:
            self.port = one.getsockname()[1]
        self._journal = folder / "s3.journal"

    def __enter__(self) -> "Server":
        self.start()
        self.make_bucket()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, port: int | None = None) -> dict[str, str]:
        """Environment variables to reach the server, or a proxy in front of it."""
        return {
            "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
            "AWS_SECRET_ACCESS_KEY": "neverprintedneverstored",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
        }

    def start(self) -> None:
        """Start the server and replay its journal."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.port), str(self._journal)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self._process.poll() is None
            time.sleep(0.05)
        raise TimeoutError("the S3 server does not start")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def forget(self) -> None:
        """Restart the server without its bucket and objects."""
        self.kill()
        self._journal.unlink(missing_ok=True)
        self.start()

    def make_bucket(self) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")).close()

    def objects(self) -> dict[str, bytes]:
        """The content of all objects, by key."""
        keys = [one["path"] for page in obstore.list(self._client) for one in page]
        return {key: bytes(obstore.get(self._client, key).bytes()) for key in keys}

    def put(self, key: str, content: bytes) -> None:
        obstore.put(self._client, key, content)

    @property
    def _client(self) -> S3Store:
        return S3Store(
            BUCKET,
            config={"access_key_id": "a", "secret_access_key": "b", "region": "us-east-1", "endpoint": self.endpoint},
            client_options={"allow_http": True},
        )


class Proxy:
    """Forwards requests, and fails some if `trouble` is set: "503", "403", or "cut" (after 20,000 bytes of a response).

    Attributes:
        port: the port it listens on.
        trouble: the kind of failure from now on; empty for none.
        every: every how many requests one fails; 1: all.
        requests: the number of requests so far.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self.trouble, self.every, self.requests = "", 1, 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *error: object) -> None:
        self._listening.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Handle one request and close the connection, so that the next request can fail."""
        self.requests += 1
        trouble = self.trouble if self.requests % self.every == 0 else ""
        head = b""
        while b"\r\n\r\n" not in head:
            more = client.recv(65536)
            if not more:
                client.close()
                return
            head += more
        if trouble in ("503", "403"):
            client.sendall(f"HTTP/1.1 {trouble} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            client.close()
            return
        first, _, rest = head.partition(b"\r\n")
        with suppress(OSError):
            server = socket.create_connection(("127.0.0.1", self._server.port))
            server.sendall(first + b"\r\nConnection: close\r\n" + rest)
            threading.Thread(target=self._pass, args=(client, server, None), daemon=True).start()
            self._pass(server, client, 20_000 if trouble == "cut" else None)
        for one in (client, server):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _pass(self, source: socket.socket, target: socket.socket, most: int | None) -> None:
        passed = 0
        with suppress(OSError):
            while content := source.recv(4096):
                passed += len(content)
                if most is not None and passed > most:
                    return
                target.sendall(content)


def _serve(port: int, journal: Path) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    from werkzeug.test import Client, EnvironBuilder

    application = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()
    if journal.exists():
        client = Client(application)
        with journal.open("rb") as file, suppress(EOFError, pickle.UnpicklingError):
            while True:
                client.open(EnvironBuilder(**pickle.load(file)))

    def journaled(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return application(environ, start)  # type: ignore[no-any-return]
        import io

        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if len(body) < int(environ.get("CONTENT_LENGTH") or 0):  # truncated: S3 discards it
            start("400 Bad Request", [("Content-Length", "0")])
            return []
        environ["wsgi.input"] = io.BytesIO(body)
        environ["wsgi.input_terminated"] = True
        told: list[Any] = []
        with lock:
            answer = b"".join(application(environ, lambda *words: told.append(words)))
            if told[0][0].startswith("2"):
                headers = {
                    name[5:].replace("_", "-"): value
                    for name, value in environ.items()
                    if name.startswith("HTTP_") and name not in ("HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH")
                }
                request = {
                    "method": environ["REQUEST_METHOD"],
                    "path": environ["PATH_INFO"],
                    "query_string": environ.get("QUERY_STRING", ""),
                    "headers": headers,
                    "data": body,
                }
                with journal.open("ab") as file:
                    pickle.dump(request, file)
                    file.flush()
                    os.fsync(file.fileno())
        start(*told[0])
        return [answer]

    make_server("127.0.0.1", port, journaled, threaded=True).serve_forever()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]))
