from typing import Any

MC2: Any = None


def get_mc2_group() -> Any:
    return MC2
