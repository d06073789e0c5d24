# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: deterministic hypothesis, SIMD levels, number of threads, the worst error / bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import qkv
import threadpoolctl
import tolerance
from hypothesis import HealthCheck, settings

settings.register_profile(
    "qkv",
    derandomize=True,  # the same examples on every machine: a red test stays red
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("qkv")

# The reference's small products: OpenBLAS' threads would cost more than they give, and take our cores.
threadpoolctl.threadpool_limits(1, user_api="blas")

LEVELS = ("v2", "v3", "v4", "zen4", "amx")


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that call set_num_threads: the number of before comes back."""
    before = qkv.get_num_threads()
    yield
    qkv.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each SIMD level that this machine and this build have."""
    from qkv import _core

    if not hasattr(_core, "set_cpu_level"):
        pytest.skip("this build cannot change its SIMD level")
    if request.param not in _core.cpu_levels():
        pytest.skip(f"no level {request.param} here")
    before = _core.cpu_level()
    _core.set_cpu_level(request.param)
    yield str(request.param)
    _core.set_cpu_level(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked slow run when ``-m slow`` names them."""
    if "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pytest -m slow"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for dtype, (ratio, where) in sorted(tolerance.WORST.items()):
        terminalreporter.write_line(f"largest error / bound, {dtype}: {ratio:.2f} ({where})")
