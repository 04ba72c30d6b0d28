"""Start the agent with the machine: a systemd unit, a launchd agent or a Windows scheduled task.

Pure: gives the files' contents and the commands that put them to use; `service_commands.py` runs them.

- systemd: a unit of the user by default, of the system with `is_system`; sandboxed, no core files.
- launchd: an agent in the user's Library, or a daemon with `is_system`.
- Windows: a task at start-up that runs whether or not somebody is signed in. The agent is no service
  program of the service control manager, and the task scheduler restarts programs too; nothing further
  needs to be installed.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final, Literal
from xml.sax.saxutils import escape

NAME: Final = "tollway-node"
LAUNCHD_LABEL: Final = "network.tollway.node"
STOP_SECONDS_SPARE: Final = 30


class ServiceError(Exception):
    """The service cannot be installed; the text says why and what to do."""


Kind = Literal["systemd", "launchd", "windows"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What `service install` writes and runs, in order; and how to undo and to ask."""

    kind: Kind
    path: PurePath
    content: str
    install: tuple[tuple[str, ...], ...]
    uninstall: tuple[tuple[str, ...], ...]
    status: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to run: `python -m node_agent.cli run --data-dir DIR`, as whom, and how long it may drain."""

    python: PurePath
    data_dir: PurePath
    drain_seconds: int
    home: PurePath
    user: str
    is_system: bool = False

    @property
    def command(self) -> tuple[str, ...]:
        return (str(self.python), "-m", "node_agent.cli", "run", "--data-dir", str(self.data_dir))

    @property
    def stop_seconds(self) -> int:
        return self.drain_seconds + STOP_SECONDS_SPARE


def kind_of(platform: str) -> Kind:
    """Give the kind for `sys.platform`; raises `ServiceError` where none is known."""
    if platform == "win32":
        return "windows"
    if platform == "darwin":
        return "launchd"
    if platform.startswith("linux"):
        return "systemd"
    raise ServiceError(f"no way is known to install a service on {platform!r}")


def plan(kind: Kind, wanted: Wanted) -> Plan:
    """Give everything needed to install the service of this kind."""
    match kind:
        case "systemd":
            return _systemd(wanted)
        case "launchd":
            return _launchd(wanted)
        case "windows":
            return _windows(wanted)


# -- systemd ------------------------------------------------------------------------------------------


def _systemd(wanted: Wanted) -> Plan:
    folder = Path("/etc/systemd/system") if wanted.is_system else wanted.home / ".config/systemd/user"
    path = folder / f"{NAME}.service"
    control = ("systemctl",) if wanted.is_system else ("systemctl", "--user")
    enable = (*control, "enable", "--now", NAME)
    # Without lingering, a user's services end when he signs out.
    linger = () if wanted.is_system else (("loginctl", "enable-linger", wanted.user),)
    return Plan(
        kind="systemd",
        path=path,
        content=systemd_unit(wanted),
        install=((*control, "daemon-reload"), *linger, enable),
        uninstall=((*control, "disable", "--now", NAME),),
        status=(*control, "is-active", NAME),
    )


def systemd_unit(wanted: Wanted) -> str:
    """Give the unit. SIGTERM drains; only after `drain_seconds` and some does systemd kill."""
    account = f"User={wanted.user}\n" if wanted.is_system else ""
    target = "multi-user.target" if wanted.is_system else "default.target"
    return f"""\
[Unit]
Description=Tollway node agent
Documentation=https://pypi.org/project/tollway/
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
{account}ExecStart={" ".join(_systemd_word(word) for word in wanted.command)}
Restart=on-failure
RestartSec=5
# The agent ends its engines itself, after running requests are finished.
KillMode=mixed
TimeoutStopSec={wanted.stop_seconds}
# A core file would hold what buyers said. One byte also keeps it from a collector's pipe.
LimitCORE=1
LimitNOFILE=65536
NoNewPrivileges=yes
UMask=0077

[Install]
WantedBy={target}
"""


def _systemd_word(word: str) -> str:
    """Quote for ExecStart: `%` and `$` are special there, and quotes are C's."""
    doubled = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{doubled}"' if any(c in " \t'\"\\;" for c in word) else doubled


# -- launchd ------------------------------------------------------------------------------------------


def _launchd(wanted: Wanted) -> Plan:
    folder = Path("/Library/LaunchDaemons") if wanted.is_system else wanted.home / "Library/LaunchAgents"
    path = folder / f"{LAUNCHD_LABEL}.plist"
    domain = "system" if wanted.is_system else f"gui/{_user_number()}"
    return Plan(
        kind="launchd",
        path=path,
        content=launchd_plist(wanted),
        install=(("launchctl", "bootstrap", domain, str(path)),),
        uninstall=(("launchctl", "bootout", f"{domain}/{LAUNCHD_LABEL}"),),
        status=("launchctl", "print", f"{domain}/{LAUNCHD_LABEL}"),
    )


def _user_number() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def launchd_plist(wanted: Wanted) -> str:
    """Give the property list."""
    words = "".join(f"\n    <string>{escape(word)}</string>" for word in wanted.command)
    log = escape(str(wanted.data_dir / "agent.log"))
    account = f"\n  <key>UserName</key><string>{escape(wanted.user)}</string>" if wanted.is_system else ""
    return f"""\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0">
<dict>
  <key>Label</key><string>{LAUNCHD_LABEL}</string>
  <key>ProgramArguments</key>
  <array>{words}
  </array>{account}
  <key>RunAtLoad</key><true/>
  <key>KeepAlive</key><dict><key>SuccessfulExit</key><false/></dict>
  <key>ThrottleInterval</key><integer>5</integer>
  <key>ExitTimeOut</key><integer>{wanted.stop_seconds}</integer>
  <key>ProcessType</key><string>Interactive</string>
  <key>Umask</key><integer>63</integer>
  <key>StandardErrorPath</key><string>{log}</string>
  <key>HardResourceLimits</key>
  <dict><key>Core</key><integer>0</integer><key>NumberOfFiles</key><integer>65536</integer></dict>
  <key>SoftResourceLimits</key>
  <dict><key>Core</key><integer>0</integer><key>NumberOfFiles</key><integer>65536</integer></dict>
</dict>
</plist>
"""


# -- Windows ------------------------------------------------------------------------------------------


def _windows(wanted: Wanted) -> Plan:
    path = wanted.data_dir / f"{NAME}.xml"
    create = ("schtasks", "/Create", "/F", "/TN", NAME, "/XML", str(path))
    return Plan(
        kind="windows",
        path=path,
        content=windows_task(wanted),
        install=(create, ("schtasks", "/Run", "/TN", NAME)),
        uninstall=(("schtasks", "/End", "/TN", NAME), ("schtasks", "/Delete", "/F", "/TN", NAME)),
        status=("schtasks", "/Query", "/TN", NAME, "/FO", "LIST"),
    )


def windows_task(wanted: Wanted) -> str:
    """Give the task. It starts with the machine, runs without a time limit and is restarted when it fails."""
    program, *rest = wanted.command
    arguments = escape(" ".join(_windows_word(word) for word in rest))
    account = "S-1-5-18" if wanted.is_system else escape(wanted.user)
    logon = "" if wanted.is_system else "\n      <LogonType>S4U</LogonType>"
    return f"""\
<?xml version="1.0" encoding="UTF-16"?>
<Task version="1.3" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <RegistrationInfo>
    <Description>Tollway node agent</Description>
  </RegistrationInfo>
  <Triggers>
    <BootTrigger><Enabled>true</Enabled></BootTrigger>
  </Triggers>
  <Principals>
    <Principal id="Author">
      <UserId>{account}</UserId>{logon}
      <RunLevel>LeastPrivilege</RunLevel>
    </Principal>
  </Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>
    <StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <StartWhenAvailable>true</StartWhenAvailable>
    <RunOnlyIfNetworkAvailable>true</RunOnlyIfNetworkAvailable>
    <RestartOnFailure><Interval>PT1M</Interval><Count>999</Count></RestartOnFailure>
    <ExecutionTimeLimit>PT0S</ExecutionTimeLimit>
  </Settings>
  <Actions Context="Author">
    <Exec>
      <Command>{escape(program)}</Command>
      <Arguments>{arguments}</Arguments>
      <WorkingDirectory>{escape(str(wanted.data_dir))}</WorkingDirectory>
    </Exec>
  </Actions>
</Task>
"""


def _windows_word(word: str) -> str:
    return f'"{word}"' if any(c in " \t" for c in word) else word


def spoken(commands: Sequence[Sequence[str]]) -> list[str]:
    """Commands as a person would type them."""
    return [shlex.join(command) for command in commands]
