import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from dsu.data.views import kfold_split, train_val_split


def contents(count: int) -> dict[str, str]:
    return {f"s{index:03}": hashlib.sha256(str(index).encode()).hexdigest() for index in range(count)}


@given(count=st.integers(2, 200), fraction=st.sampled_from([0.05, 0.1, 0.3, 0.5]))
@settings(max_examples=40, deadline=None)
def test_held_out_samples_stay_held_out_when_others_come(count: int, fraction: float) -> None:
    train, held = train_val_split(contents(count), fraction)
    assert sorted(train + held) == sorted(contents(count))
    assert held
    more_train, more_held = train_val_split(contents(count + 50), fraction)
    # Only the one that a small set holds out for want of any other may change sides.
    assert len(set(held) - set(more_held)) <= (1 if len(held) == 1 else 0)
    assert set(train) <= set(more_train)


def test_the_share_is_about_the_fraction_and_nothing_without_one() -> None:
    _, held = train_val_split(contents(5000), 0.1)
    assert 400 < len(held) < 600
    assert train_val_split(contents(50), 0.0)[1] == []


def test_copies_of_an_image_stay_on_one_side() -> None:
    doubled = contents(300) | {f"copy-{name}": content for name, content in contents(300).items()}
    train, held = train_val_split(doubled, 0.3)
    assert {name.removeprefix("copy-") for name in held}.isdisjoint({name.removeprefix("copy-") for name in train})


def test_a_set_of_one_image_can_still_be_trained_on() -> None:
    assert train_val_split({"a": "x", "b": "x"}, 0.5)[0] or train_val_split({"a": "x", "b": "x"}, 0.5)[1]
    assert train_val_split({"a": hashlib.sha256(b"3").hexdigest()}, 0.0) == (["a"], [])


@given(count=st.integers(2, 60), parts=st.integers(2, 7), empties=st.integers(0, 60), tiles=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_folds_share_the_images_out(count: int, parts: int, empties: int, tiles: int) -> None:
    """Each image is held out once; tiles stay together; parts differ by an image of each kind at most."""
    images = contents(count)
    samples = {f"{name}@{tile}": content for name, content in images.items() for tile in range(tiles)}
    empty = {name for name in samples if int(name[1:4]) < empties}
    folds = [kfold_split(samples, empty, f"{part}/{parts}") for part in range(1, parts + 1)]
    assert sorted(name for _, held in folds for name in held) == sorted(samples)
    for train, held in folds:
        assert sorted(train + held) == sorted(samples)
        assert {name[:4] for name in train}.isdisjoint({name[:4] for name in held})
    for kind in (empty, set(samples) - empty):
        sizes = [len({name[:4] for name in held if name in kind}) for _, held in folds]
        assert max(sizes) - min(sizes) <= 1


def test_a_tile_without_an_object_does_not_make_its_image_one_without() -> None:
    contents_of = {f"{image}@{tile}": image for image in "abcd" for tile in range(2)}
    empty = {"a@0", "b@0", "c@0", "c@1", "d@0", "d@1"}  # a and b have an object in one tile
    for part in ("1/2", "2/2"):
        _, held = kfold_split(contents_of, empty, part)
        assert len({name[0] for name in held} & {"a", "b"}) == 1
