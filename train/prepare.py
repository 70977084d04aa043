"""`sinkbed prepare`: documents to a token store, from a config."""

from __future__ import annotations

from collections.abc import Sequence


def run(command: str, argv: Sequence[str]) -> int:
    """Parse and prepare."""
    from jsonargparse import ArgumentParser

    from data.prepare import PrepareConfig, prepare

    parser = ArgumentParser(prog=f"sinkbed {command}", description="Documents to a token store.")
    parser.add_argument("--config", action="config", help="YAML file with the keys below")
    parser.add_class_arguments(PrepareConfig, None)
    parser.add_argument("--force", action="store_true", help="replace a store made from another config")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    config = parser.parse_args(list(argv))
    built = parser.instantiate_classes(config).as_dict()
    force, quiet = built.pop("force"), built.pop("quiet")
    built.pop("config", None)
    prepare(PrepareConfig(**built), force=force, progress=not quiet)
    return 0
