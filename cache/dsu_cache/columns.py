"""Tables of JSON values, stored by column: a million samples take 200 MB and load in a second.

A column contains integers, digests (64 hexadecimal digits), or any other values as indices into a list of distinct
values. Tables are immutable. Their files are in safetensors format, which other programs can read.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import safetensors.numpy as safetensors

from dsu_cache.files import CorruptError, canonical, replacing, sha256

Indices: TypeAlias = npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_] | slice

ABSENT: Final[Any] = object()
"""The value of a column if a record lacks the field."""
COLUMNS: Final = ".safetensors"
"""File extension of tables."""
_ABSENT_CODE: Final = -1
_HEX_DIGITS: Final = 64
_TEXTS_PREFIX: Final = "texts of "
_DTYPES: Final = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "<u1"}
"""Column types by their names in safetensors headers, as NumPy types."""


@dataclass(frozen=True, eq=False)
class Column:
    """One JSON value per record.

    Attributes:
        data: whole numbers (n,), digests (n, 32) uint8, or int32 (n,) codes into `texts`.
        texts: the distinct values as lines of JSON; None if `data` contains the values.
    """

    data: npt.NDArray[Any]
    texts: bytes | None = None

    @classmethod
    def of(cls, values: Sequence[Any]) -> "Column":
        """The column of some JSON values and `ABSENT`, in the most compact form."""
        kinds = set(map(type, values))
        if kinds == {int} and min(values) >= -(2**63) and max(values) < 2**63:
            return cls(_narrow(np.array(values, np.int64)))
        if kinds == {str} and set(map(len, values)) == {_HEX_DIGITS}:
            joined = "".join(values)
            try:
                packed = bytes.fromhex(joined)
            except ValueError:
                packed = b""
            if packed.hex() == joined:
                return cls(np.frombuffer(packed, np.uint8).reshape(len(values), -1))
        return cls._encode(values)

    @classmethod
    def _encode(cls, values: Iterable[Any]) -> "Column":
        index: dict[str, int] = {}
        texts = ("" if v is ABSENT else "null" if v is None else canonical(v) for v in values)
        codes = [index.setdefault(text, len(index)) if text else _ABSENT_CODE for text in texts]
        return cls(np.array(codes, np.int32), "\n".join(index).encode())

    def __len__(self) -> int:
        return len(self.data)

    @cached_property
    def _distinct(self) -> list[Any]:
        """The values of `texts`."""
        return list(json.loads(b"[" + (self.texts or b"").replace(b"\n", b",") + b"]"))

    def value(self, index: int) -> Any:
        """The value of one record, or `ABSENT`."""
        if self.texts is not None:
            code = int(self.data[index])
            return ABSENT if code == _ABSENT_CODE else self._distinct[code]
        return self.data[index].tobytes().hex() if self.data.ndim == 2 else int(self.data[index])

    def values(self) -> list[Any]:
        """All values, including `ABSENT`."""
        if self.texts is not None:
            different = [*self._distinct, ABSENT]  # the code of an absent value is -1
            return [different[code] for code in self.data.tolist()]
        if self.data.ndim == 1:
            return list(self.data.tolist())
        digits, step = self.data.tobytes().hex(), 2 * self.data.shape[1]
        return [digits[at : at + step] for at in range(0, len(digits), step)]

    def take(self, index: Indices) -> "Column":
        """The column of some records."""
        return Column(self.data[index], self.texts)

    def joined(self, other: "Column") -> "Column":
        """This column followed by another."""
        if not len(self) or not len(other):
            return self if len(self) else other
        if self.texts is None and other.texts is None and self.data.ndim == other.data.ndim:
            return Column(np.concatenate([self.data, other.data]))
        above, below = (one if one.texts is not None else Column._encode(one.values()) for one in (self, other))
        index = {text: code for code, text in enumerate(_lines(above))}
        codes = [index.setdefault(text, len(index)) for text in _lines(below)]
        recoded = np.array([*codes, _ABSENT_CODE], np.int32)[below.data]
        return Column(np.concatenate([above.data, recoded]), b"\n".join(index))

    def trimmed(self) -> "Column":
        """The same values in the most compact form, without unused texts."""
        if self.texts is None:
            return Column(_narrow(self.data)) if self.data.ndim == 1 else self
        used, first = np.unique(self.data, return_index=True)
        used = used[np.argsort(first)]  # in the order of the records, as in a new column
        used, lines = used[used != _ABSENT_CODE], _lines(self)
        codes = np.full(len(lines) + 1, _ABSENT_CODE, np.int32)
        codes[used] = np.arange(len(used))
        return Column(codes[self.data], b"\n".join(lines[code] for code in used.tolist()))


Table: TypeAlias = Mapping[str, Column]
"""Columns of equal length by field name."""


def length(table: Table) -> int:
    """The number of records of a table with at least one column."""
    return len(next(iter(table.values())))


def take(table: Table, index: Indices) -> dict[str, Column]:
    """Some records of a table."""
    return {name: column.take(index) for name, column in table.items()}


def joined(above: Table, below: Table, index: Indices = slice(None)) -> dict[str, Column]:
    """A table followed by another one, or by some of its records. A field that one of them lacks is `ABSENT` there."""
    lacking = {id(table): Column(np.full(length(table), _ABSENT_CODE, np.int32), b"") for table in (above, below)}
    return {
        name: above.get(name, lacking[id(above)]).joined(below.get(name, lacking[id(below)])).take(index)
        for name in dict.fromkeys([*above, *below])
    }


def equal(one: Table, other: Table) -> npt.NDArray[np.bool_]:
    """Which records of two tables of equal length are the same, bool (n,)."""
    count = length(one)
    same = np.ones(count, bool)
    for column in joined(one, other).values():
        different = column.data[:count] != column.data[count:]
        same &= ~(different.any(1) if different.ndim == 2 else different)
    return same


def save_tables(folder: Path, tables: Mapping[str, Table]) -> Path:
    """Write tables to an immutable file named by its SHA-256, which is the same for the same records."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for place, table in tables.items():
        for name, column in table.items():
            least = column.trimmed()
            arrays[f"{place}/{name}"] = np.ascontiguousarray(least.data)
            if least.texts is not None:
                arrays[f"{_TEXTS_PREFIX}{place}/{name}"] = np.frombuffer(least.texts, np.uint8)
    content = safetensors.save(arrays)
    path = folder / f"{sha256(content)}{COLUMNS}"
    with replacing(path) as file:
        file.write(content)
    return path


def load_tables(path: Path) -> dict[str, Table]:
    """The tables of a file written by `save_tables`, by name.

    Raises:
        CorruptError: it is missing, or damaged.
    """
    try:
        with path.open("rb") as file:
            if f"{hashlib.file_digest(file, 'sha256').hexdigest()}{COLUMNS}" != path.name:
                raise CorruptError(f"{path} is damaged (its bytes do not match their checksum)")
            file.seek(0)
            return _read(file)
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None


def _read(file: BinaryIO) -> dict[str, Table]:
    """The result of `load_tables`. Columns are read one by one, so that none is in memory twice."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    arrays = {}
    for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        arrays[name] = np.empty(one["shape"], _DTYPES[one["dtype"]])
        file.readinto(arrays[name].data)  # type: ignore[attr-defined]
    tables: dict[str, dict[str, Column]] = {}
    for full in sorted(arrays):
        if not full.startswith(_TEXTS_PREFIX):
            place, _, name = full.partition("/")
            texts = arrays.get(_TEXTS_PREFIX + full)
            tables.setdefault(place, {})[name] = Column(arrays[full], None if texts is None else texts.tobytes())
    return dict(tables)


def _lines(column: Column) -> list[bytes]:
    return column.texts.split(b"\n") if column.texts else []


def _narrow(numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Integers in the smallest signed type that fits all of them."""
    if not len(numbers):
        return numbers.astype(np.int8)
    low, high = int(numbers.min()), int(numbers.max())
    kinds = (np.int8, np.int16, np.int32, np.int64)
    return numbers.astype(next(kind for kind in kinds if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max))
