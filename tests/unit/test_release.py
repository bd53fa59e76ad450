"""`.github/release.sh VERSION` makes a release: version, notes and tag agree, and nothing is pushed by half."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from helpers.engine import ROOT

JOBS = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))["jobs"]
IDENTITY = {f"GIT_{role}_{key}": "m@example.com" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}


def run(kit: Path, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | IDENTITY | environ
    return subprocess.run(command, cwd=kit, env=environment, capture_output=True, text=True, timeout=60, check=False)


def git(kit: Path, *words: str) -> str:
    done = run(kit, "git", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A repository on main with what the script reads, and its remote."""
    git(tmp_path, "init", "--quiet", "--bare", "remote.git")
    folder = tmp_path / "kit"
    for name in (".github/release.sh", "minimind_mcore/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n- A thing.\n\n## 0.0.1 (2026-01-01)\n\n- Old.\n"
    )
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "remote", "add", "origin", str(tmp_path / "remote.git"))
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "Begin")
    return folder


def step(job: str, kit: Path, ref: str, word: str) -> int:
    """Run the step of the workflow whose command has this word; return its status."""
    [command] = [one["run"] for one in JOBS[job]["steps"] if word in one.get("run", "")]
    return run(kit, "bash", "-ec", command, GITHUB_REF_NAME=ref).returncode


def test_a_release_is_tagged_and_pushed(kit: Path) -> None:
    done = run(kit, "bash", ".github/release.sh", "0.9.3")
    assert (done.returncode, done.stdout) == (0, "pushed v0.9.3\n"), done.stderr
    remote = kit.parent / "remote.git"
    assert git(remote, "rev-parse", "main") == git(remote, "rev-parse", "v0.9.3^{commit}")
    assert '__version__ = "0.9.3"' in git(remote, "show", "v0.9.3:minimind_mcore/__init__.py")
    assert step("wheel", kit, "v0.9.3", "__version__") == 0 and step("wheel", kit, "v0.9.4", "__version__") == 1
    assert step("notes", kit, "v0.9.3", "awk") == 0
    assert (kit / "notes.md").read_text().split() == ["-", "A", "thing."]


@pytest.mark.parametrize(
    ("before", "version", "expected"),
    [
        ("true", "1.2", "VERSION '1.2': expected three numbers, such as 0.2.0"),
        ("git checkout -q -b other", "1.2.0", "the branch is 'other': expected main"),
        ("touch new.py", "1.2.0", "there are changes that are not committed"),
        ("git tag v1.2.0", "1.2.0", "the tag v1.2.0 exists: choose another version"),
        ("sed -i /Unreleased/d CHANGELOG.md; git commit -qam x", "1.2.0", "CHANGELOG.md has no section"),
    ],
)
def test_what_cannot_be_released_is_refused(kit: Path, before: str, version: str, expected: str) -> None:
    assert run(kit, "bash", "-c", before).returncode == 0
    head = git(kit, "rev-parse", "HEAD")
    done = run(kit, "bash", ".github/release.sh", version)
    assert done.returncode == 1 and expected in done.stderr
    assert git(kit, "rev-parse", "HEAD") == head


def test_the_version_is_in_one_place() -> None:
    stated = re.compile(r'^(__)?version(__)? = "\d', re.M)
    files = [*ROOT.glob("minimind_mcore/**/*.py"), ROOT / "pyproject.toml", ROOT / "setup.py"]
    found = [path.relative_to(ROOT) for path in files if stated.search(path.read_text(encoding="utf-8"))]
    assert found == [Path("minimind_mcore/__init__.py")]
