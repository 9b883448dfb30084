"""`dsu serve`: an HTTP server for heads, with a page to drop images on."""

import os
import socket
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from dsu.errors import UsageError, check_installed
from dsu.settings import EncoderWeights, RuntimeSettings, ServingSettings
from dsu_cli import options
from dsu_cli.console import ConsoleProgress, Stopped, fail, out as console, say


@options.with_settings(ServingSettings, RuntimeSettings)
def serve(
    given: Mapping[str, Any],
    head: Annotated[
        list[str] | None,
        typer.Option(
            "--head",
            metavar="PATH|OWNER/NAME",
            help="A run folder, an exported folder or model.onnx, head.safetensors, or a head on the hub; may be "
            "given several times, for a comparison (default: the newest run).",
            show_default=False,
        ),
    ] = None,
    hiera_weights: options.HieraWeights = None,
    dino_weights: options.DinoWeights = None,
    quiet: options.Quiet = False,
) -> None:
    """Serve a page to drop images on, and an HTTP API: POST /predict.

    Nothing is written to disk, and the page contacts only this server. Ctrl-C stops it.
    """
    check_installed("Serving", "fastapi", "uvicorn", "python-multipart")
    from dsu.settings_file import read_settings

    settings, runtime = read_settings(ServingSettings, given), read_settings(RuntimeSettings, given)
    with _listening(settings) as listening:
        import uvicorn

        from dsu.serving.app import create_app
        from dsu.serving.heads import load_heads

        weights = EncoderWeights(hiera_weights, dino_weights)
        app = create_app(load_heads(head or [], runtime, weights, ConsoleProgress(quiet=quiet)), settings)
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, server_header=False)
        )
        host, port = listening.getsockname()[:2]
        console.print(f"http://{f'[{host}]' if ':' in host else host}:{port} accepts images; Ctrl-C stops it.")
        if host not in ("127.0.0.1", "::1"):
            say("Anyone who can reach this machine can use the server: it has no passwords and no HTTPS.")
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            stopped = "Stopped: no more images are accepted."
            if app.state.batcher.is_running:  # a batch can't be interrupted, and would crash with the interpreter
                fail(stopped)
                os._exit(130)
            raise Stopped(stopped) from None


def _listening(settings: ServingSettings) -> socket.socket:
    """A socket at the address, opened before anything slow. Raises `UsageError` if it can't be opened."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise UsageError(
            f"{settings.host}:{settings.port} can't be listened on ({reason}): give another --port, or --host."
        ) from error
