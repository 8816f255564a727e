"""Parquet: each row is a document, whose text or turns are in a column. The place of a document is its row, from 0.

A row group belongs to the byte range that holds its first byte.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from data.errors import BadText, InputError
from data.files.listing import File, open_file, set_expected_end
from data.formats.content import MAX_DOCUMENT_BYTES, RawDocument, ReadResult, import_reader, too_long
from data.formats.fields import Fields

# Text of a row group that is decoded at once, and read ahead of a column.
BATCH_BYTES = 2**22
BATCH_ROWS = 1024
BUFFER_BYTES = 2**20
FOOTERS = 256


class Footer(NamedTuple):
    """The metadata of a Parquet file.

    Attributes:
        metadata: pyarrow's `FileMetaData` of the file.
        begins: first byte of each row group.
        rows: number of the first row of each row group, and of all rows.
    """

    metadata: Any
    begins: tuple[int, ...]
    rows: tuple[int, ...]


@lru_cache(FOOTERS)
def read_footer(file: File) -> Footer:
    """Reads and caches the footer of a file.

    Raises:
        InputError: pyarrow is missing, or access is refused.
        BadText: the file is not Parquet, or as `open_file`.
    """
    arrow, parquet = _pyarrow()
    with open_file(file) as stream, _damage(arrow, "is no parquet"):
        metadata = parquet.ParquetFile(stream).metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        # The columns of a group without rows may have no place, which is then 0.
        begins = tuple(min(filter(None, map(_begin, _columns(group))), default=0) for group in groups)
    if not all(0 <= begin < file.size for begin in begins):
        raise BadText("is no parquet: a row group begins outside of the file")
    return Footer(metadata, begins, tuple(itertools.accumulate((group.num_rows for group in groups), initial=0)))


def read_parquet(file: File, begin: int, end: int, fields: Fields, place: int = 0) -> Iterator[ReadResult]:
    """Yields (row, document or problem) from a row on, for the row groups in a byte range.

    Raises:
        InputError: pyarrow is missing, or access is refused.
        BadText: the column does not exist or holds no text, the file is damaged, or as `open_file`.
    """
    metadata, begins, rows = read_footer(file)
    wanted = [
        number
        for number, first in enumerate(begins)
        if begin <= first < end and max(place, rows[number]) < rows[number + 1]
    ]
    if not wanted:
        return
    arrow, parquet = _pyarrow()
    with open_file(file) as stream, _damage(arrow, "is damaged"):
        table = parquet.ParquetFile(
            stream, metadata=metadata, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
        )
        columns = _checked_columns(arrow, table.schema_arrow, fields)
        for number in wanted:
            row, group = rows[number], metadata.row_group(number)
            read = [column for column in _columns(group) if _is_read(column.path_in_schema, columns, fields)]
            if max((c.total_uncompressed_size for c in read), default=0) > MAX_DOCUMENT_BYTES * group.num_rows:
                raise too_long()
            ends = (_begin(column) + column.total_compressed_size for column in read)
            set_expected_end(stream, max(ends, default=file.size))
            batch_rows = min(max(group.num_rows * BATCH_BYTES // max(group.total_byte_size, 1), 1), BATCH_ROWS)
            for batch in table.iter_batches(batch_rows, [number], columns, use_threads=False):
                for i in range(max(place - row, 0), batch.num_rows):
                    yield row + i, _document(batch, i, fields)
                row += batch.num_rows


@contextmanager
def _damage(arrow: Any, problem: str) -> Iterator[None]:
    """Turns the errors of pyarrow over a damaged file into BadText."""
    try:
        yield
    except (BadText, InputError):
        raise
    except (arrow.ArrowException, OSError, ValueError, OverflowError) as error:
        # The disk's and the network's own errors are no damage.
        if isinstance(error, ConnectionError) or getattr(error, "errno", None) is not None:
            raise
        raise BadText(f"{problem}: {error}") from None


def _columns(group: Any) -> list[Any]:
    return [group.column(i) for i in range(group.num_columns)]


def _begin(column: Any) -> int:
    return column.dictionary_page_offset or column.data_page_offset


def _checked_columns(arrow: Any, schema: Any, fields: Fields) -> list[str]:
    """Returns the columns to read. BadText if one does not exist, or does not hold what it should."""
    for name, setting in fields.columns.items():
        if not fields.conversations:
            _check(arrow, schema, name, setting)
            continue
        type_ = _type_of(schema, name, setting)
        is_list = (arrow.types.is_list, arrow.types.is_large_list)
        holds_turns = any(check(type_) for check in is_list) and arrow.types.is_struct(type_.value_type)
        if not holds_turns and not (fields.rejected and _is_text(arrow, type_)):
            raise BadText(f"column {name!r} holds no lists of turns but {type_}; see {setting}")
    return [*fields.columns]


def _is_read(path: str, columns: list[str], fields: Fields) -> bool:
    """True if a stored column is one of those, or a part of the turns of a conversation."""
    return path in columns or (fields.conversations is not None and path.startswith(tuple(f"{c}." for c in columns)))


def _type_of(schema: Any, name: str, setting: str) -> Any:
    """Returns the type of a column. BadText unless there is one of this name."""
    if schema.names.count(name) > 1:
        raise BadText(f"has {schema.names.count(name)} columns {name!r}; see {setting}")
    if name not in schema.names:
        raise BadText(f"has no column {name!r}, only {', '.join(schema.names)}; see {setting}")
    return schema.field(name).type


def _check(arrow: Any, schema: Any, name: str, setting: str) -> None:
    """Raises BadText if a column does not exist or holds no text."""
    type_ = _type_of(schema, name, setting)
    if not _is_text(arrow, type_):
        raise BadText(f"column {name!r} holds no text but {type_}; see {setting}")


def _is_text(arrow: Any, type_: Any) -> bool:
    held = type_.value_type if arrow.types.is_dictionary(type_) else type_
    is_text = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view, arrow.types.is_null)
    return any(check(held) for check in is_text)


def _document(batch: Any, row: int, fields: Fields) -> RawDocument | BadText:
    values = {}
    for name in fields.columns:
        try:
            value = batch.column(name)[row].as_py()
        except UnicodeDecodeError as error:
            return BadText(f"column {name!r} is no UTF-8 at byte {error.start} ({error.reason})")
        if value is None:
            return BadText(f"column {name!r} is null")
        values[name] = value
    try:
        return fields.document(values)
    except BadText as error:
        return error


def _pyarrow() -> tuple[Any, Any]:
    arrow, parquet = (import_reader(name, ".parquet", "-e '.[parquet]'") for name in ("pyarrow", "pyarrow.parquet"))
    return arrow, parquet
