"""`python -m train` is the same program as `sinkbed`."""

from train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
