"""Where the kit is."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent  # where the kit is installed: site-packages, which has no examples/ or docs/
CONFIGS = (PACKAGE / "configs").resolve()  # a link in a checkout, a folder where the kit is installed


def default_outputs() -> Path:
    """Return the directory in which the scripts make outputs/ and data/: the checkout, else the current one."""
    return CHECKOUT if (CHECKOUT / "examples").is_dir() else Path.cwd()
