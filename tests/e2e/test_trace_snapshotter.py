"""`flatmount trace`: with our snapshotter containerd's starts cost the same at any number of layers, in each form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FORMS = ("overlay", "bind", "helper")


def test_a_start_is_constant_in_layers() -> None:
    # A process of its own: it moves into a private copy of the mount namespace for good.
    engines = ",".join(f"containerd:{form}" for form in FORMS)
    command = [sys.executable, "-m", "flatmount", "trace", "--engine", engines, "--layers", "3,40", "--json"]
    with tempfile.TemporaryDirectory(prefix="fm-", dir="/tmp") as short:  # sockets have 107 bytes for their path
        Path(short).chmod(0o711)
        environment = {**os.environ, "FLATMOUNT_RUN": f"{short}/run"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads(done.stdout)
    assert facts["absent"] == []
    assert [(fit["subject"].rpartition(", ")[2], fit["grows"]) for fit in facts["fits"]] == [
        (form, False) for form in FORMS
    ]
    assert all(20 < fit["base"] < 60 for fit in facts["fits"]), "the runtime's own mounts alone are some twenty"
