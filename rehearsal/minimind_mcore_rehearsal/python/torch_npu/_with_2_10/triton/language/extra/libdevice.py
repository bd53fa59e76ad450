from .. import constexpr


def __getattr__(name: str) -> object:
    return getattr(constexpr, name)
