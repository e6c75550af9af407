"""`sevenfold demo`: the tour."""

from sevenfold.cli.demo.tour import demo_command

__all__ = ["demo_command"]
