"""The `jaxgen` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jaxgen
from jaxgen.bench import command as bench
from jaxgen.cli import convert, demo


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="jaxgen", description="LLM inference in JAX.")
    parser.add_argument("--version", action="version", version=f"jaxgen {jaxgen.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, convert, bench):
        module.add_parser(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (ValueError, RuntimeError, NotImplementedError) as error:
        print(f"jaxgen {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
