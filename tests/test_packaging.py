"""What an installed jaxgen brings along."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_goes_into_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed, moved = set(settings["packages"]), settings["package-dir"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("jaxgen", "kernels_pallas")
        for path in (ROOT / top).rglob("*.py")
    }
    assert listed == found | moved.keys()
    assert all(list((ROOT / folder).iterdir()) for folder in moved.values())
