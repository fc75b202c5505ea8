"""How a store, a model or an index lies on disk: a folder that is whole or absent, and says what it is.

Files are written into a sibling folder, hashed, synced and then renamed into place, so a crash at any
moment leaves the old folder or the new one. `manifest.json` holds the format version, the package
version, the configuration, size and SHA-256 of every file, and the fingerprint of what it was made from.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from longretriever.errors import Damaged, Mismatch, NotSaved

FORMAT = 2
MANIFEST = "manifest.json"
_HASHED_AT_OPEN = 1 << 20  # bytes: smaller files are always hashed, larger ones only by `verify`
_MADE_BY = {
    "market": "longretriever generate",
    "store": "longretriever ingest",
    "partition": "longretriever ingest --parts",
    "model": "longretriever train",
    "interests": "longretriever train",
    "checkpoint": "longretriever train",
    "index": "longretriever index",
}


def package_version() -> str:
    try:
        return version("longretriever")
    except PackageNotFoundError:  # a source tree on the path, never installed
        return "0+unknown"


@dataclass
class Folder:
    """A folder being written: put files into `path`, facts into `facts`, origins into `made_from`.

    `inside` names saved folders in it that have manifests of their own, and are no part of this one's.
    """

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    made_from: dict[str, str] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    package: str = field(default_factory=package_version)

    def save_array(self, name: str, array: np.ndarray) -> None:
        np.save(self.path / f"{name}.npy", array, allow_pickle=False)

    def so_far(self, kind: str) -> Manifest:
        """What has been written, for who reads it before it is whole; no file is said to be there."""
        return Manifest(self.path, kind, self.facts, {}, self.made_from, "")


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a folder.

    `fingerprint` is a SHA-256 over names and hashes of all files: equal content, equal fingerprint.
    `made_from` maps a kind ("store", "model") to the fingerprint of the folder that this one was made from.
    """

    path: Path
    kind: str
    facts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    made_from: dict[str, str]
    fingerprint: str

    def load_array(self, name: str, mmap: bool = True) -> np.ndarray:
        """The array saved under `name`, memory-mapped read-only unless `mmap` is off.

        A plain array over the map: NumPy's `memmap` makes each small slice cost 3 times as much.
        """
        file = self.path / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="r" if mmap else None, allow_pickle=False).view(np.ndarray)
        except ValueError as error:
            raise Damaged(
                f"{file}: not a NumPy array file ({error}). {_make_again(self.kind, self.path)}"
            ) from error


@contextmanager
def writing(
    path: str | os.PathLike[str], kind: str, then: Callable[[Path], object] | None = None
) -> Iterator[Folder]:
    """Write a folder of this kind to `path`, replacing an older one only once the new one is complete.

    `then` is called with the finished folder before it takes its place, and may put folders into it that are
    made from it (the index of a model), so that both appear at once; they are no part of its manifest.

    On an error inside the block nothing is left behind and an older folder stays as it was. Of several
    writers to one path, the last to finish stays. Raises `NotSaved` or `Mismatch` when something other than
    an older folder of this kind is in the way, at the beginning or by the end.
    """
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    check_replaceable(target, kind)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    partial = beside(target, "partial")
    partial.mkdir()
    try:
        folder = Folder(partial)
        yield folder
        seal(folder, kind)
        if then is not None:
            then(partial)
        check_replaceable(target, kind)
        _move_into_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def beside(target: Path, purpose: str) -> Path:
    """A hidden path next to `target`, on the same disk, that no other writer uses."""
    return target.with_name(f".{target.name}.{purpose}-{os.getpid()}-{uuid4().hex[:8]}")


def _sweep(target: Path) -> None:
    """Remove what writers to this path have left that were killed: of a dead process, and ten minutes old."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*-*-*"):
        pid = left.name.split("-")[-2]
        with suppress(FileNotFoundError):  # its writer may finish just now
            if pid.isdigit() and time.time() - left.stat().st_mtime > 600 and not _lives(int(pid)):
                shutil.rmtree(left, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, so it is there
        return True
    return True


def check_replaceable(target: Path, kind: str) -> None:
    """Only nothing, an empty folder and a saved folder of the same kind may be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    found = _kind_said(target)
    if found is None:
        raise NotSaved(
            f"{target} exists and holds no saved {kind} of longretriever, so it will not be overwritten. "
            "Choose another path, or remove it."
        )
    if found != kind:
        raise Mismatch(
            f"{target} holds a saved {found}, so it will not be overwritten by a {kind}. "
            "Choose another path, or remove it."
        )


def stamp(folder: Path) -> tuple[str, int, int] | None:
    """Changes whenever the folder is replaced, or a link to it turned; None where nothing is. One look."""
    file = folder.resolve() / MANIFEST
    try:
        found = os.stat(file)
    except OSError:
        return None
    return str(file), found.st_ino, found.st_mtime_ns


def opening(path: str | os.PathLike[str], kind: str, verify: bool = False) -> Manifest:
    """Read and check the manifest of a folder of this kind.

    Always compares the size of every file, and the SHA-256 of those under 1 MiB, so that opening takes
    milliseconds; `verify=True` hashes everything.

    Raises `NotSaved` when there is no such folder, `Mismatch` when it is of another kind or format,
    `Damaged` when a file is missing, cut off or altered.
    """
    folder = Path(path)
    if not folder.exists():
        raise NotSaved(
            f"{folder}: no such folder, where a saved {kind} was wanted. Make one with `{_MADE_BY[kind]}`."
        )
    if not (folder / MANIFEST).is_file():
        raise NotSaved(
            f"{folder}: no {MANIFEST} in it, so it holds no saved {kind} of longretriever. "
            f"Make one with `{_MADE_BY[kind]}`."
        )
    try:
        raw = json.loads((folder / MANIFEST).read_text())
        if raw["kind"] != kind:
            raise Mismatch(
                f"{folder} holds a saved {raw['kind']}, expected: {kind}. Pass the path of the {kind}."
            )
        if raw["format"] != FORMAT:
            raise Mismatch(
                f"{folder} has format {raw['format']}, this version reads format {FORMAT}. "
                f"{_make_again(kind, folder)}"
            )
        manifest = Manifest(folder, kind, raw["facts"], raw["files"], raw["made_from"], raw["fingerprint"])
        if _fingerprint(manifest.files) != manifest.fingerprint:
            raise Damaged(f"{folder / MANIFEST}: altered by hand. {_make_again(kind, folder)}")
        for name, facts in manifest.files.items():
            _check_file(folder / name, facts, kind, folder, verify)
    except (ValueError, KeyError, TypeError) as error:  # not JSON, or not what a manifest holds
        raise Damaged(
            f"{folder / MANIFEST}: unreadable ({type(error).__name__}: {error}). {_make_again(kind, folder)}"
        ) from error
    return manifest


def kind_of(path: str | os.PathLike[str]) -> str:
    """What a folder says it is; "store" where it says nothing, so that `opening` can say what is wrong."""
    return _kind_said(Path(path)) or "store"


def _kind_said(folder: Path) -> str | None:
    """The kind in the manifest; None where there is none of ours (other programs write manifests too)."""
    try:
        raw = json.loads((folder / MANIFEST).read_text())
        return raw["kind"] if raw["kind"] in _MADE_BY and "fingerprint" in raw else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_file(file: Path, facts: dict[str, Any], kind: str, folder: Path, verify: bool) -> None:
    if not file.is_file():
        raise Damaged(f"{file}: missing. {_make_again(kind, folder)}")
    size = file.stat().st_size
    if size != facts["bytes"]:
        raise Damaged(f"{file}: {size:,} bytes, expected {facts['bytes']:,}. {_make_again(kind, folder)}")
    if (verify or size < _HASHED_AT_OPEN) and _sha256(file) != facts["sha256"]:
        raise Damaged(f"{file}: its SHA-256 is not the one written down. {_make_again(kind, folder)}")


def _make_again(kind: str, folder: Path) -> str:
    return f"Restore it from a copy, or make {folder} again with `{_MADE_BY.get(kind, 'longretriever')}`."


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fingerprint(files: dict[str, dict[str, Any]]) -> str:
    """Of all but the manifests of folders inside, which say when and how their files were made."""
    names = sorted(name for name in files if Path(name).name != MANIFEST)
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def seal(folder: Folder, kind: str) -> None:
    """Hash and sync all files, and write the manifest; `writing` does so by itself."""
    found = (f.relative_to(folder.path) for f in folder.path.rglob("*") if f.is_file())
    names = sorted(str(name) for name in found if name.parts[0] not in folder.inside)
    files = {
        n: {"bytes": (folder.path / n).stat().st_size, "sha256": _sha256(folder.path / n)} for n in names
    }
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "package": folder.package,
        "fingerprint": _fingerprint(files),
        "made_from": folder.made_from,
        "facts": folder.facts,
        "files": files,
    }
    (folder.path / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    for name in [*names, MANIFEST]:
        sync(folder.path / name)
    sync(folder.path)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(partial: Path, target: Path) -> None:
    try:
        os.rename(partial, target)  # where there is nothing, or an empty folder
    except OSError:
        if not target.exists():
            raise
        if not _exchange(partial, target):  # without an atomic exchange there is a moment with neither
            old = beside(target, "old")
            os.rename(target, old)
            os.rename(partial, target)
            shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step (Linux `renameat2`); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
