"""Folders of datasets, on any file system that pyarrow knows.

Tested by tests/pipeline/dataset/test_shard_dataset.py, tests/pipeline/dataset/test_unit_frames.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from models.input_file import parse_json
from pipeline.dataset.shards import check_dataset_info, require_supported
from pipeline.errors import UserError, one_line


@dataclass(frozen=True)
class DatasetFolder:
    """The folder of a dataset. name: as the user wrote it; root: its path on `filesystem`."""

    name: str
    filesystem: pafs.FileSystem
    root: str

    def shards(self, split: str | None = None) -> list[str]:
        """Return the sorted names of the shards of `split`; None: of every split.

        Raises: UserError: when the folder cannot be read, or has no shard or none of `split`.
        """
        selector = pafs.FileSelector(f"{self.root}/data", allow_not_found=True)
        with name_file_in_errors(f"{self.name}/data"):
            files = self.filesystem.get_file_info(selector)
        names = sorted(info.base_name for info in files if info.extension == "parquet")
        if not names:
            raise UserError(f"{self.name} has no shards yet; run `extract` first")
        chosen = [name for name in names if split in (None, split_of(name))]
        if not chosen:
            splits = ", ".join(sorted({split_of(name) for name in names}))
            raise UserError(f"{self.name} has no split '{split}'; data.split can be {splits}")
        return chosen

    def where(self, shard: str) -> str:
        """Return the name of a shard for messages."""
        return f"{self.name}/data/{shard}"

    @contextlib.contextmanager
    def open_shard(self, shard: str) -> Iterator[pq.ParquetFile]:
        """Open a shard whose pages are compared with their checksums as they are read.

        The shard is named in the errors of the block too.

        Raises: UserError: when the shard cannot be read.
        """
        with (
            name_file_in_errors(self.where(shard)),
            self.filesystem.open_input_file(f"{self.root}/data/{shard}") as source,
            pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True) as file,
        ):
            yield file

    def read_info(self) -> dict[str, Any]:
        """Return the contents of dataset.json.

        Raises: UserError: when this is not a dataset, or its schema version is not supported.
        """
        where = f"{self.name}/dataset.json"
        try:
            with self.filesystem.open_input_file(f"{self.root}/dataset.json") as file:
                info = parse_json(file.read().decode())
        except FileNotFoundError as error:
            raise UserError(
                f"{self.name} is not a dataset: it has no dataset.json; `extract` makes datasets"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"{where} cannot be read: {one_line(error)}") from error
        if not isinstance(info, dict) or not {"fingerprint", "settings"} <= info.keys():
            raise UserError(f"{where} is not the dataset.json of a Cantor dataset")
        check_dataset_info(info, where)
        require_supported(self.name, info)
        return info


def open_folder(
    path: str | os.PathLike[str], filesystem: pafs.FileSystem | None = None
) -> DatasetFolder:
    """Return the dataset at a local path, a URI (`s3://bucket/dataset`), or on `filesystem`.

    Raises: UserError: when pyarrow does not know the URI.
    """
    name = os.fspath(path).rstrip("/")
    if filesystem is not None:
        return DatasetFolder(name, filesystem, name)
    if "://" not in name:
        return DatasetFolder(name, pafs.LocalFileSystem(), str(Path(name).absolute()))
    try:
        filesystem, root = pafs.FileSystem.from_uri(name)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} cannot be opened: {error}") from error
    return DatasetFolder(name, filesystem, root)


def split_of(shard: str) -> str:
    """Return the split in the name of a shard, `train-00007.parquet`."""
    return shard.rpartition("-")[0]


@contextlib.contextmanager
def name_file_in_errors(where: str) -> Iterator[None]:
    """Turn what storage and Parquet raise into a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{where} cannot be read: {one_line(error)}; `cantor verify` lists damaged shards"
        ) from error
