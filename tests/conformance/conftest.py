"""A snapshot service for each form, in a private copy of the mount namespace."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from flatmount.kernel.namespaces import enter_private_mounts
from tests.snapshotting import Client, Daemon, empty, own_mounts, serving

FORMS = ("overlay", "bind", "helper")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="real mounts need root"))


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, form: str) -> Iterator[Daemon]:
    """One service for each form and module: a start takes longer than a test."""
    enter_private_mounts()
    with serving(tmp_path_factory.mktemp(form), form) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    """Connected to a service that has no snapshots; afterwards it has none again, and no mount and no file."""
    with daemon.client() as connected:
        yield connected
        connected.clear()
        assert own_mounts(daemon) == []
        empty(daemon, connected)
        for place in ("trash", "staging"):
            assert os.listdir(daemon.data / place) == []
