"""Assets: the files that a model is of no use without (tokenizer, configs), kept byte for byte in its checkpoints.

Reads them into tensors, tells their digests, writes them out again. Stored names are hostile input:
none of them leads out of the directory that is written to.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TypeAlias, cast

import torch

from distckpt import Checkpointer
from distckpt.errors import CheckpointError, CorruptionError
from distckpt.storage import PosixStorage, Storage

Assets: TypeAlias = dict[str, dict[str, torch.Tensor]]
Digests: TypeAlias = dict[str, dict[str, dict[str, str | int]]]

MAX_ASSET_BYTES = 1 << 30
MAX_ASSET_FILES = 10_000


def read_assets(
    paths: Mapping[str, str | PathLike[str]], *, max_bytes: int = MAX_ASSET_BYTES, max_files: int = MAX_ASSET_FILES
) -> Assets:
    """name -> relative path -> content, as uint8 tensors. A path is a file, or a directory with all that is below it.

    Symbolic links count as what they lead to, if that is a file of the same directory, or of the same repository of
    the Hugging Face cache. Raises CheckpointError for other links, for what is no regular file, for a directory
    without files, and for more than max_bytes or max_files in all; OSError, which names the file.
    """
    found: dict[str, dict[str, Path]] = {}
    total_bytes = total_files = 0
    for name, given in paths.items():
        _refuse_name(name, CheckpointError)
        found[name] = {}
        for relative, path in _files_of(name, Path(given)):
            total_bytes, total_files = total_bytes + path.stat().st_size, total_files + 1
            if total_bytes > max_bytes or total_files > max_files:
                raise CheckpointError(
                    f"assets: with {path} they are {total_bytes} bytes in {total_files} files, and may be {max_bytes} "
                    f"bytes in {max_files}. Is {os.fspath(given)!r} the directory of the tokenizer or configuration "
                    "alone? Else raise the bound"
                )
            found[name][relative] = path
        if not found[name]:
            raise CheckpointError(f"asset {name!r}: there is no file in {os.fspath(given)!r}")
    return {name: {relative: _read(path) for relative, path in files.items()} for name, files in found.items()}


def _files_of(name: str, top: Path) -> Iterator[tuple[str, Path]]:
    """(relative POSIX path, file) of a file or directory, sorted; every one has been looked at."""
    kind = os.stat(top).st_mode
    if stat.S_ISREG(kind):
        yield _relative_name(top.name), top
        return
    if not stat.S_ISDIR(kind):
        raise CheckpointError(f"asset {name!r}: {top} is neither a file nor a directory of files")
    for directory, subdirectories, files in os.walk(top, onerror=_raise):
        subdirectories.sort()
        for entry in sorted([*files, *(sub for sub in subdirectories if Path(directory, sub).is_symlink())]):
            path = Path(directory, entry)
            target = path.resolve(strict=True)
            if path.is_symlink() and not any(target.is_relative_to(allowed) for allowed in _homes_of(top)):
                raise CheckpointError(
                    f"asset {name!r}: {path} is a link to {target}, which is not in {top}. Give a directory that has "
                    "the files themselves"
                )
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise CheckpointError(f"asset {name!r}: {path} is neither a file nor a directory of files")
            yield _relative_name(path.relative_to(top).as_posix()), path


def _raise(error: OSError) -> None:
    raise error


def _homes_of(top: Path) -> list[Path]:
    """Where links of a directory may lead: into it; in the Hugging Face cache from snapshots/<revision> to blobs."""
    home = top.resolve(strict=True)
    is_snapshot = home.parent.name == "snapshots"
    return [home, home.parent.parent / "blobs"] if is_snapshot else [home]


def _read(path: Path) -> torch.Tensor:
    with open(path, "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        data = bytearray(file.read(size_bytes + 1))
    if len(data) != size_bytes:
        raise CheckpointError(f"{path} changed while it was read: {size_bytes} bytes, then {len(data)} or more")
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def digest_assets(assets: Mapping[str, Mapping[str, torch.Tensor]]) -> Digests:
    """name -> relative path -> {"sha256", "size_bytes"}: JSON values for the metadata of a checkpoint."""
    return {name: {path: _digest(content) for path, content in files.items()} for name, files in assets.items()}


def _digest(content: torch.Tensor) -> dict[str, str | int]:
    return {"sha256": hashlib.sha256(content.cpu().numpy().data).hexdigest(), "size_bytes": content.numel()}


def extract_assets(
    ckpt: Checkpointer, directory: str | PathLike[str], iteration: int | str | None = None
) -> tuple[str, ...]:
    """Write the assets of a checkpoint, the newest by default, below a directory. Collective; rank 0 writes.

    Returns the names that it wrote, none on other ranks. Raises what Checkpointer.read and write_assets raise.
    """
    stored = ckpt.read(iteration, keys=["assets"])["assets"]
    return write_assets(cast("Assets", stored), directory) if ckpt.rank == 0 else ()


def write_assets(
    stored: Mapping[str, Mapping[str, torch.Tensor]], directory: str | PathLike[str] | Storage
) -> tuple[str, ...]:
    """Write each file to <directory>/<asset name>/<relative path>, durably; return these names below the directory.

    A file that is there already is replaced whole: whoever reads it sees the old or the new one. Nothing is written if
    any name is not a relative path below the directory, or any content not bytes: CorruptionError.
    """
    files: dict[str, torch.Tensor] = {}
    for asset, contents in stored.items():
        _refuse_name(asset, CorruptionError)
        for path, content in contents.items():
            _refuse_path(path)
            if content.dtype != torch.uint8 or content.dim() != 1:
                raise CorruptionError(f"asset {asset!r}: {path!r} is a {content.dtype} of {content.dim()} dimensions")
            files[f"{asset}/{path}"] = content
    parents = sorted({name.rpartition("/")[0] for name in files})
    for name in files:
        if any(f"{parent}/".startswith(f"{name}/") for parent in parents):
            raise CorruptionError(f"assets: {name!r} is a file, and a directory of others")
    if not isinstance(directory, str | PathLike):
        storage = directory
    else:
        _refuse_links_out(Path(directory), parents, [*files])
        storage = PosixStorage(directory)
    for parent in parents:
        storage.make_directory(parent)
    for name, content in files.items():
        storage.replace(name, content.cpu().numpy().tobytes())
    return tuple(files)


def _refuse_links_out(directory: Path, parents: list[str], names: list[str]) -> None:
    """A link that lies in the directory already may lead anywhere."""
    top = directory.resolve()
    for parent in parents:
        if not (directory / parent).resolve().is_relative_to(top):
            raise CheckpointError(f"{directory / parent} leads out of {directory}: nothing was written")
    for name in names:
        if (directory / name).is_dir():
            raise CheckpointError(f"{directory / name} is a directory, where a file is to be written")


def _refuse_name(name: str, error: type[CheckpointError]) -> None:
    if "/" in name or not _is_relative(name):
        raise error(f"asset {name!r}: expected a name without '/', which is to be that of a directory")


def _refuse_path(path: str) -> None:
    if not _is_relative(path):
        raise CorruptionError(f"asset file {path!r}: expected a relative path without empty, '.' or '..' segments")


def _is_relative(path: str) -> bool:
    return "\0" not in path and "\\" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def _relative_name(path: str) -> str:
    """As it will be a key of the state: text, and safe to write out again."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"asset file {path!r}: its name is not UTF-8, so it cannot be stored") from error
    if not _is_relative(path):
        raise CheckpointError(f"asset file {path!r}: a name with '\\' could not be written out everywhere")
    return path
