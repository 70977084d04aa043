"""`python -m train` is the same program as `sinkbed`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the working directory first, where a file of any name would be taken for a module that is imported
    # later; a checkout that is not installed needs it, behind all else.
    here = str(Path.cwd())
    if not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]
        if Path(__file__).resolve().parent.parent == Path(here).resolve():
            sys.path.append(here)
    from train.cli import main

    raise SystemExit(main())
