import pytest
from hypothesis import given, settings, strategies as st

from dsu.config import build_config
from dsu.errors import UsageError
from dsu.network.resume import check_features, earliest, feature_block, feature_shape, resume_point, serving_features

POINTS = ("pixels", "S1", "S2", "S3", "S4", *(f"B{block}" for block in range(1, 7)))
LEVEL_ENDS = {1: 1, 2: 3, 3: 6, 4: 7}
"""Number of blocks after which each level is complete, for the toy's Hiera stages of 1, 2, 3 and 1 blocks."""


@pytest.mark.parametrize(
    ("adapt_last", "stored", "tokens", "block", "levels"),
    [
        (48, {"pixels", "V", "S1", "S2", "S3", "S4"}, "pixels", 0, ()),
        (24, {"pixels", "V"}, "pixels", 0, ()),
        (24, {"pixels", "V", "S1", "S2", "S3", "S4"}, "S2", 8, ("S1", "S2")),
        (12, {"pixels", "V", "S1", "S2", "B36"}, "B36", 36, ("S1", "S2")),
        (13, {"pixels", "V", "S1", "S2", "B36"}, "S2", 8, ("S1", "S2")),
        (4, {"pixels", "V", "S1", "S2", "S3"}, "S3", 44, ("S1", "S2", "S3")),
        (0, {"pixels", "V", "S1", "S2", "S3", "S4"}, "S4", 48, ("S1", "S2", "S3", "S4")),
        (0, {"pixels", "V", "S4"}, "pixels", 0, ()),
        (24, {"pixels", "V", "S2"}, "pixels", 0, ()),
        (47, {"pixels", "V", "B1"}, "B1", 1, ()),
    ],
)
def test_the_latest_possible_point_is_chosen(
    adapt_last: int, stored: set[str], tokens: str, block: int, levels: tuple[str, ...]
) -> None:
    point = resume_point(build_config("large", adapt_last=adapt_last), stored)
    assert (point.start, point.block, point.levels, point.guides) == (tokens, block, levels, ("V",))
    assert set(point.features) == {tokens, *levels, "V"}
    assert len(point.features) == len(set(point.features))


@settings(max_examples=100)
@given(adapt_last=st.integers(0, 7), stored=st.sets(st.sampled_from(POINTS)))
def test_no_possible_stored_point_is_later(adapt_last: int, stored: set[str]) -> None:
    config = build_config("toy", adapt_last=adapt_last)
    available = stored | {"pixels", "V"}
    point = resume_point(config, available)
    blocks = {"pixels": 0} | {f"S{level}": end for level, end in LEVEL_ENDS.items()} | {f"B{k}": k for k in range(1, 7)}

    def can_serve(name: str) -> bool:
        needed = {f"S{level}" for level, end in LEVEL_ENDS.items() if end <= blocks[name]}
        return blocks[name] <= 7 - adapt_last and needed <= available

    assert can_serve(point.start)
    assert set(serving_features(config, available)) == {name for name in available - {"V"} if can_serve(name)}
    assert point.block == max(blocks[name] for name in available - {"V"} if can_serve(name))


def test_a_level_is_preferred_to_the_equal_tokens_of_a_block() -> None:
    config = build_config("toy", adapt_last=2)
    for stored in (["pixels", "V", "S1", "S2", "B3"], ["B3", "V", "S2", "S1", "pixels"]):
        assert resume_point(config, stored).features == ("S2", "S1", "V")
    assert resume_point(config, stored, wanted="B3").start == "B3"


def test_a_requested_point_is_used_or_refused() -> None:
    config = build_config("toy", adapt_last=3)
    stored = {"pixels", "V", "S1", "S2", "B5"}
    assert resume_point(config, stored).start == "S2"
    assert resume_point(config, stored, wanted="pixels").block == 0
    with pytest.raises(UsageError, match=r"last 3 blocks.*can't start from 'B5'.*choose S1, S2, pixels"):
        resume_point(config, stored, wanted="B5")


def test_missing_maps_of_dinov2_are_named() -> None:
    with pytest.raises(UsageError, match=r"V is not stored.*--features V"):
        resume_point(build_config("toy"), {"pixels", "S1"})
    with pytest.raises(UsageError, match="V1,V2,V3,V4"):
        resume_point(build_config("toy", ablation="B"), {"pixels", "V"})
    assert resume_point(build_config("toy", ablation="A"), {"pixels"}).guides == ()


def test_a_store_without_a_feature_to_start_from_is_refused() -> None:
    with pytest.raises(UsageError, match="not even pixels"):
        resume_point(build_config("toy"), {"V"})


def test_blocks_and_shapes_of_features() -> None:
    config = build_config("large")
    assert [feature_block(config, name) for name in ("pixels", "S1", "S2", "S3", "S4", "B36")] == [
        0, 2, 8, 44, 48, 36,
    ]  # fmt: skip
    shapes = {name: feature_shape(config, name) for name in ("pixels", "V", "V24", "S1", "S4", "B2", "B3", "B36")}
    assert shapes == {
        "pixels": (352, 352, 3),
        "V": (11, 11, 1024),
        "V24": (37, 37, 1024),
        "S1": (88, 88, 144),
        "S4": (11, 11, 1152),
        "B2": (88, 88, 144),
        "B3": (44, 44, 288),
        "B36": (22, 22, 576),
    }
    assert earliest(config).features == ("pixels", "V")


@pytest.mark.parametrize("name", ["B0", "B7", "B07", "S0", "S5", "V5", "V0", "v", "x"])
def test_unknown_features_are_refused_with_a_list_of_the_known(name: str) -> None:
    config = build_config("toy")
    with pytest.raises(UsageError, match=f"{name!r} is not a feature.*B1 to B6"):
        check_features(config, [name])
    check_features(config, ["pixels", "V", "V1", "V4", "S1", "B6"])
