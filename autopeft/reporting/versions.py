"""Versions of what results depend on, for bug reports."""

from __future__ import annotations

import platform
from importlib.metadata import version

import typer

_PACKAGES = ("autopeft", "torch", "transformers", "peft", "lightning", "optuna", "mlflow")


def print_versions(is_asked: bool) -> None:
    """Print the versions of Python and of the main packages and end, if asked."""
    if is_asked:
        typer.echo("\n".join(f"{package} {version(package)}" for package in _PACKAGES))
        typer.echo(f"Python {platform.python_version()}, {platform.platform()}")
        raise typer.Exit
