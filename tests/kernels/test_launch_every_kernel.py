"""The program for memory checkers asks for things that the ops accept."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernels.launch_every_kernel import ALL


@pytest.mark.parametrize("run", ALL)
def test_on_the_references(run: Callable[[str], None]) -> None:
    run("cpu")
