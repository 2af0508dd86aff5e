"""A PostgreSQL server of the test's own, in a folder of its own, reached by a Unix socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg


def server_programs() -> Path | None:
    """Return the folder with initdb and postgres, which Debian does not put on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _unprivileged() -> pwd.struct_passwd | None:
    """Return whom to be: the server refuses to run as root."""
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


@contextmanager
def server() -> Iterator[str]:
    """Run a server and yield the URL of its database."""
    programs = server_programs()
    assert programs is not None
    user = _unprivileged()
    # Not pytest's folder, which no other user can enter; a socket's path must be short, too.
    folder = Path(tempfile.mkdtemp(prefix="sq_cpu-postgres-", dir="/tmp"))
    become: list[str] = []
    if user is not None:
        os.chown(folder, user.pw_uid, user.pw_gid)
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    data = folder / "data"
    log = (folder / "log").open("w")
    try:
        subprocess.run(
            [*become, programs / "initdb", "-D", data, "-A", "trust", "-U", "tester", "--no-sync"],
            check=True,
            stdout=log,
            stderr=log,
            cwd=folder,
        )
        running = subprocess.Popen(
            [*become, programs / "postgres", "-D", data, "-k", folder, "-h", "", "-F"],
            stdout=log,
            stderr=log,
            cwd=folder,
        )
        try:
            _wait(running, folder)
            yield f"postgresql://tester@/postgres?host={folder}"
        finally:
            running.terminate()
            running.wait(60)
    finally:
        log.close()
        shutil.rmtree(folder)


def _wait(running: subprocess.Popen[bytes], folder: Path) -> None:
    for _ in range(300):
        try:
            psycopg.connect(f"host={folder} user=tester dbname=postgres").close()
            return
        except psycopg.OperationalError:
            assert running.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
    raise AssertionError((folder / "log").read_text())
