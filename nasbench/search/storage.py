"""Where an Optuna study is kept: a journal file, SQLite or PostgreSQL, shared by any number of workers.

Workers may be killed at any time. A journal's lock belongs to the system, which frees it when a process dies, and every
writer cuts off what a killed one left behind the last whole line.
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasbench.core.errors import MachineError, UserError
from nasbench.core.files import locked

if TYPE_CHECKING:
    import optuna

ATTEMPTS = 8
"""Tries to open a database: workers that open a new one at once create the same tables, and all but one fail."""
SQLITE_TIMEOUT_S = 60
log = logging.getLogger("nasbench")


def open_study(name: str, storage: str, journal: Path) -> optuna.Study:
    """The study of a name, which the first worker makes.

    Args:
        storage: URL of a database, or path of a journal file; "" for `journal`.

    Raises:
        UserError: a storage that does not open.
        MachineError: the disk is at fault.
    """
    import optuna
    from sqlalchemy.exc import DBAPIError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = "postgresql+psycopg://" + storage.partition("://")[2] if storage.startswith("postgres") else storage
    for attempt in range(1, ATTEMPTS + 1):
        try:
            kept = _database(url) if "://" in url else optuna.storages.JournalStorage(_journal(Path(url or journal)))
            return optuna.create_study(
                study_name=name, storage=kept, directions=["minimize", "maximize"], load_if_exists=True
            )
        except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
            if attempt == ATTEMPTS:
                raise _refused(storage, error) from error
            time.sleep(random.uniform(0.0, 0.05 * 2**attempt))
        except OSError as error:
            raise MachineError(f"Optuna storage {url or journal}: {error.strerror or error}") from error
        except Exception as error:
            raise _refused(storage or str(journal), error) from error
    raise AssertionError


def _refused(storage: str, error: Exception) -> UserError:
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    more = ": pip install 'nasbench[postgresql]'" if isinstance(error, ImportError) else ""
    return UserError(f"Optuna storage {storage!r} does not open: {first}{more}")


def _database(url: str) -> optuna.storages.BaseStorage:
    import optuna

    options = {"connect_args": {"timeout": SQLITE_TIMEOUT_S}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=options)


def _journal(path: Path) -> Any:
    """A journal whose writers survive each other's deaths."""
    from optuna.storages.journal import JournalFileBackend

    class Journal(JournalFileBackend):
        """Optuna's own waits for the lock of a killed process, and appends to its half line. The system keeps what a
        killed process wrote, so that no line waits for the disk."""

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lines = "".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in logs)
            with locked(path), path.open("r+b") as file:
                end = file.seek(0, os.SEEK_END)
                if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
                    file.seek(0, os.SEEK_END)
                file.write(lines.encode())

    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        _cut_torn(path)
        return Journal(str(path))


def _cut_torn(path: Path) -> None:
    """Cuts a journal back before the first line that is torn. Later lines rest on it: trials are numbered by the lines
    before them."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = 0
    for number, line in enumerate(lines, 1):
        if not _is_record(line):
            log.warning("%s: cut back before line %d of %d, which is torn", path, number, len(lines))
            os.truncate(path, whole)
            return
        whole += len(line)


def _is_record(line: bytes) -> bool:
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False
