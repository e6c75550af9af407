"""The text that comes with the package: public-domain novels to try everything on."""

from pathlib import Path


def austen_paths() -> tuple[Path, ...]:
    """Return the six bundled Jane Austen novels, sorted by file name.

    Source: Project Gutenberg by way of the R package janeaustenr; see austen/PROVENANCE.md.
    """
    return tuple(sorted((Path(__file__).parent / "austen").glob("*.txt")))
