"""Tests of `python -m fastapi_ws_stabilizer doctor` and its output."""

from __future__ import annotations

import builtins
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastapi_ws_stabilizer.cli import main
from fastapi_ws_stabilizer.doctor.findings import Finding
from fastapi_ws_stabilizer.doctor.output import RICH, WIDTH, summary, write_findings

ROOT = Path(__file__).parents[3]
APP = "examples.quickstart:app"
BOUND = ("--option", "timeout_graceful_shutdown=15")

FINDINGS = [
    Finding("D01", "error", "A [rule]", "60 s [bold]" + " and so on" * 20, "do [this]"),
    Finding("D12", "warning", "Another", "what", "do that"),
]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command; return its exit code and its output."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["doctor", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the installed `rich`."""
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "rich":
            raise ModuleNotFoundError("No module named 'rich'", name="rich")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, RICH, raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)


def test_clean_deployment_exits_0(doctor: Any) -> None:
    """The exit code is 0 if there are no findings."""
    assert doctor(APP, "--server", "uvicorn", "--platform", "aws-nlb", *BOUND) == (0, "nothing found\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        (APP, "--platform", "nginx,kubernetes"),
        ("--platform", "nginx,kubernetes", APP),
        ("--platform", "nginx", "kubernetes", APP),
        ("--platform", "nginx", "--platform", "kubernetes", "--", APP),
    ],
    ids=str,
)
def test_platforms_are_accepted_with_commas_and_before_app(doctor: Any, arguments: tuple[str, ...]) -> None:
    """The app argument may come before or after the platforms, and each platform is checked."""
    code, out, err = doctor("--ignore", "D07", *arguments) if arguments[0] == APP else doctor(*arguments)
    assert (code, err) == (0, "")
    assert "D08" in out
    assert "D18" in out


def test_missing_app_argument_is_named(doctor: Any) -> None:
    """Without an app the doctor fails, and names the missing argument."""
    assert doctor("--platform", "nginx", "kubernetes") == (2, "", "name the app as for a server, such as main:app\n")


def test_errors_exit_1(doctor: Any) -> None:
    """The exit code is 1 if there is an error, and all findings are printed."""
    code, out, err = doctor(APP, "--platform", "google-cloud-run", "nginx", "--http2", "--option", "reload=true")
    assert (code, err) == (1, "")
    for word in ("D03", "D07", "D08", "D12", "D16", "D18", "errors: 2, warnings: 4"):
        assert word in out


def test_warnings_alone_exit_0(doctor: Any) -> None:
    """The exit code is 0 if there are only warnings."""
    code, out, _ = doctor(APP, *BOUND, "--option", "limit-max-requests=1000")
    assert (code, out.splitlines()[-1]) == (0, "errors: 0, warnings: 1")


def test_ignored_findings_exit_0(doctor: Any) -> None:
    """An ignored finding does not change the exit code."""
    assert doctor(APP, "--ignore", "d07") == (0, "nothing found\n", "")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--platform", "nginx", "--idle-timeout", "20"), "D01"),
        (("--platform", "google-alb-classic", "--max-lifetime", "3600"), "D03"),
        (("--platform", "kubernetes", "--grace", "20"), "D08"),
        (("--platform", "kubernetes", "--pre-stop", "20"), "D08"),
        (("--platform", "azure-front-door", "--caching", "--ignore", "D03"), "D16"),
        (("--option", "ws_ping_interval=None", "--option", "limit_concurrency=5"), "D11"),
    ],
)
def test_each_argument_reaches_checks(doctor: Any, arguments: tuple[str, ...], code: str) -> None:
    """The arguments of the command line reach the checks."""
    _, out, _ = doctor(APP, *BOUND, *arguments, "--ignore", "D18")
    assert code in out
    assert "errors: 1, warnings: 0" in out or "errors: 0, warnings: 1" in out


def test_uvicorn_options_flag_uses_manager_options(doctor: Any) -> None:
    """`--uvicorn-options` stands for `uvicorn.run(app, **manager.uvicorn_options())`."""
    assert doctor(APP, "--uvicorn-options")[0] == 0


def test_manager_is_found_in_module_of_app(doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an app that uses only `Depends(manager.socket)`, the manager is found in its module; two are an error."""
    monkeypatch.syspath_prepend(tmp_path)
    begin = "from fastapi import FastAPI\nfrom fastapi_ws_stabilizer import WebSocketConnectionManager as M\n"
    (tmp_path / "one_manager.py").write_text(f"{begin}app = FastAPI()\nmanager = M()\n")
    (tmp_path / "two_managers.py").write_text(f"{begin}app = FastAPI()\na, b = M(), M()\n")
    (tmp_path / "installed.py").write_text(f"{begin}app = FastAPI()\na, b = M(), M()\na.install(app)\n")
    assert doctor("one_manager", *BOUND)[0] == 0
    assert doctor("installed:app", *BOUND)[0] == 0
    code, _, err = doctor("two_managers:app")
    assert (code, "has no manager" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no_such_module:app",), "cannot import 'no_such_module'"),
        (("examples.quickstart:nothing",), "is not an app"),
        (("examples.quickstart:manager",), "is not an app"),
        ((APP, "--platform", "ngimx"), "did you mean 'nginx'"),
        ((APP, "--option", "reload"), "--option must be NAME=VALUE"),
        ((APP, "--option", "ws_ping_interval=soon"), "must be a number or None, not 'soon'"),
        ((APP, "--option", "limit_concurency=5"), "did you mean 'limit_concurrency'"),
        ((APP, "--grace", "-5"), "grace must be a number of seconds above zero, not -5"),
        ((APP, "--idle-timeout", "nan"), "idle_timeout must be a number of seconds above zero, not nan"),
        ((APP, "--max-lifetime", "0"), "max_lifetime must be a number of seconds above zero, not 0"),
        ((APP, "--pre-stop", "nan"), "pre_stop must be a number of seconds, not nan"),
        ((".broken:app",), "cannot import '.broken': TypeError"),
        ((":app",), "cannot import '': ValueError"),
    ],
)
def test_uninspectable_target_exits_2(doctor: Any, arguments: tuple[str, ...], message: str) -> None:
    """The exit code is 2, with one line that gives the reason."""
    code, out, err = doctor(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
        ("def", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_failing_app_import_exits_2(
    doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    """Any exception at import gives exit code 2 with one line, and an app that exits does not pass."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks_at_import.py").write_text(f"{line}\n")
    code, out, err = doctor("breaks_at_import:app")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert err.startswith("cannot import 'breaks_at_import': ")


def test_interrupt_during_import_propagates(doctor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C interrupts the command."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        doctor("interrupted:app")


def test_module_runs_as_command() -> None:
    """`python -m` finds an app in the working directory."""
    command = [sys.executable, "-m", "fastapi_ws_stabilizer", "doctor", APP, *BOUND, "--platform", "railway"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "D08" in done.stdout


# ── output ──


def test_findings_are_table_with_rich() -> None:
    """With `rich` the findings are a table that contains every word, including brackets."""
    out = io.StringIO()
    write_findings(FINDINGS, out)
    text = out.getvalue()
    for word in ("D01", "error", "A [rule]", "60 s [bold]", "do [this]", "D12", "warning", "errors: 1, warnings: 1"):
        assert word in text
    assert "│" in text


@pytest.mark.usefixtures("without_rich")
def test_findings_are_plain_lines_without_rich() -> None:
    """Without `rich` the same words are plain lines, and no line is too long."""
    out = io.StringIO()
    write_findings(FINDINGS, out)
    lines = out.getvalue().splitlines()
    assert lines[0] == "D01 error: A [rule]"
    assert "    -> do [this]" in lines
    assert lines[-1] == "errors: 1, warnings: 1"
    assert max(map(len, lines)) <= WIDTH


def test_no_findings_print_one_line() -> None:
    """Without findings there is one line."""
    assert summary([]) == "nothing found"
