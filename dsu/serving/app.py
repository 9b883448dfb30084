"""The server: its routes, its error responses and its page."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import StrictUndefined, Template
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from dsu import __version__
from dsu.choices import ServedKind
from dsu.data.images import UnreadableImage
from dsu.errors import DsuError, validation_reasons
from dsu.prediction.verdicts import VerdictRow, table_text
from dsu.serving.batches import Batcher
from dsu.serving.heads import Answer, PredictRequest, ServedHead
from dsu.serving.uploads import FIELD, RequestError, receive_image
from dsu.settings import ServingSettings

_CONTENT_POLICY: Final = (
    "default-src 'none'; connect-src 'self'; img-src blob: data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page may only connect to this server."""

_REQUEST_BODY: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "string", "format": "binary", "description": "The image's file."}},
                }
            }
        },
    }
}


class Problem(BaseModel):
    """The reason for an error response.

    Attributes:
        status: the response's HTTP status.
        error: one sentence.
    """

    status: int
    error: str


class Health(BaseModel):
    """Whether requests are answered, and the number of requests in progress."""

    status: Literal["ok"]
    requests: int


class HeadFacts(BaseModel):
    """A served head.

    Attributes:
        encoders: the name of its encoders.
        runs_on: device and precision.
        threshold: the threshold for verdicts, overlays and cutouts if a request has none.
        cuts: whether masks are binarised at this threshold, too.
    """

    name: str
    encoders: str
    runs_on: str
    threshold: float
    cuts: bool


class Version(BaseModel):
    """Version, served heads, and limits on an image's bytes and pixels."""

    version: str
    heads: list[HeadFacts]
    max_megabytes: float
    max_megapixels: float


class PredictQuery(BaseModel):
    """Query parameters of a prediction."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: ServedKind = Field(
        "mask",
        description="A mask, overlay or cutout as written by `dsu predict`; the soft map, never binarised; or the "
        "table.",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Binarise masks at this threshold, and use it for verdicts (default: as the head does).",
    )


_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        400: "The form is damaged.",
        408: "The request took too long to arrive.",
        413: "The image has too many bytes or pixels.",
        415: "The request is not a form, or the file is not an image.",
        422: "The query is wrong, or the image can't be decoded.",
        500: "The server has failed.",
        503: "Too many requests: retry after a few seconds.",
    }.items()
}
_RESPONSES[200] = {"content": {"image/png": {}}, "description": "An image, or a table of one row."}
_RESPONSES[503]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


class _RequestCounter:
    """The number of requests in progress, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a request inside a `with`. Raises `RequestError` if the limit is reached."""
        if self.count == self.limit:
            raise RequestError(503, "Too many requests are waiting: retry in a few seconds.", {"Retry-After": "2"})
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


def create_app(heads: Mapping[str, ServedHead], settings: ServingSettings) -> FastAPI:
    """A server for heads by name; the first one is the default."""
    batcher, requests = Batcher(settings.batch_size, settings.max_megapixels * 1e6), _RequestCounter(settings.queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with batcher:
            yield

    app = FastAPI(title="dsu", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.batcher = batcher
    _add_error_handlers(app)
    page = _page(heads, settings)
    known = Literal[tuple(heads)]  # type: ignore[valid-type]

    class HeadQuery(PredictQuery):
        head: known = Field(next(iter(heads)), description="Name of a served head.")  # type: ignore[valid-type]

    @app.get("/", response_class=HTMLResponse)
    async def show() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page, headers={"Content-Security-Policy": _CONTENT_POLICY, "Cache-Control": "no-store"})

    @app.get("/health", responses={503: {"model": Problem, "description": "The server does not work."}})
    async def health() -> Health:
        """Whether requests are answered."""
        if not batcher.is_running:
            raise RequestError(503, "The server has stopped computing: restart it.")
        return Health(status="ok", requests=requests.count)

    @app.get("/version")
    async def version() -> Version:
        """The served heads, and the limits on images."""
        return _version(heads, settings)

    @app.post(
        "/predict",
        response_model=list[VerdictRow],
        responses=_RESPONSES,
        openapi_extra=_REQUEST_BODY,
    )
    async def predict(request: Request, query: Annotated[HeadQuery, Query()]) -> Response:
        """The mask, overlay, cutout or verdict of an image."""
        try:
            with requests.counted():
                image = await receive_image(request, settings)
                job = PredictRequest(image, query.kind, query.threshold)
                answer = await _wait_for_answer(request, batcher.submit(heads[query.head], job))
        except asyncio.CancelledError as error:
            raise RequestError(503, "The server is shutting down: retry later.", {"Retry-After": "10"}) from error
        uncached = {"Cache-Control": "no-store"}
        if isinstance(answer, VerdictRow):
            return Response(table_text([answer], ".json"), media_type="application/json", headers=uncached)
        return Response(answer, media_type="image/png", headers=uncached)

    return app


async def _wait_for_answer(request: Request, future: "Future[Answer]") -> Answer:
    """Wait for a request's answer; cancels the request if the client disconnects."""
    answer = asyncio.wrap_future(future)
    # The form was received: the next message can only be a disconnect.
    disconnect: asyncio.Future[Any] = asyncio.ensure_future(request.receive())
    awaited: list[asyncio.Future[Any]] = [answer, disconnect]
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    disconnect.cancel()
    if not answer.done():
        answer.cancel()
        raise RequestError(400, "The client has disconnected.")
    try:
        return answer.result()
    except UnreadableImage as error:
        raise RequestError(422, str(error)) from error
    except DsuError as error:
        raise RequestError(500, str(error)) from error


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error with a `Problem`."""

    def problem(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(Problem(status=status, error=sentence).model_dump(), status, headers)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return problem(error.status, str(error), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        reasons = validation_reasons(error)
        return problem(422, f"The request does not fit: {reasons}{'' if reasons.endswith('?') else '.'}")

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> JSONResponse:
        method, path = request.method, request.url.path
        sentence = {
            404: f"There is nothing at {path}: send images to /predict; the page is at /.",
            405: f"{path} does not support {method}: see /openapi.json.",
        }.get(error.status_code, f"{error.detail}.")
        return problem(error.status_code, sentence, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return problem(500, f"The server has failed ({type(error).__name__}): see its own output for details.")


def _version(heads: Mapping[str, ServedHead], settings: ServingSettings) -> Version:
    facts = [
        HeadFacts(
            name=head.name,
            encoders=head.encoders,
            runs_on=head.runs_on,
            threshold=head.threshold,
            cuts=head.cut is not None,
        )
        for head in heads.values()
    ]
    return Version(
        version=__version__,
        heads=facts,
        max_megabytes=settings.max_megabytes,
        max_megapixels=settings.max_megapixels,
    )


def _page(heads: Mapping[str, ServedHead], settings: ServingSettings) -> str:
    page, style, script = ((files("dsu.serving") / f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    template = Template(page, trim_blocks=True, autoescape=True, undefined=StrictUndefined)
    rendered: str = template.render(style=style, script=script, served=_version(heads, settings).model_dump())
    return rendered
