"""`python -m gemma4`: the command line."""

from __future__ import annotations

from gemma4.cli import main

main()
