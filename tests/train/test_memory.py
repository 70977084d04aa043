"""Memory that is freed and allocated again."""

import subprocess
import sys

import pytest

AGAIN = """
import resource, sys
from sinkbed.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for turn in range(6):
    if turn == 1:  # by then it has been allocated once
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * 2**26
    del block
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**26)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is what keeps it")
def test_memory_that_is_kept_is_no_new_page():
    """New pages in five turns, in sizes of what is allocated in each."""
    new = {kept: float(subprocess.check_output([sys.executable, "-c", AGAIN, kept])) for kept in ("kept", "not")}
    assert new["kept"] < 0.5 and new["not"] > 4
