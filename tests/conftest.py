"""What every test shares: a skip that hides something is a failure where it counts."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# A skip with this beginning says that the machine truly cannot; any other one is a failure in CI.
CANNOT = "machine cannot: "
IN_CI = bool(os.environ.get("CI"))
SOAK = bool(os.environ.get("FLATMOUNT_SOAK"))

# Of itself hypothesis fails an example that takes 200 ms, but for where its newer versions see a CI.
settings.register_profile("house", deadline=None, derandomize=IN_CI, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if CANNOT not in reason:
            report.outcome = "failed"
            report.longrepr = f"skipped in CI without a word why the machine cannot: {reason}"


def pytest_report_header() -> list[str]:
    uname = os.uname()
    return [f"kernel {uname.release}, {os.cpu_count()} processors, uid {os.geteuid()}, soak {'on' if SOAK else 'off'}"]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that a failing test prints; FLATMOUNT_SEED gives one again."""
    chosen = int(os.environ.get("FLATMOUNT_SEED") or random.SystemRandom().randrange(10**6))
    print(f"seed {chosen} (FLATMOUNT_SEED={chosen} repeats it)")
    return chosen
