"""What is read of the processor in /proc/cpuinfo."""

from __future__ import annotations

import io
from typing import Any

import pytest

from minimind_mcore.platform import cpu, processor

# vendor, flags: is MKL slow, are there bf16 products
PROCESSORS = {
    "AMD Zen 3": ("AuthenticAMD", "fma avx2", False, False),
    "AMD Zen 5": ("AuthenticAMD", "fma avx2 avx512f avx512_bf16", True, True),
    "Intel Skylake": ("GenuineIntel", "fma avx2 avx512f", False, False),
    "Intel Granite Rapids": ("GenuineIntel", "avx2 avx512f amx_bf16", False, True),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_facts_of_a_processor(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    vendor, flags, slow, bf16 = PROCESSORS[name]
    core = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: {name}\nflags\t\t: fpu {flags} avx\nbugs\t\t:\n\n"
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: io.StringIO(2 * core))
    monkeypatch.setattr(cpu, "_backends", _WithMKL)
    assert processor.cpu_name() == name
    assert processor.multiplies_bf16() == bf16
    assert cpu.mkl_is_slow() == slow


class _WithMKL:
    class mkl:
        @staticmethod
        def is_available() -> bool:
            return True


def test_other_systems_have_no_such_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert processor.cpu_name()
    assert not processor.multiplies_bf16()
    assert not processor.avx512_without_intel()
