"""A saved folder is whole or absent, says what it is, and notices what happened to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longretriever import saved
from longretriever.errors import Damaged, Mismatch, NotSaved
from longretriever.saved import FORMAT, MANIFEST, kind_of, opening, writing

BIG = np.arange(1 << 18)  # 2 MiB: hashed by `verify` only


def write(path: Path, value: int = 1, kind: str = "store", meanwhile: Callable[[], object] = int) -> Path:
    with writing(path, kind) as folder:
        folder.save_array("small", np.full(10, value))
        folder.save_array("big", BIG + value)
        (folder.path / "inner").mkdir()
        (folder.path / "inner" / "note.txt").write_text(f"{value}\n")
        folder.facts["value"] = value
        folder.made_from["log"] = "abc"
        meanwhile()
    return path


def value_of(path: Path) -> int:
    manifest = opening(path, "store", verify=True)
    small, big = manifest.load_array("small", mmap=False), manifest.load_array("big")
    assert small[0] == big[0] == manifest.facts["value"]
    return int(small[0])


def hidden(path: Path) -> list[Path]:
    return list(path.parent.glob(".*"))


def test_what_is_written_is_read(tmp_path):
    manifest = opening(write(tmp_path / "deep" / "store"), "store")
    assert manifest.facts == {"value": 1}
    assert manifest.made_from == {"log": "abc"}
    assert set(manifest.files) == {"small.npy", "big.npy", "inner/note.txt"}
    assert isinstance(manifest.load_array("big").base, np.memmap)
    assert not hidden(tmp_path / "deep" / "store")


def test_the_fingerprint_is_of_the_content(tmp_path):
    prints = [
        opening(write(tmp_path / name, v), "store").fingerprint for name, v in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_the_fingerprint_of_a_folder_with_another_inside_is_of_the_content_of_both(tmp_path):
    """Not of what the manifest inside says of when and how long, though it is watched as any file."""
    prints = []
    for value, seconds in ((1, 5), (1, 6), (2, 5)):
        with writing(tmp_path / "inner", "interests") as inner:
            inner.save_array("weights", np.full(3, value))
            inner.facts["seconds"] = seconds
        with writing(tmp_path / "outer", "model") as outer:
            shutil.copytree(tmp_path / "inner", outer.path / "interests")
        prints.append(opening(tmp_path / "outer", "model").fingerprint)
        assert opening(tmp_path / "outer" / "interests", "interests").facts == {"seconds": seconds}
    assert prints[0] == prints[1] != prints[2]
    edited(tmp_path / "outer" / "interests", facts={"seconds": 7})
    with pytest.raises(Damaged, match=r"interests/manifest\.json: \d+ bytes, expected \d+"):
        opening(tmp_path / "outer", "model")


def test_an_error_leaves_the_old_one_or_nothing(tmp_path):
    write(tmp_path / "old", 7)
    for name in ("none", "old"):
        with pytest.raises(ZeroDivisionError):
            write(tmp_path / name, 8, meanwhile=lambda: 1 / 0)
    assert not (tmp_path / "none").exists()
    assert value_of(tmp_path / "old") == 7
    assert not hidden(tmp_path / "old")


def test_what_is_made_from_it_can_appear_with_it(tmp_path):
    """`then` finds the folder as it will be, and its own folders are no part of the manifest."""
    target = write(tmp_path / "store", 1)

    def then(made: Path) -> None:
        assert opening(made, "store").facts["value"] == 2
        assert opening(target, "store").facts["value"] == 1
        write(made / "index", 3, kind="index")

    with writing(target, "store", then) as folder:
        folder.facts["value"] = 2
    assert opening(target, "store", verify=True).files.keys() == set()
    assert opening(target / "index", "index", verify=True).facts["value"] == 3
    with pytest.raises(ZeroDivisionError), writing(target, "store", lambda made: 1 / 0):
        pass
    assert opening(target, "store").facts["value"] == 2
    assert not hidden(target)


KILLED = """
import os, signal, sys
import numpy as np
from longretriever import saved

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] != "block":
    setattr(saved, sys.argv[2], die)
with saved.writing(sys.argv[1], "store") as folder:
    folder.save_array("small", np.zeros(3))
    if sys.argv[2] == "block":
        die()
"""


@pytest.mark.parametrize("moment", ["block", "seal", "_move_into_place"])
def test_killed_at_any_moment_the_old_one_stays(tmp_path, moment):
    write(tmp_path / "store", 7)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "store"), moment], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert value_of(tmp_path / "store") == 7
    assert value_of(write(tmp_path / "store", 8)) == 8, "what the killed one left must not be in the way"


@pytest.mark.parametrize("atomic", [True, False], ids=["exchange", "two renames"])
def test_a_new_one_replaces_the_old_one(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(saved, "_exchange", lambda a, b: False)
    write(tmp_path / "store", 1)
    (tmp_path / "store" / "index").mkdir()  # what was put inside later goes with it
    write(tmp_path / "store", 2)
    assert value_of(tmp_path / "store") == 2
    assert not (tmp_path / "store" / "index").exists()
    assert not hidden(tmp_path / "store")


def test_readers_of_the_old_one_keep_reading_it(tmp_path):
    big = opening(write(tmp_path / "store", 1), "store").load_array("big")
    write(tmp_path / "store", 2)
    assert np.array_equal(big, BIG + 1)


def test_an_empty_folder_and_a_link_are_written_to(tmp_path):
    (tmp_path / "empty").mkdir()
    assert value_of(write(tmp_path / "empty", 3)) == 3
    write(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert value_of(tmp_path / "real") == 2


def test_two_writers_do_not_meet(tmp_path):
    """Both write at the same time, from the same process; the last to finish stays, whole."""
    both_started, first_is_done = threading.Barrier(2), threading.Event()

    def first() -> None:
        with writing(tmp_path / "store", "store") as folder:
            folder.save_array("small", np.full(10, 1))
            both_started.wait(10)
            folder.save_array("big", BIG + 1)
            folder.facts["value"] = 1
        first_is_done.set()

    thread = threading.Thread(target=first)
    thread.start()
    with writing(tmp_path / "store", "store") as folder:
        folder.save_array("small", np.full(10, 2))
        both_started.wait(10)
        folder.save_array("big", BIG + 2)
        folder.facts["value"] = 2
        assert first_is_done.wait(10)
        assert value_of(tmp_path / "store") == 1
    thread.join()
    assert value_of(tmp_path / "store") == 2
    assert not hidden(tmp_path / "store")


def test_what_the_dead_have_left_is_swept_away(tmp_path):
    """Not what is young (its writer may be on another machine), nor what a living process writes."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        name: tmp_path / f".store.partial-{pid}-{name}"
        for name, pid in (("dead", dead.pid), ("alive", os.getpid()))
    }
    names["young"] = tmp_path / f".store.partial-{dead.pid}-young"
    names["other"] = tmp_path / f".store2.partial-{dead.pid}-other"
    for name, path in names.items():
        path.mkdir()
        if name != "young":
            os.utime(path, (0, 0))
    write(tmp_path / "store")
    assert {name for name, path in names.items() if path.exists()} == {"alive", "young", "other"}


def test_never_replaces_what_is_not_ours(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_text("text")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MANIFEST).write_text('{"name": "a web page", "kind": "store"}')
    for name in ("photos", "file", "site"):
        with pytest.raises(NotSaved, match=f"{name} exists and holds no saved store .* not be overwritten"):
            write(tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_never_replaces_another_kind(tmp_path):
    write(tmp_path / "store")
    with pytest.raises(Mismatch, match="store holds a saved store, so it will not be overwritten by a model"):
        write(tmp_path / "store", 2, kind="model")
    assert value_of(tmp_path / "store") == 1


def test_what_appears_while_writing_is_not_replaced(tmp_path):
    notes = tmp_path / "new" / "notes.txt"

    def somebody_else() -> None:
        notes.parent.mkdir()
        notes.write_text("two hours of work")

    with pytest.raises(NotSaved, match="not be overwritten"):
        write(notes.parent, meanwhile=somebody_else)
    assert notes.read_text() == "two hours of work"
    assert not hidden(notes.parent)


# -- opening


def flip(file: Path, at: int = 200) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_flipped_bit_is_found_at_once_in_a_small_file_and_by_verify_in_a_large_one(tmp_path):
    write(tmp_path / "a")
    flip(tmp_path / "a" / "small.npy")
    with pytest.raises(Damaged, match=r"small\.npy: its SHA-256 .* `longretriever ingest`"):
        opening(tmp_path / "a", "store")
    write(tmp_path / "b")
    flip(tmp_path / "b" / "big.npy", at=1_000_000)
    opening(tmp_path / "b", "store")
    with pytest.raises(Damaged, match=r"big\.npy: its SHA-256 is not the one written down"):
        opening(tmp_path / "b", "store", verify=True)


def test_missing_and_cut_off(tmp_path):
    write(tmp_path / "a")
    (tmp_path / "a" / "inner" / "note.txt").unlink()
    with pytest.raises(Damaged, match=r"inner/note\.txt: missing"):
        opening(tmp_path / "a", "store")
    write(tmp_path / "b")
    os.truncate(tmp_path / "b" / "big.npy", 1000)
    with pytest.raises(Damaged, match=r"big\.npy: 1,000 bytes, expected 2,097,280"):
        opening(tmp_path / "b", "store")


def test_nothing_foreign_and_another_kind(tmp_path):
    with pytest.raises(
        NotSaved, match=r"nowhere: no such folder, where a saved index .* `longretriever index`"
    ):
        opening(tmp_path / "nowhere", "index")
    (tmp_path / "photos").mkdir()
    with pytest.raises(NotSaved, match=r"photos: no manifest\.json in it"):
        opening(tmp_path / "photos", "model")
    write(tmp_path / "store")
    with pytest.raises(
        Mismatch, match=r"store holds a saved store, expected: model\. Pass the path of the model"
    ):
        opening(tmp_path / "store", "model")
    assert kind_of(tmp_path / "store") == "store"
    assert kind_of(tmp_path / "nowhere") == "store"


def edited(path: Path, **changes: object) -> Path:
    raw = json.loads((path / MANIFEST).read_text())
    for key, value in changes.items():
        if value is None:
            del raw[key]
        else:
            raw[key] = value
    (path / MANIFEST).write_text(json.dumps(raw))
    return path


def test_a_manifest_of_another_format(tmp_path):
    """Of an older version or a later one; also one whose other fields are not what this version expects."""
    assert json.loads((write(tmp_path / "store") / MANIFEST).read_text())["format"] == FORMAT == 2
    for changes in ({"format": 1}, {"format": 99}, {"format": 99, "facts": None, "files": ["small.npy"]}):
        path = edited(write(tmp_path / "store"), **changes)
        says = f"has format {changes['format']}, this version reads format 2.*`longretriever ingest`"
        with pytest.raises(Mismatch, match=says):
            opening(path, "store")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"files": {}}, "altered by hand"),
        ({"fingerprint": "0" * 64}, "altered by hand"),
        ({"files": ["small.npy"]}, "unreadable"),
        ({"files": {"small.npy": {"bytes": 3}}}, "unreadable .*sha256"),
        ({"facts": None}, "unreadable .*facts"),
        ({"made_from": None}, "unreadable .*made_from"),
    ],
    ids=str,
)
def test_a_manifest_edited_by_hand(tmp_path, changes, found):
    path = edited(write(tmp_path / "store"), **changes)
    with pytest.raises(Damaged, match=rf"manifest\.json: {found}"):
        opening(path, "store")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00" * 50, '"text"', "\udcff"])
def test_a_manifest_that_is_none(tmp_path, content):
    path = write(tmp_path / "store")
    (path / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(Damaged, match=r"manifest\.json: unreadable"):
        opening(path, "store")


def test_an_array_that_is_none(tmp_path):
    with writing(tmp_path / "store", "store") as folder:
        (folder.path / "text.npy").write_text("no array")
        np.save(folder.path / "objects.npy", np.array([{}]), allow_pickle=True)
    manifest = opening(tmp_path / "store", "store")
    for name in ("text", "objects"):
        with pytest.raises(Damaged, match=rf"{name}\.npy: not a NumPy array file"):
            manifest.load_array(name)


def test_what_a_killed_writer_left_is_swept_away(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        pass
    pids = (dead.pid, dead.pid, os.getpid())
    old, young, alive = (tmp_path / f".store.partial-{pid}-0000000{n}" for n, pid in enumerate(pids))
    for folder in (old, young, alive):
        (folder / "spill").mkdir(parents=True)
    for folder in (old, alive):
        os.utime(folder, (0, 0))
    with writing(tmp_path / "store", "store"):
        pass
    assert not old.exists()
    assert young.exists(), "a young one may belong to a writer in another container"
    assert alive.exists()
