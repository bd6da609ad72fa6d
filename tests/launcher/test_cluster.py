"""The launches of docs/quickstart.md on two hosts: by ssh, without it, and under Slurm.

Each run is disturbed at some of its starts, given again, and has to end in the weights of two ranks
on one machine, bit for bit.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from tiny_models import save_tiny, write_prompts
from torch.utils.cpp_extension import get_default_build_root

from tests.launcher.cluster import Host, lacking, start_slurm, two_hosts, wait_for

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = (ROOT / "docs/quickstart.md").read_text()
STEPS = 60
START = 600  # seconds until a start has logged a step, at most
END = 120  # seconds until a disturbed launch has ended, at most

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.slow,
    pytest.mark.skipif("ES2FAST_LONG" not in os.environ, reason="minutes; set ES2FAST_LONG=1"),
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]


class Site:
    """Two hosts and the folder they share.

    Attributes:
        env: of a user who is logged in on a host.
        right: the weights that every run has to end in.
    """

    def __init__(self, folder: Path, hosts: tuple[Host, Host]):
        self.folder, self.hosts = folder, hosts
        shared = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # one ninja for all
            "TORCH_EXTENSIONS_DIR": (
                os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
            ),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        home = folder / "home"
        home.mkdir()
        (home / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in shared.items()))
        self.env = os.environ | shared | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
        save_tiny(folder / "model")
        alone = self.project("alone")
        command = [sys.executable, "-m", "es2fast.cli", "train", "run.yaml", "--ranks", "2"]
        with (folder / "alone.log").open("wb") as log:
            subprocess.run(command, cwd=alone, env=self.env, stdout=log, stderr=log, check=True)
        self.right = weights(alone)

    def project(self, name: str) -> Path:
        """A new folder with the hostfile and a run.yaml whose run is the folder that the guide
        names."""
        folder = self.folder / name
        folder.mkdir()
        config = {
            "model": {"name": str(self.folder / "model"), "dtype": "fp32"},
            "data": write_prompts(self.folder / "data") | {"cache_dir": str(self.folder / "cache")},
            "layers": [1, 2],
            "separation": {"bank": 4},
            "train": {"steps": STEPS, "micro_batch_size": 1, "lr": 1e-3, "device": "cpu"},
            "deepspeed": "zero2",
            "checkpoint": {"every": 2},
            "output_dir": "runs/llama-8b",
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/activate").touch()  # PATH has it already
        hostfile = next(block for block in blocks() if block.startswith("# hostfile"))
        (folder / "hostfile").write_text(hostfile.replace("slots=8", "slots=1"))
        return folder

    def launch(self, project: Path, commands: list[str]) -> list[subprocess.Popen[bytes]]:
        """Gives each command on the host of its number."""
        return [
            host.start(shlex.split(command), project / "log", cwd=project, env=self.env)
            for host, command in zip(self.hosts, commands)
        ]

    def ranks(self, host: Host) -> list[psutil.Process]:
        return [p for p in host.processes("es2fast.train") if "--local_rank=0" in p.cmdline()]

    def check_nothing_left(self) -> None:
        """No launcher and no rank is on a host any more."""
        wait_for(lambda: not any(host.processes("es2fast.train") for host in self.hosts), END)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    settings = folder / "cluster"
    settings.mkdir()
    with two_hosts(settings) as hosts:
        yield Site(folder, hosts)


def blocks() -> list[str]:
    return re.findall(r"```\w*\n(.*?)```", QUICKSTART, flags=re.DOTALL)


def launches(word: str) -> list[str]:
    """The guide's `deepspeed` commands of which a word is part, outside of the job script."""
    return [
        line
        for block in blocks()
        if "#SBATCH" not in block
        for line in block.splitlines()
        if line.startswith("deepspeed ") and word in line.split()
    ]


def run_of(project: Path) -> Path:
    return project / "runs/llama-8b"


def said(project: Path) -> str:
    """What launchers in this folder have printed."""
    return (project / "log").read_text(errors="replace")


def steps_done(project: Path) -> int:
    path = run_of(project) / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def weights(project: Path) -> bytes:
    return next((run_of(project) / "model").glob("*.safetensors")).read_bytes()


def disturbed(
    site: Site, project: Path, commands: list[str], disturb: Callable[[psutil.Process], object]
) -> list[int]:
    """Starts a run, disturbs it after some steps of this start, and waits for its end.

    Args:
        disturb: gets the launcher that was given on node1.

    Returns:
        the launchers' exit codes.
    """
    before = steps_done(project)
    launchers = site.launch(project, commands)
    wait_for(lambda: steps_done(project) > before + 2 or launchers[0].poll() is not None, START)
    assert launchers[0].poll() is None, said(project)
    began = time.monotonic()
    disturb(psutil.Process(launchers[0].pid).children()[0])
    codes = [launcher.wait(END) for launcher in launchers]
    site.check_nothing_left()
    print(f"ended after {time.monotonic() - began:.0f} s at step {steps_done(project)}: {codes}")
    assert not (run_of(project) / "model").exists()
    return codes


def finish(site: Site, project: Path, commands: list[str]) -> None:
    """Gives the commands again; the run goes on and ends as it should."""
    launchers = site.launch(project, commands)
    assert [launcher.wait(START) for launcher in launchers] == [0] * len(launchers), said(project)
    assert "continues after step" in said(project)
    assert weights(project) == site.right
    site.check_nothing_left()


def test_by_ssh(site: Site) -> None:
    project = site.project("by_ssh")
    commands = [command for command in launches("--hostfile") if "--no_ssh" not in command]
    assert len(commands) == 1
    stop = run_of(project) / "STOP"
    killed = disturbed(site, project, commands, lambda _: site.ranks(site.hosts[1])[0].kill())
    assert killed == [256 - signal.SIGKILL]
    assert disturbed(site, project, commands, lambda _: stop.touch()) == [0]
    assert disturbed(site, project, commands, lambda launcher: launcher.terminate()) == [1]
    finish(site, project, commands)


def test_without_ssh(site: Site) -> None:
    project = site.project("no_ssh")
    commands = launches("--no_ssh")
    assert len(commands) == 2
    codes = disturbed(site, project, commands, lambda _: site.ranks(site.hosts[1])[0].kill())
    assert codes == [1, 256 - signal.SIGKILL]
    finish(site, project, commands)


@pytest.fixture(scope="module")
def slurm(site: Site) -> Callable[..., str]:
    """Runs a command of Slurm in a folder, and returns what it prints."""
    folder = site.folder / "cluster/slurm"
    folder.mkdir()
    environment = site.env | {"SLURM_CONF": str(start_slurm(site.hosts, folder))}

    def run(project: Path, *command: str) -> str:
        done = subprocess.run(
            site.hosts[0](*command, cwd=project), env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    return run


def job_script() -> str:
    """The guide's, for hosts with one slot and no GPU."""
    script = next(block for block in blocks() if "#SBATCH" in block)
    for there, here in (("slots=8", "slots=1"), ("#SBATCH --gpus-per-node=8\n", "")):
        assert script.count(there) == 1
        script = script.replace(there, here)
    return script


class Job:
    """One `sbatch` of the guide's script."""

    def __init__(self, site: Site, project: Path, slurm: Callable[..., str]):
        self._site, self._project, self._slurm = site, project, slurm
        (project / "job.sh").write_text(job_script())
        self.number = slurm(project, "sbatch", "--parsable", "job.sh")

    def said(self) -> str:
        return (self._project / f"slurm-{self.number}.out").read_text(errors="replace")

    def field(self, name: str) -> str:
        shown = self._slurm(self._project, "scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)[name]

    def trains(self) -> None:
        """Waits until this job has logged some steps."""
        before = steps_done(self._project)
        wait_for(
            lambda: steps_done(self._project) > before + 2 or self.field("JobState") == "FAILED",
            START,
        )
        assert self.field("JobState") == "RUNNING", self.said()[-5000:]

    def ends(self, state: str, seconds: float) -> None:
        """Waits until the job has come to this state, and nothing of it is left."""
        began = time.monotonic()
        wait_for(lambda: self.field("JobState") not in ("RUNNING", "COMPLETING"), seconds)
        assert self.field("JobState") == state, self.said()[-5000:]
        self._site.check_nothing_left()
        print(f"{state} after {time.monotonic() - began:.0f} s")

    def command(self, *words: str) -> None:
        self._slurm(self._project, *words)

    def limit(self, minutes: int) -> None:
        """Changes how long the job may run."""
        self.command("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")


def test_under_slurm(site: Site, slurm: Callable[..., str]) -> None:
    """A rank is killed; the time runs out, and the job goes on by itself; that one is cancelled."""
    project = site.project("slurm")
    run, asked = run_of(project), "as asked, with a checkpoint"

    job = Job(site, project, slurm)
    job.trains()
    site.ranks(site.hosts[1])[0].kill()
    job.ends("FAILED", END)

    job = Job(site, project, slurm)
    job.trains()
    (slow,) = site.ranks(site.hosts[1])
    slow.suspend()  # so that the run is not at its end when Slurm next looks at the time
    job.limit(10)  # no more than is left when the script wants to be told
    wait_for(lambda: (run / "STOP").exists(), 120)
    slow.resume()
    wait_for(lambda: job.field("Restarts") == "1", END)
    job.limit(240)
    job.trains()  # after the two minutes for which Slurm holds a job that was queued again
    before, after = job.said().split(asked)
    assert "continues after step" in before and "continues after step" in after

    job.command("scancel", job.number)
    job.ends("CANCELLED", END)
    assert job.said().count(asked) == 2  # Slurm's SIGTERM reaches the ranks

    job = Job(site, project, slurm)
    wait_for(lambda: job.field("JobState") == "RUNNING", START)
    job.ends("COMPLETED", START)
    assert weights(project) == site.right


def test_the_launcher_for_slurm_leaves_module_out(site: Site, slurm: Callable[..., str]) -> None:
    (command,) = [c for c in launches("--hostfile") if "--no_ssh" not in c]
    words = command.split()
    with pytest.raises(AssertionError, match=r"can't open file .*es2fast\.train"):
        slurm(site.project("launcher"), words[0], "--launcher", "slurm", *words[1:])
