"""Which form `auto` takes, and what is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest

from flatmount.errors import FlatmountError, MissingFeature, UsageError
from flatmount.plan.facts import HostFacts
from flatmount.snapshotter import daemon
from flatmount.snapshotter.daemon import chosen_form
from flatmount.snapshotter.model import Form

NOTHING = HostFacts(**{field.name: False for field in fields(HostFacts)})
EVERYTHING = HostFacts(**{field.name: True for field in fields(HostFacts)})


@pytest.mark.parametrize("fuse", ["/usr/sbin/mount.fuse3", None])
def test_auto_is_overlay_and_says_what_does_not_work(fuse: str | None) -> None:
    form, why = chosen_form("auto", EVERYTHING, fuse)
    assert (form, "cheapest" in why) == (Form.OVERLAY, True)
    form, why = chosen_form("auto", NOTHING, fuse)
    assert (form, "cannot be id-mapped" in why) == (Form.OVERLAY, True)


def test_a_form_by_name_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_form("bind", EVERYTHING, None)[0] is Form.BIND
    with pytest.raises(UsageError):
        chosen_form("other", EVERYTHING, None)
    with pytest.raises(MissingFeature, match="not on PATH"):
        chosen_form("helper", EVERYTHING, None)
    monkeypatch.setattr(daemon, "HELPER", "/nowhere/flatmount-assemble")
    with pytest.raises(FlatmountError, match="cannot be executed"):
        chosen_form("helper", EVERYTHING, "/usr/sbin/mount.fuse3")
