"""The plan of the check: its parts, and the programs of each part with their time limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

TOTAL_SECONDS = 410.0  # measured from the start of the program
PARTS = ("environment", "speed", "rest", "correctness")
# LIMITS: seconds that a part may take at most. RESERVED: seconds that earlier parts must leave for a part. Correctness
# comes last and gets the remaining time, because its programs mostly wait for the compiler.
LIMITS = {"environment": 60.0, "speed": 130.0, "rest": 140.0, "correctness": 200.0}
RESERVED = {"environment": 10.0, "speed": 120.0, "rest": 120.0, "correctness": 150.0}

KIT = ("megatron.core", "transformers", "tokenizers", "safetensors", "pyarrow", "psutil", "xxhash")
TRAINING = (*KIT, "matplotlib", "tqdm")
SERVING = (*KIT, "httpx", "fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")
SPEED_MODELS = ("minimind3", "minimind3_moe")
RATE = "GPU_CHECK_MATMUL_RATE"  # environment variable: TFLOP/s in bf16, measured by part `environment`, for the MFU
NOT_MEASURED = {"correctness": ("PP2", "EP2")}
TWO_DEVICES = "needs two devices"


@dataclass(frozen=True)
class Check:
    """One program of a part.

    Attributes:
        part: one of `PARTS`.
        name: name in the table, if the program writes no rows.
        argv: arguments of Python.
        seconds: time limit, after which the program is killed.
        does: description for `--dry-run`.
        needs: modules that must be importable. Otherwise the row says "not measured".
        together: may run concurrently with other programs of its part, because it measures no speed.
        newer: runs with the newer megatron-core from the collected wheels.
    """

    part: str
    name: str
    argv: tuple[str, ...]
    seconds: float
    does: str
    needs: tuple[str, ...] = KIT
    together: bool = False
    newer: bool = False


def checks(tiny: bool) -> list[Check]:
    """Return all programs in order. `tiny` selects sizes that a CPU finishes in seconds."""
    found = [_environment(tiny), *_correctness(tiny), *_speed(tiny), *_rest(tiny)]
    return [replace(check, seconds=slowness(tiny) * check.seconds) for check in found]


def with_needed(parts: Sequence[str]) -> list[str]:
    """Return the parts in order. `speed` also needs `environment`, whose matrix rate is the denominator of the MFU."""
    return [part for part in PARTS if part in parts or (part == "environment" and "speed" in parts)]


def unpack(wheels: Path, site: Path, newer: Path) -> Check:
    """Return the program that unpacks the collected wheels before all parts."""
    argv = _module("wheels", "--wheels", str(wheels), "--site", str(site), "--newer", str(newer))
    return Check("wheels", "wheels", argv, 20, "unpack the collected wheels whose packages are missing", needs=())


def slowness(tiny: bool) -> float:
    """Return the factor of all time limits. It is larger for `tiny`, which runs on machines with other load."""
    return 4.0 if tiny else 1.0


def _module(name: str, *arguments: str, tiny: bool = False) -> tuple[str, ...]:
    return ("-m", f"gpu_check.{name}", *arguments, *(["--tiny"] if tiny else []))


def _environment(tiny: bool) -> Check:
    does = "device, versions, missing packages, free memory, matrix rate in bf16 and fp32, copy bandwidth"
    return Check("environment", "environment", _module("environment", tiny=tiny), 60, does, needs=())


def _correctness(tiny: bool) -> list[Check]:
    part = "correctness"
    presets = "every preset, shrunk, in {}: logits and the losses of ten steps against recorded CPU values"
    return [
        *(
            Check(
                part,
                f"presets {dtype}",
                _module("presets", "--dtypes", dtype, tiny=tiny),
                190,
                presets.format(dtype),
                together=True,
            )
            for dtype in ("fp32", "bf16")
        ),
        Check(
            part,
            "training",
            _module("smoke", "train", tiny=tiny),
            190,
            "pretraining, resume, SFT, LoRA, DPO, generation",
            (*TRAINING, "peft"),
            together=True,
        ),
        Check(
            part,
            "layouts",
            _module("smoke", "layouts", tiny=tiny),
            190,
            "TP2 and DP2 as two gloo processes that share the device, against one process",
            TRAINING,
            together=True,
        ),
        Check(
            part,
            "tests",
            _module("tests"),
            190,
            "the tests of tests/device, on this device",
            (*KIT, "pytest", "pytest_timeout"),
            together=True,
        ),
    ]


def _speed(tiny: bool) -> list[Check]:
    sides = {
        "native": "the native engine",
        "plain": "the plain loop (autocast, SDPA, torch.compile, fused AdamW)",
    }
    does = f"{' and '.join(SPEED_MODELS)}, bf16, sequences of 340 and 2048 tokens: tokens/s and MFU of "
    return [
        Check(
            "speed",
            side,
            _module("speed", "--models", *SPEED_MODELS, "--side", side, tiny=tiny),
            70 if side == "native" else 60,
            does + name,
            KIT if side == "native" else (),
        )
        for side, name in sides.items()
    ]


def _rest(tiny: bool) -> list[Check]:
    part = "rest"
    newer = _module("presets", "--presets", "minimind3_tiny", "minimind3_moe_tiny", "--dtypes", "fp32", tiny=tiny)
    return [
        Check(part, "profile", _module("profile_step", tiny=tiny), 45, "the ten largest operators of one step"),
        Check(part, "generation", _module("generation", tiny=tiny), 60, "tokens/s at batch 1 and 64, bf16"),
        Check(
            part,
            "serving",
            _module("serving", tiny=tiny),
            60,
            "the embedded server: greedy answers against transformers, tokens/s at 1, 16 and 64 requests at a time",
            SERVING,
        ),
        Check(part, "newer megatron-core", newer, 50, "two presets on the newer megatron-core", newer=True),
    ]


def limit(part: str, later: Sequence[str], remaining: float) -> float:
    """Return the seconds that a part may take so that enough time is left for later parts."""
    return max(5.0, min(LIMITS[part], remaining - sum(RESERVED[name] for name in later)))
