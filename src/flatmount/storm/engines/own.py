"""`flatmount`: containers as `flatmount run` starts them, in either attachment, without a command's own start-up."""

from __future__ import annotations

from typing import Self

from flatmount.plan.facts import HostFacts
from flatmount.runtime.oci import DEFAULT, Runtime
from flatmount.runtime.request import Attachment, Network, Request, Volume
from flatmount.runtime.starter import How, Started, Starter, remove
from flatmount.store import Store, StoredImage
from flatmount.storm.engines.base import INSIDE, Ask


class FlatmountEngine:
    """Everything that `flatmount run --detach --rm` does but for the store's book."""

    def __init__(
        self,
        store: Store,
        image: StoredImage,
        run: str,
        facts: HostFacts,
        arrivals: str,
        attachment: Attachment,
    ) -> None:
        """`arrivals` is the directory that goes to INSIDE."""
        self.name = f"flatmount {attachment.value}"
        self._store = store
        self._starter = Starter(store, image, run, facts, How(Runtime.find(DEFAULT, run), attachment))
        self._volumes = (Volume(arrivals, INSIDE, read_only=False, id_mapped=False),)

    def __enter__(self) -> Self:
        self._starter.template()
        return self

    def __exit__(self, *_: object) -> None:
        self._starter.close()

    @property
    def template_mounts(self) -> int | None:
        """How many mounts the namespace has that a start copies; None where it copies the host's."""
        template = self._starter.template()
        return None if template is None else template.mounts

    def start(self, ask: Ask) -> Started:
        """Start one container."""
        request = Request(
            entrypoint=ask.arguments, user="0:0", workdir="/", volumes=self._volumes, network=Network.NONE
        )
        return self._starter.start(ask.name, ask.mapping, request, foreground=False, bound=True, remove=True)

    def undo(self, started: Started) -> None:
        """Kill and remove it, and let its range go."""
        started.running.close()
        remove(self._starter.containers, self._store, started.record, force=True)
        started.running.reap()
        self._starter.pool.drop(started.record.mapping)
