"""`python -m sinkbed` is the same program as `sinkbed`."""

import os
import sys

if __name__ == "__main__":
    # Python puts the working directory first, where a file of any name would be taken for a module imported later.
    if not sys.flags.safe_path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    from sinkbed.train.cli.main import main

    raise SystemExit(main())
