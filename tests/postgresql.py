"""A PostgreSQL server for a test, of Debian's packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def postgresql_server() -> Iterator[str]:
    """Run a server on a socket in a new folder; yields the URI of its empty database."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not binaries:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    data, owner = folder / "data", list[str]()
    if os.geteuid() == 0:  # as root PostgreSQL does not run
        shutil.chown(folder, "postgres")
        owner = ["runuser", "-u", "postgres", "--"]

    def run(program: str, *arguments: str) -> None:
        command = [*owner, str(binaries[-1] / program), "-D", str(data), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    try:
        run("initdb", "--username=postgres", "--auth=trust", "--no-sync")
        sockets_alone = f"-k {folder} -c listen_addresses=''"
        run("pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", sockets_alone)
        try:
            yield f"postgresql+psycopg2://postgres@/postgres?host={folder}"
        finally:
            run("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder)
