# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: deterministic hypothesis, SIMD levels, number of threads, the worst error / bound."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated_cuda
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

LEVELS = ("v2", "v3", "v4", "zen4", "amx") if platform.machine() in ("x86_64", "AMD64") else ("neon",)


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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, metavar="N", help="run each N-th test only: a sample")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A sample where one is asked for. Tests marked slow run when ``-m slow`` names them."""
    items[:] = items[:: config.getoption("--every")]
    if "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pytest -m slow"))


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA plugin over the emulation, built once."""
    try:
        return emulated_cuda.build(tmp_path_factory.mktemp("emulation"))
    except RuntimeError as error:
        if "needs a C++ compiler" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def plugin(request: pytest.FixtureRequest) -> Iterator[Path | None]:
    """Lets backend="cuda" mean the emulation where there is no GPU: the library's path; None where there is one."""
    from qkv import _core

    if qkv.backends()[0].available:
        yield None
        return
    library = request.getfixturevalue("emulation")
    _core.set_plugin_folder(str(library.parent))
    yield library
    _core.set_plugin_folder(os.path.dirname(qkv.__file__))


@pytest.fixture
def fake(plugin: Path | None) -> Iterator[Callable[[str, int], None]]:
    """Sets what the emulated machine lacks or loses; everything is as before afterwards."""
    if plugin is None:
        pytest.skip("this machine has a real GPU")
    library = ctypes.CDLL(str(plugin))
    library.qkv_fake_get.restype = ctypes.c_long
    before: dict[str, int] = {}

    def put(name: str, value: int) -> None:
        before.setdefault(name, library.qkv_fake_get(name.encode()))
        assert library.qkv_fake_set(name.encode(), ctypes.c_long(value)) == 0

    yield put
    for name, value in before.items():
        library.qkv_fake_set(name.encode(), ctypes.c_long(value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for dtype, (ratio, where) in sorted(tolerance.WORST.items()):
        terminalreporter.write_line(f"largest error / bound, {dtype}: {ratio:.2f} ({where})")
