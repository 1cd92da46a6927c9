"""What kills left half-way, put right by the next command."""

from __future__ import annotations

import time

from flatmount.errors import FlatmountError, InUse
from flatmount.runtime import book
from flatmount.runtime.records import Containers, Exit, Record, State
from flatmount.runtime.starter import remove, take_apart
from flatmount.store import Store

_KILLED = 137  # 128 + SIGKILL


def recover(run: str, store: Store) -> tuple[str, ...]:
    """Undo what killed commands, shims and runtimes left of this store's containers. Returns what was done, in words.

    A container whose shim was killed is ended, since nobody could say any more how it ends; it stays as one that
    ended, unless it was to go with its end or had never run. Cheap where there is nothing: a lock is looked at for each
    container that runs.
    """
    containers = Containers(run)
    containers.sweep()
    told: list[str] = []
    for record in containers.unattended():
        if record.root != store.root:
            continue
        try:
            words = _put_right(containers, store, record)
        except InUse:
            continue  # somebody else is at it
        except FlatmountError as error:
            words = f"could not clear up container {record.id}: {error.line()}"
        if words:
            told.append(words)
    gone = book.orphans(store)
    if gone:
        known = {record.holder for record in containers.all()}
        for holder in gone:
            if holder not in known:
                book.release(store, holder)
    return tuple(told)


def _put_right(containers: Containers, store: Store, record: Record) -> str:
    state = containers.state(record)
    if state is State.EXITED and record.remove:
        remove(containers, store, record)
    elif state is State.LOST and (record.remove or containers.pid(record) is None):
        remove(containers, store, record)
        return f"removed container {record.id}, left by a killed command"
    elif state is State.LOST:
        with containers.locked(record):
            take_apart(containers, record, data=store.data, keep_upper=True)
            containers.set_exit(record, Exit(_KILLED, time.time_ns()))
        return f"ended container {record.id}, whose shim was killed"
    return ""
