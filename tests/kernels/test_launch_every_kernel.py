"""The program for memory checkers asks for things that the ops accept."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.launch_every_kernel import ALL


@pytest.mark.parametrize("device", ["cpu", "meta"])  # shapes of a CPU's reference may be freer
@pytest.mark.parametrize("run", ALL)
def test_arguments_are_accepted(run: Callable[[str], None], device: str) -> None:
    run(device)
