"""`sinkbed fit`, as far as it needs neither Lightning nor torch: is the command line one that can be read at all?"""

from __future__ import annotations

from collections.abc import Sequence

from sinkbed.train.config.arguments import check_keys
from sinkbed.train.config.keys import fit_keys


def run(command: str, argv: Sequence[str]) -> int:
    """Refuse unknown keys and unreadable files at once, then train."""
    check_keys(f"sinkbed {command}", argv, fit_keys())
    from sinkbed.train.loop.trainer import run as fit

    return fit(command, argv)
