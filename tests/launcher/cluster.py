"""Two hosts on one machine, for launches that need a cluster; root on Linux.

A host is a set of namespaces (processes, network, mounts, host name) with an address of its own on
a virtual cable, as a container is: what runs there sees neither the other host's processes nor the
machine's. Both share the file system. Nothing outlives this process, even if it is killed: the
kernel ends a host's first process with it, with that one all others of the host, and takes the
cable and the mounts away.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = {
    "util-linux": ["unshare", "nsenter", "setpriv", "mount"],
    "iproute2": ["ip"],
    "openssh": ["ssh", "ssh-keygen", "/usr/sbin/sshd"],
    "pdsh": ["pdsh"],
    "munge": ["munged"],
    "slurm": ["slurmctld", "slurmd", "sbatch", "srun", "scontrol"],
}
NAMES = ("node1", "node2")
ADDRESSES = ("10.177.0.1", "10.177.0.2")

_SETUP = """
set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/nsswitch.conf /etc/nsswitch.conf
mount --bind {folder}/ssh /etc/ssh
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd /run/munge
ip link set lo up
touch {folder}/{name}.up
while :; do sleep 3600 & wait $!; done
"""  # the shell is the host's first process and reaps what is left to it


def lacking() -> str | None:
    """Why there can be no hosts here."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root"
    absent = [name for name, programs in PROGRAMS.items() if not all(map(shutil.which, programs))]
    return f"needs {', '.join(absent)}" if absent else None


class Host:
    """One host; `folder` is the cluster's."""

    def __init__(self, name: str, address: str, folder: Path):
        self.name, self.address = name, address
        setup = _SETUP.format(name=name, folder=folder)
        self._process = subprocess.Popen(
            [*("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--net", "--pid"),
             *("--fork", "--kill-child", "--mount-proc", "bash", "-c", setup)]
        )  # fmt: skip
        wait_for(lambda: (folder / f"{name}.up").exists() or self._process.poll() is not None)
        assert self._process.poll() is None, f"{name} did not start"
        self.first = psutil.Process(self._process.pid).children()[0]
        self._namespace = os.readlink(f"/proc/{self.first.pid}/ns/pid")

    def __call__(self, *command: str, cwd: Path = Path("/")) -> list[str]:
        """The command as it is run on this host from outside."""
        return ["nsenter", f"--target={self.first.pid}", "--all", f"--wdns={cwd}", *command]

    def start(
        self,
        command: Sequence[str],
        log: Path,
        *,
        cwd: Path = Path("/"),
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a command here; what it prints is appended to the log."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self(*command, cwd=cwd), env=env, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip

    def processes(self, word: str) -> list[psutil.Process]:
        """Processes of this host that have this word on their command line."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                here = os.readlink(f"/proc/{process.pid}/ns/pid") == self._namespace
                if here and word in process.cmdline():
                    found.append(process)
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def wait_for(event: Callable[[], object], seconds: float = 20) -> None:
    """Returns when the event has happened.

    Raises:
        TimeoutError: it did not.
    """
    deadline = time.monotonic() + seconds
    while not event():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened in {seconds:.0f} s")
        time.sleep(0.05)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """node1 and node2, which reach each other by name and by ssh with a key.

    Args:
        folder: an empty one, for keys, settings and logs.
    """
    lines = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    _write_ssh(folder / "ssh")
    with ExitStack() as stack:
        hosts = []
        for name, address in zip(NAMES, ADDRESSES):
            hosts.append(Host(name, address, folder))
            stack.callback(hosts[-1].end)
        one, two = hosts
        ends = [["name", "eth0", "netns", str(host.first.pid)] for host in hosts]
        _run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]])
        for host in hosts:
            _run(host("ip", "address", "add", f"{host.address}/24", "dev", "eth0"))
            _run(host("ip", "link", "set", "eth0", "up"))
            host.start(["/usr/sbin/sshd", "-D"], folder / "sshd.log")
        for host in hosts:
            wait_for(lambda host=host: _works(one("ssh", host.name, "true")))
        yield one, two


def _write_ssh(folder: Path) -> None:
    """What is /etc/ssh on both hosts: one key for hosts and users, and no passwords."""
    folder.mkdir()
    key = folder / "key"
    _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)])
    public = key.with_suffix(".pub").read_text()
    (folder / "authorized_keys").write_text(public)
    (folder / "known_hosts").write_text("".join(f"{name} {public}" for name in NAMES))
    (folder / "ssh_config").write_text(
        "BatchMode yes\nIdentityFile /etc/ssh/key\nUserKnownHostsFile /etc/ssh/known_hosts\n"
    )
    (folder / "sshd_config").write_text(
        "HostKey /etc/ssh/key\nAuthorizedKeysFile /etc/ssh/authorized_keys\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile none\n"
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def _works(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


_SLURM = """
ClusterName=es2fast
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
NodeName=node1,node2 CPUs=1 RealMemory={memory}
PartitionName=all Nodes=node1,node2 Default=YES DefMemPerCPU=100
"""


def start_slurm(hosts: Sequence[Host], folder: Path) -> Path:
    """Makes the hosts a Slurm cluster whose controller is the first of them.

    Args:
        folder: an empty one, for settings, keys, state and logs.

    Returns:
        slurm.conf; commands find it in the variable SLURM_CONF.
    """
    conf = folder / "slurm.conf"
    conf.write_text(_SLURM.format(folder=folder, memory=psutil.virtual_memory().total >> 21))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for host in hosts:
        host.start(
            ["munged", "--foreground", "--force", f"--key-file={key}", "--log-file=/run/munge/log",
             "--pid-file=/run/munge/pid", "--seed-file=/run/munge/seed"],
            folder / "munged.log",
        )  # fmt: skip
        wait_for(lambda host=host: _works(host("munge", "-n")))
    hosts[0].start(["slurmctld", "-D", "-f", str(conf)], folder / "slurmctld.log")
    for host in hosts:
        host.start(["slurmd", "-D", "-f", str(conf)], folder / f"slurmd-{host.name}.log")
    environment = os.environ | {"SLURM_CONF": str(conf)}
    idle = hosts[0]("sinfo", "--noheader", "--states=idle", "--format=%D")
    wait_for(lambda: subprocess.run(idle, env=environment, capture_output=True).stdout == b"2\n")
    return conf
