"""The storages that trials are kept in: memory, a SQLite file, or a database by its URL."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from sqlalchemy.exc import SQLAlchemyError

from sq_cpu.autotuning import processes
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import absolute
from sq_cpu.parsing import check_kind

_NO_SUCH_VALUE = "is not among the defined enum values"  # SQLAlchemy, of a column
_NOT_FOUND = "Record does not exist."  # what Optuna says of a study or trial that is gone

__all__ = ["check_storage", "has_study", "is_shared", "opened_storage", "quiet_optuna"]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Run a block without Optuna's log on stderr."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def check_storage(where: object) -> None:
    """Raise `SqCpuError` for what names no storage; `where` is as for `opened_storage`."""
    meant = "a path, a database's URL or a storage of Optuna's"
    check_kind(str | os.PathLike | BaseStorage | None, meant, storage=where)


@contextmanager
def opened_storage(where: str | os.PathLike[str] | BaseStorage | None) -> Iterator[BaseStorage]:
    """Yield the storage that `where` names, and close it afterwards, if it was opened here.

    Parameters
    ----------
    where : a path (SQLite), a database's URL such as "postgresql://user@host/name", a storage of
        Optuna's, or None: memory, which ends with the process. In a storage without heartbeats a
        worker that died on another machine cannot be told from a slow one.

    Raises
    ------
    SqCpuError
        When the database cannot be opened, or the package that talks to it is missing; and when it
        fails within the block: removed, locked by others, read-only, damaged.
    """
    if isinstance(where, BaseStorage):
        with _told_failures():
            yield where
        return
    if where is None:
        yield InMemoryStorage()
        return
    storage = _open(_url(where))
    try:
        with _told_failures():
            yield storage
    finally:
        with suppress(SQLAlchemyError):
            storage.remove_session()
        storage.engine.dispose()


@contextmanager
def _told_failures() -> Iterator[None]:
    try:
        yield
    except (StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
        cause = error.__cause__ or error
        raise _failure(first_line(cause)) from error
    except LookupError as error:
        if error.args == (_NOT_FOUND,):
            raise _failure("the study is gone") from error
        if _NO_SUCH_VALUE in str(error):
            raise _failure(f"it is damaged: {first_line(error)}") from error
        raise


def _failure(why: str) -> SqCpuError:
    return SqCpuError(f"the storage failed ({why}); what is finished is kept there, run again")


class _Storage(RDBStorage):
    """One whose heartbeats, in a thread of their own, fail in silence: the next call says why."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError):
            super().record_heartbeat(trial_id)


def _open(url: str, retries: int = 5) -> RDBStorage:
    # Writers wait for each other's locks instead of failing.
    engine = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
            return _Storage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=processes.HEARTBEAT,
                grace_period=processes.GRACE,
            )
    except ImportError as error:
        raise SqCpuError(
            f"no driver for the storage {_without_password(url)} ({error}): for PostgreSQL, "
            "pip install 'sq_cpu[postgres]'"
        ) from error
    except Exception as error:  # SQLAlchemy's and the drivers' own have no base in common
        # Of two that make the tables at once, one has to lose.
        lost = any(sign in str(error) for sign in ("already exists", "UNIQUE constraint"))
        if lost and retries:
            time.sleep(random.random())
            return _open(url, retries - 1)
        raise SqCpuError(
            f"cannot open the storage {_without_password(url)}: {first_line(error)}; give a path "
            "or the URL of a database that is running"
        ) from error


def _url(where: str | os.PathLike[str]) -> str:
    text = os.fspath(where)
    kind, separator, rest = text.partition("://")
    if not separator:
        return f"sqlite:///{absolute(text)}"
    # Without a driver the name would mean psycopg2 to some SQLAlchemy releases.
    return f"postgresql+psycopg://{rest}" if kind in ("postgres", "postgresql") else text


def _without_password(url: str) -> str:
    kind, _, rest = url.partition("://")
    who, at, where = rest.rpartition("@")
    return f"{kind}://{who.partition(':')[0]}{at}{where}"


def is_shared(where: str | os.PathLike[str] | BaseStorage | None) -> bool:
    """Return whether processes share what they open; `where` is as for `opened_storage`.

    Memory belongs to one process.
    """
    if where is None or isinstance(where, InMemoryStorage):
        return False
    if isinstance(where, BaseStorage) and not isinstance(where, RDBStorage):
        return True
    url = str(where.engine.url) if isinstance(where, RDBStorage) else _url(where)
    kind, _, rest = url.partition("://")
    file, _, query = rest.partition("?")
    in_memory = file.strip("/") in ("", ":memory:") or "mode=memory" in query
    return not (kind.startswith("sqlite") and in_memory)


def has_study(storage: BaseStorage, name: str) -> bool:
    """Return whether the storage holds a study of that name."""
    try:
        return name in optuna.get_all_study_names(storage)
    except json.JSONDecodeError as error:  # Optuna's own columns hold JSON
        raise _failure(f"it is damaged: {first_line(error)}") from error
