"""minimind-mcore doctor [SCRIPT [ARGUMENTS]]: what is installed, what is wrong, and the command that fixes it.

    minimind-mcore doctor
    MODEL=minimind3 TP=2 minimind-mcore doctor examples/mcore/minimind/pretrain_minimind_ptd.sh

The doctor reads the environment variables of the scripts (DEVICE, BACKEND, NPUS_PER_NODE, HOSTFILE, NNODES,
MASTER_ADDR, ...). With REHEARSE=1 it checks what a rehearsal needs. With a script it also runs that script's
`--dry-run`, which checks the data and the checkpoints. The exit status is 1 if the job would fail, else 0.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from minimind_mcore.doctor import devices, dry_run, host, matrix, rehearsal
from minimind_mcore.doctor.finding import Finding, fail, ok, warn
from minimind_mcore.doctor.installed import Component, Host, examine
from minimind_mcore.errors import UserError
from minimind_mcore.inference.vllm_engine import head_size_problem
from minimind_mcore.inputs.flags import documented_parser
from minimind_mcore.models.presets import find_model
from minimind_mcore.paths import CHECKOUT
from minimind_mcore.platform.device import KINDS

INSTALL: Mapping[str, str] = matrix.data()["install"]
# The versions that the kit pins in the checkout's .venv, or that a package requires.
KIT = "bash requirements/install.sh" if (CHECKOUT / "examples").is_dir() else "pip install ."


def main(argv: Sequence[str] | None = None, where: Host | None = None) -> int:
    """Run the command and return its exit status.

    Raises:
        UserError: DEVICE or BACKEND has an unknown value, or the script does not exist.
    """
    parser = documented_parser("minimind-mcore doctor", __doc__)
    parser.add_argument("script", nargs="?", help="a script of examples/, to check what its job would use")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    args = parser.parse_args(argv)
    where = where or Host()
    if args.script:
        dry_run.require(args.script)
    device = devices.kind(where)
    if device not in KINDS:
        raise UserError(f"DEVICE={device}: expected {', '.join(KINDS)}")
    rehearses = rehearsal.asked(where)
    backend = where.environ.get("BACKEND") or ("mindspeed-llm" if device == "npu" or rehearses else "native")
    if backend not in ("mindspeed-llm", "native"):
        raise UserError(f"BACKEND={backend}: expected native or mindspeed-llm")
    if rehearses:
        return rehearse(where, backend, args)
    found = examine(where, backend)
    print_title(device, backend, where)
    problems = report(found, device, backend, where)
    if device == "npu" and found["MindSpeed-RL"].version:  # the matrix has rows for MindSpeed-RL on NPUs only
        print()
        problems += report(found, device, "mindspeed-rl", where)
    checks = devices.check(where, device) + host.check(where, device) + loads(where, device)
    if device == "npu" and found["vllm-ascend"].version:
        checks.append(heads(where))
    if args.script:
        checks += dry_run.check(where, args.script, args.arguments)
    print()
    print_findings(checks)
    return conclude(problems + checks)


def rehearse(where: Host, backend: str, args: argparse.Namespace) -> int:
    """Run the checks of REHEARSE=1 instead of the device and version checks. Return the exit status."""
    checks = rehearsal.check(where, backend) + host.check(where, "cpu")
    if args.script and not rehearsal.is_made():
        checks.append(warn(Path(args.script).name, "its dry run is left out: it needs the environment above"))
    elif args.script and not any(finding.level == "fail" for finding in checks):
        checks += dry_run.check(where, args.script, args.arguments)
    print_findings(checks)
    return conclude(checks, "A rehearsal")


def report(found: Mapping[str, Component], device: str, backend: str, where: Host) -> list[Finding]:
    """Print the table of components compared with a row of the matrix. Return the problems."""
    versions = {name: component.version for name, component in found.items()}
    stack = matrix.find(device, backend, versions) or matrix.newest(device, backend)
    findings = [finding for name in found if (finding := judged(stack, found, name, where))]
    if device == "npu":
        pairs = pairing(versions, stack)
        told = {finding.subject for finding in pairs}  # these findings already name the version to install
        findings = [finding for finding in findings if finding.level == "fail" or finding.subject not in told] + pairs
    print_table(stack, found)
    print(textwrap.fill(f"{stack.name}: {stack.proof}. {stack.note}", 118, subsequent_indent="  "))
    print()
    print_findings(findings)
    return findings


def judged(stack: matrix.Stack, found: Mapping[str, Component], name: str, where: Host) -> Finding | None:
    """Return what is wrong with one component, or None."""
    version = found[name].version
    verdict = stack.judge(name, version)
    fix = install(name, stack, found["MindSpeed-LLM"].where)
    if name == "MindSpeed-LLM" and (given := where.environ.get("MINDSPEED_LLM_HOME")):
        fix = _elsewhere(where, stack, given)
    if verdict == "untried" and name in stack.programs:
        text = f"{version} (at {found[name].where}) is not in the support matrix; compared with the row {stack.name}"
        return warn(name, text, fix)
    if verdict == "missing":
        return fail(name, f"not installed; expected {stack.wanted(name)}", fix)
    if verdict == "wrong":
        return fail(name, f"{version}; expected {matrix.readable(stack.needs[name])}", fix)
    if verdict == "untried":
        return warn(name, f"{version} should work; tried or released together: {stack.wanted(name)}", fix)
    return None


def install(name: str, stack: matrix.Stack, home: str = "") -> str:
    """Return the command that installs a component in the version of a row. `home` is MindSpeed-LLM's folder."""
    if stack.device != "npu":
        return KIT if name != "Python" else f"rm -r .venv && PYTHON=python{stack.wanted('Python')} {KIT}"
    version = {key: stack.wanted(key).lstrip("<>= ").split(",")[0] for key in {*stack.needs, *stack.best}}
    if name in INSTALL:
        return INSTALL[name].format(
            cann=version.get("CANN", ""),
            python=version.get("Python", "3.10"),
            torch=version.get("torch", ""),
            torch_npu=version.get("torch_npu", ""),
            mindspeed=version.get("MindSpeed", ""),
            llm=stack.programs.get("MindSpeed-LLM", "26.1.0"),
            home="MindSpeed-RL" if stack.backend == "mindspeed-rl" else home or "/workspace/MindSpeed-LLM",
        )
    specifier = stack.best.get(name) or stack.needs.get(name, "")
    return f"pip install '{name.lower()}{specifier}'"


def heads(where: Host) -> Finding:
    """Check whether vllm-ascend's attention has a kernel for the head size of MODEL."""
    model = where.environ.get("MODEL") or "minimind3"
    problem = head_size_problem(find_model(model), "npu")
    return warn("head size", f"{model}: {problem}") if problem else ok("head size", f"supported by vLLM for {model}")


def _elsewhere(where: Host, stack: matrix.Stack, given: str) -> str:
    """Return the command that sets MINDSPEED_LLM_HOME to an existing or a new MindSpeed-LLM."""
    usual = where.root / "workspace/MindSpeed-LLM"
    if (usual / "pretrain_gpt.py").is_file() and usual != Path(given):
        return f"export MINDSPEED_LLM_HOME={usual}"
    clone, _, _ = install("MindSpeed-LLM", stack).rpartition(" ")
    folder = f"MindSpeed-LLM-{stack.programs.get('MindSpeed-LLM', '26.1.0')}"
    return f"{clone} {folder} && export MINDSPEED_LLM_HOME=$PWD/{folder}"


def pairing(versions: Mapping[str, str | None], stack: matrix.Stack) -> list[Finding]:
    """Check that torch and CANN are those for which torch_npu was built."""
    package, torch, cann = (versions[name] for name in ("torch_npu", "torch", "CANN"))
    pair = matrix.torch_npu_pair(package) if package else None
    if package is None or pair is None:
        return [] if package is None else [warn("torch_npu", f"{package} is not in the matrix")]
    findings = []
    if torch and torch != pair["torch"]:
        text = f"{torch}, but torch_npu {package} is for {pair['torch']}"
        findings.append(fail("torch", text, INSTALL["torch"].format(torch=pair["torch"])))
    if cann and not matrix.allows(f"=={pair['CANN']}.*", cann):
        older = matrix.allows(f"<{pair['CANN']}rc0", cann)
        text = f"torch_npu {package} (TorchNPU {pair['release']}) is for CANN {pair['CANN']}, here is {cann}"
        fitting = matrix.torch_npu_for(torch, cann, stack)
        fix = INSTALL["torch_npu"].format(torch_npu=fitting) if fitting else INSTALL["CANN"].format(cann=pair["CANN"])
        findings.append((fail if older else warn)("torch_npu", text, fix))
    return findings


def loads(where: Host, device: str) -> list[Finding]:
    """Check whether torch sees the device, in the interpreter of the job."""
    printed = where.run(where.python, "-m", "minimind_mcore.platform.device", timeout=120)
    if printed is not None and printed.split()[:1] == [device]:
        return [ok("torch", f"sees {printed.strip()}")]
    saw = printed.strip() if printed else "nothing"
    package = "torch_npu" if device == "npu" else "torch"
    fix = "source /usr/local/Ascend/cann/set_env.sh && " if device == "npu" else ""
    return [
        fail(
            "torch", f"expected {device}, but it sees {saw}", f"{fix}{where.python} -c 'import {package}'    # says why"
        )
    ]


def print_title(device: str, backend: str, where: Host) -> None:
    """Print what the doctor has examined."""
    listed = devices.cards(where, device) if device != "cpu" else []
    cards = f", {len(listed)} x {listed[0].name}" if listed else ""
    print(f"device {device}{cards}; backend {backend}; python {where.python}\n")


def print_table(stack: matrix.Stack, found: Mapping[str, Component]) -> None:
    """Print component, installed version, required version and verdict."""
    rows = [("component", "installed", "wanted", "")]
    for name, component in found.items():
        verdict = stack.judge(name, component.version)
        if component.version or verdict != "-":
            rows.append((name, component.version or "-", stack.wanted(name), verdict if verdict != "-" else ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


def print_findings(findings: Sequence[Finding]) -> None:
    """Print one block per finding: level, subject, text, and the command on the next line."""
    subject = max((len(finding.subject) for finding in findings), default=0)
    width = max(shutil.get_terminal_size((120, 24)).columns, 80)
    for finding in findings:
        head = f"{finding.level:<4}  {finding.subject:<{subject}}  "
        wrap = textwrap.TextWrapper(width, initial_indent=head, subsequent_indent=" " * len(head))
        wrap.break_on_hyphens = wrap.break_long_words = False  # so that paths can be copied
        lines = finding.text.splitlines() or [""]
        print(wrap.fill(lines[0]))
        for line in lines[1:]:
            print(" " * len(head) + line)
        if finding.fix:
            print(" " * len(head) + "fix: " + finding.fix)


def conclude(findings: Sequence[Finding], what: str = "A job") -> int:
    """Print the conclusion and return the exit status."""
    failures = [finding for finding in findings if finding.level == "fail"]
    warnings = sum(finding.level == "warn" for finding in findings)
    print()
    if failures:
        subjects = ", ".join(dict.fromkeys(finding.subject for finding in failures))
        print(f"{what} would fail here: {subjects}.")
        return 1
    print(f"{what} would run here." + (f" {warnings} warnings, see above." if warnings else ""))
    return 0
