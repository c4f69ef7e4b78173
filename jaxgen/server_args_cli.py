"""The command line of `ServerArgs`: one flag per field."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxgen.server_args import ALIASES, CLI_ALIASES, FIELDS, default_of


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    """Add `--field-name` for every field that has a textual form, plus the aliases."""
    for name, spec in FIELDS.items():
        kind = spec.metadata["kind"]
        if kind == "object":
            continue
        flags = [_flag(name)]
        flags += [_flag(alias) for alias, target in {**ALIASES, **CLI_ALIASES}.items() if target == name]
        options: dict[str, Any] = {"dest": name, "default": default_of(spec), "help": spec.metadata["help"]}
        options["help"] = options["help"].replace("%", "%%")
        if spec.metadata["choices"]:
            options["choices"] = spec.metadata["choices"]
        if name == "model_path":
            options["required"] = True
        if kind in ("bool", "bool?"):
            options["action"] = argparse.BooleanOptionalAction
        elif kind in ("ints", "strs"):
            options |= {"nargs": "+", "type": int if kind == "ints" else str}
        else:
            options["type"] = {"int": int, "float": float, "json": _json}.get(kind, str)
        parser.add_argument(*flags, **options)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
