"""A hash of what a data set says, whichever way it is stored."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

_ROWS_PER_BATCH = 10_000


def data_fingerprint(dataset: Dataset) -> str:
    """Content hash (XXH3, 128 bits, hex) of the rows in their order.

    Equal rows in equal order give equal hashes, whatever their chunks, index mappings, caches, the order of their columns or
    the width of their Arrow types; a changed character, row or column name gives another one. It reads Arrow's buffers, not
    Python objects: hundreds of MB/s.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(dataset.column_names):
        digest.update(f"{len(name)}:{name};".encode())
    digest.update(f"{len(dataset)};".encode())
    for batch in dataset.with_format("arrow").iter(batch_size=_ROWS_PER_BATCH):
        for name in sorted(batch.column_names):
            _update(digest, batch.column(name).combine_chunks())
    return digest.hexdigest()


def _update(digest: xxhash.xxh3_128, array: pa.Array | pa.ChunkedArray) -> None:
    """Hash one column of a batch: a type tag, the number of values, where nulls are, and the values without them."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    digest.update(f"{len(array)}:{array.null_count};".encode())
    if array.null_count:
        digest.update(np.packbits(pc.is_null(array).to_numpy(zero_copy_only=False)).data)
        array = array.drop_null()
    if not len(array):
        return  # the type of no values says nothing
    if pa.types.is_struct(array.type):
        digest.update(b"struct")
        fields = dict(zip((field.name for field in array.type), array.flatten(), strict=True))
        for name in sorted(fields):
            digest.update(f"{len(name)}:{name};".encode())
            _update(digest, fields[name])
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        digest.update(b"list")
        _update_numbers(digest, pc.list_value_length(array))
        _update(digest, array.flatten())
    elif pa.types.is_boolean(array.type) or pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        digest.update(b"b" if pa.types.is_boolean(array.type) else b"i" if pa.types.is_integer(array.type) else b"f")
        _update_numbers(digest, array)
    else:
        _update_strings(digest, array)


def _update_numbers(digest: xxhash.xxh3_128, array: pa.Array) -> None:
    wide = pa.float64() if pa.types.is_floating(array.type) else pa.int64()
    digest.update(np.ascontiguousarray(array.cast(wide).to_numpy(zero_copy_only=False)).data)


def _update_strings(digest: xxhash.xxh3_128, array: pa.Array) -> None:
    binary = pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)
    digest.update(b"bytes" if binary else b"str")
    array = array.cast(pa.large_binary() if binary else pa.large_string())
    _update_numbers(digest, pc.binary_length(array))
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    if data is not None:
        digest.update(memoryview(data)[bounds[0] : bounds[-1]])
