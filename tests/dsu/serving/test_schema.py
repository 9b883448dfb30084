"""The server conforms to its OpenAPI schema: schemathesis sends valid and invalid requests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import photograph, png

from dsu.serving.app import create_app
from dsu.serving.heads import ServedHead
from dsu.settings import ServingSettings

IMAGES = [png(photograph(seed), kind) for seed, kind in enumerate(("PNG", "JPEG", "GIF"))]

schemathesis.openapi.format("binary", st.sampled_from(IMAGES))  # other tests send damaged images


class Quick:
    """A segmenter without a network."""

    depth = None

    def segment(self, pictures: Sequence[Image.Image]) -> list[np.ndarray]:
        return [np.asarray(picture.convert("L"), np.float32) / 255 for picture in pictures]


@pytest.fixture
def described(heads: Mapping[str, ServedHead]) -> schemathesis.BaseSchema:
    quick = {name: replace(head, segmenter=Quick()) for name, head in heads.items()}  # type: ignore[arg-type]
    return schemathesis.openapi.from_asgi("/openapi.json", create_app(quick, ServingSettings()))


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_responses_conform_to_the_schema(described: schemathesis.BaseSchema, mode: schemathesis.GenerationMode) -> None:
    operations = {found.ok().label: found.ok() for found in described.get_all_operations()}
    assert set(operations) == {"GET /", "GET /health", "GET /version", "POST /predict"}
    for label, operation in operations.items():
        if mode.is_positive or label == "POST /predict":  # the others have no parameters
            answered = statuses(operation, mode)
            assert mode.is_negative or 200 in answered


def statuses(operation: schemathesis.APIOperation, mode: schemathesis.GenerationMode) -> list[int]:
    """Status codes of generated requests, each validated against the schema."""
    answered = []

    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def validate(case: schemathesis.Case) -> None:
        # Schemathesis sometimes sends arbitrary bytes instead of an image.
        sent = case.body.get("image") if isinstance(case.body, dict) else None
        as_meant = sent in IMAGES or operation.label != "POST /predict"
        answer = case.call_and_validate(excluded_checks=[] if as_meant else [positive_data_acceptance])
        answered.append(answer.status_code)

    validate()
    return answered
