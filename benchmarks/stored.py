"""Rows of parquet files in memory, but for their pictures, which stay in the files until asked for.

The cell of a picture names its place instead, {"bytes": None, "path": "parquet://..."}, which
stored() follows. So nothing is written a second time, and of files on the hub only the row groups
are read whose pictures are shown.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from fsspec.core import url_to_fs

from data.parquet import TransportError

PLACE = "parquet://"
CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})
ROOM = 512 << 20                       # bytes of row groups that a process keeps in memory [ours]

groups = {}                            # (file, row group, ...) -> its pictures; last the last used


def rows(files: list[str], columns) -> Dataset:
    """The rows of parquet files, local or hf:// addresses, in their order, with these columns,
    which each of them has. Raises as opened() does."""
    with ThreadPoolExecutor(8) as pool:                # mostly to wait for a network
        tables = list(pool.map(lambda file: of_file(file, columns), files))
    # without a fingerprint `datasets` would hash a copy of it
    return Dataset(pa.concat_tables(tables, promote_options="default"), fingerprint="stored")


def row_groups(files: list[str]) -> int:
    """How many row groups the files have. Raises as opened() does."""
    with ThreadPoolExecutor(8) as pool:
        return sum(found.num_row_groups for found in pool.map(footer, files))


def of_file(file: str, columns) -> pa.Table:
    schema = footer(file).schema.to_arrow_schema()
    shown = [name for name in columns if is_picture(schema.field(name).type)]
    leaves = [footer(file).schema.column(i).path for i in range(footer(file).num_columns)]
    # the paths tell which cells there are, without the pictures themselves
    wanted = [leaf for leaf in leaves if (name := leaf.split(".")[0]) in columns
              and (name not in shown or leaf.endswith(".path"))]
    table = opened(file, lambda stream: parquet_file(file, stream).read(wanted))
    for name in shown:
        cells = places(file, name, table.column(name))
        table = table.set_column(table.column_names.index(name), name, cells)
    return table.select(list(columns)).replace_schema_metadata()


def is_picture(kind: pa.DataType) -> bool:
    """One picture a cell, or a list of them, as `datasets` writes them."""
    kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def places(file: str, name: str, column: pa.ChunkedArray) -> pa.Array:
    """The same column with each picture's place in place of it; what is empty stays empty."""
    rows = [(group, row) for group in range(footer(file).num_row_groups)
            for row in range(footer(file).row_group(group).num_rows)]

    def place(*at):
        return {"bytes": None, "path": PLACE + json.dumps([file, *at])}
    if pa.types.is_struct(column.type):
        cells = [place(*at, name) if there else None
                 for at, there in zip(rows, column.is_valid().to_pylist())]
        return pa.array(cells, CELL)
    cells = [None if cell is None else
             [place(*at, name, k) if one is not None else None for k, one in enumerate(cell)]
             for at, cell in zip(rows, column.to_pylist())]
    return pa.array(cells, pa.list_(CELL))


def stored(place: str) -> dict:
    """The cell {"bytes", "path"} at a place. Raises as opened() does."""
    file, group, row, name, *rest = json.loads(place.removeprefix(PLACE))
    cell = group_of(file, group).column(name)[row]
    return (cell.values[rest[0]] if rest else cell).as_py()


def group_of(file: str, group: int) -> pa.Table:
    """The pictures of a row group: neighbours are asked for one after the other."""
    key = file, group, written(file)
    table = groups.pop(key, None)
    if table is None:
        schema = footer(file).schema.to_arrow_schema()
        names = [field.name for field in schema if is_picture(field.type)]
        table = opened(file, lambda stream:
                       parquet_file(file, stream).read_row_group(group, names))
    groups[key] = table
    while len(groups) > 1 and sum(one.nbytes for one in groups.values()) > ROOM:
        groups.pop(next(iter(groups)))
    return table


def column_names(file: str) -> list[str]:
    return footer(file).schema.to_arrow_schema().names


def footer(file: str) -> pq.FileMetaData:
    """Raises as opened() does."""
    return footer_at(file, written(file))


@lru_cache(4096)
def footer_at(file: str, written) -> pq.FileMetaData:
    return opened(file, pq.read_metadata)


def written(file: str) -> int:
    """When a local file was last written: it may be another under the same name."""
    return Path(file).stat().st_mtime_ns if Path(file).exists() else 0


def parquet_file(file: str, stream) -> pq.ParquetFile:
    return pq.ParquetFile(stream, metadata=footer(file), pre_buffer=True)


def opened(file: str, read: Callable):
    """read(the open file). Raises ValueError naming the file where that fails."""
    try:
        system, path = url_to_fs(file)
        # nothing is read ahead of what is asked for: that would be pictures
        with system.open(path, "rb", **({"cache_type": "none"} if "://" in file else {})) as stream:
            return read(stream)
    except (pa.ArrowException, OSError, TransportError) as error:
        raise ValueError(f"{file}: cannot be read ({error}): expected rows as parquet; try again "
                         "if it is the network's fault, else fetch it anew") from error
