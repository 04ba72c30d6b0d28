"""The files that start the agent with the machine, by their content; systemd's own checker where it is."""

import plistlib
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest

from node_agent.machine_service import (
    LAUNCHD_LABEL,
    ServiceError,
    Wanted,
    kind_of,
    launchd_plist,
    plan,
    systemd_unit,
    windows_task,
)

POSIX = Wanted(
    python=PurePosixPath("/opt/tollway node/bin/python"),
    data_dir=PurePosixPath("/srv/ann/50% $HOME"),
    drain_seconds=120,
    home=PurePosixPath("/srv/ann"),
    user="ann",
)
WINDOWS = Wanted(
    python=PureWindowsPath(r"C:\Program Files\Python\python.exe"),
    data_dir=PureWindowsPath(r"C:\Users\Ann & Bo\node"),
    drain_seconds=120,
    home=PureWindowsPath(r"C:\Users\Ann"),
    user=r"BOX\Ann & Bo",
)
TASK = "{http://schemas.microsoft.com/windows/2004/02/mit/task}"


def test_systemd_unit_drains_and_leaves_no_core() -> None:
    unit = systemd_unit(POSIX).splitlines()
    command = '"/opt/tollway node/bin/python" -m node_agent.cli run --data-dir "/srv/ann/50%% $$HOME"'
    assert f"ExecStart={command}" in unit
    for line in ("TimeoutStopSec=150", "KillMode=mixed", "LimitCORE=1", "Restart=on-failure", "UMask=0077"):
        assert line in unit
    assert "WantedBy=default.target" in unit
    assert not any(line.startswith("User=") for line in unit)


def test_systemd_units_of_the_system_name_their_user() -> None:
    made = plan("systemd", Wanted(POSIX.python, POSIX.data_dir, 120, POSIX.home, "ann", is_system=True))
    assert str(made.path) == "/etc/systemd/system/tollway-node.service"
    assert "User=ann\n" in made.content
    assert "WantedBy=multi-user.target" in made.content
    assert made.install[-1] == ("systemctl", "enable", "--now", "tollway-node")


def test_a_users_unit_outlives_his_signing_out() -> None:
    made = plan("systemd", POSIX)
    assert str(made.path) == "/srv/ann/.config/systemd/user/tollway-node.service"
    assert ("loginctl", "enable-linger", "ann") in made.install


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
@pytest.mark.parametrize("is_system", [False, True])
def test_systemd_accepts_the_unit(tmp_path: Path, *, is_system: bool) -> None:
    python = tmp_path / "a python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    path = tmp_path / "tollway-node.service"
    path.write_text(systemd_unit(Wanted(python, tmp_path, 120, tmp_path, "root", is_system=is_system)))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, check=False
    )
    complaints = [line for line in checked.stderr.splitlines() if "tollway-node" in line]
    assert (checked.returncode, complaints) == (0, [])


def test_launchd_reads_the_property_list() -> None:
    read = plistlib.loads(launchd_plist(POSIX).encode())
    assert read["Label"] == LAUNCHD_LABEL
    assert read["ProgramArguments"] == list(POSIX.command)
    assert (read["RunAtLoad"], read["ExitTimeOut"]) == (True, 150)
    assert read["KeepAlive"] == {"SuccessfulExit": False}
    assert read["HardResourceLimits"]["Core"] == read["SoftResourceLimits"]["Core"] == 0
    assert read["Umask"] == 0o077
    made = plan("launchd", POSIX)
    assert str(made.path) == f"/srv/ann/Library/LaunchAgents/{LAUNCHD_LABEL}.plist"
    assert made.install[0][:2] == ("launchctl", "bootstrap")


def test_windows_task_starts_with_the_machine_and_again_after_a_failure() -> None:
    root = ET.fromstring(windows_task(WINDOWS).split("\n", 1)[1])
    assert root.findtext(f".//{TASK}Command") == r"C:\Program Files\Python\python.exe"
    assert root.findtext(f".//{TASK}Arguments") == (
        r'-m node_agent.cli run --data-dir "C:\Users\Ann & Bo\node"'
    )
    assert root.findtext(f".//{TASK}UserId") == r"BOX\Ann & Bo"
    assert root.findtext(f".//{TASK}ExecutionTimeLimit") == "PT0S"
    assert root.find(f".//{TASK}BootTrigger") is not None
    assert root.find(f".//{TASK}RestartOnFailure") is not None
    made = plan("windows", WINDOWS)
    assert made.install[0][:2] == ("schtasks", "/Create")


@pytest.mark.parametrize(
    ("platform", "kind"), [("linux", "systemd"), ("darwin", "launchd"), ("win32", "windows")]
)
def test_each_system_has_its_kind(platform: str, kind: str) -> None:
    assert kind_of(platform) == kind


def test_an_unknown_system_is_told() -> None:
    with pytest.raises(ServiceError, match="sunos"):
        kind_of("sunos5")
