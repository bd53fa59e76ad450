"""Run tests/device on the device of DEVICE."""

from __future__ import annotations

import argparse
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_check.rows import emit

FLAGS = ("tests/device", "-q", "-p", "no:cacheprovider", "-W", "ignore")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    import pytest

    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.xml"
        status = int(pytest.main([*FLAGS, f"--junitxml={report}"]))
        cases = ElementTree.parse(report).getroot().iter("testcase") if report.is_file() else iter(())
        outcomes = {f"{case.get('name')}": [child.tag for child in case] for case in cases}
    bad = [test for test, tags in outcomes.items() if {"failure", "error"} & set(tags)]
    skipped = [test for test, tags in outcomes.items() if "skipped" in tags]
    for test in bad:
        emit(f"tests/device: {test}", ok=False, note="see the log")
    note = f"skipped: {', '.join(skipped)}" if skipped else ""
    passed = len(outcomes) - len(bad) - len(skipped)
    emit("tests/device: passed", passed, "tests", ok=status == 0 and passed > 0, note=note)


if __name__ == "__main__":
    main()
