"""What several test files use: the list of scripts, ways to run one, and a look at what a run left behind."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # it may stall
settings.load_profile("any machine")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch, before it is imported: `-n 2` has a process on each core
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("reinforce", "a2c", "ppo", "dqn", "ddpg", "td3", "sac")
ONLY = {"dqn": "Discrete", "ddpg": "Box", "td3": "Box", "sac": "Box"}  # the actions that a script takes, if not both
REPLAY = tuple("--learning-starts 200 --train-frequency 4 --gradient-steps 1 --batch-size 16".split())
SMALL = {"ppo": ("--num-steps", "64"), "dqn": REPLAY, "ddpg": REPLAY, "td3": REPLAY, "sac": REPLAY}
"""What a script needs beside TINY to improve within a tiny run."""
TINY = ("--total-timesteps", "1500", "--num-envs", "2", "--log-every", "500", "--eval-episodes", "2")


def pytest_runtest_setup(item):
    """Undoes what the last training in this process has set: without the smallest numbers Hypothesis refuses to run."""
    import torch

    torch.set_flush_denormal(False)


def flags(script: str, *more: str) -> tuple[str, ...]:
    """The flags of a tiny run; those in `more` come last and win."""
    return *TINY, *SMALL.get(script, ()), *more


def takes(script: str, actions: str) -> bool:
    """Whether the script takes actions of this kind, Discrete or Box."""
    return ONLY.get(script, actions) == actions


def tiny_env(script: str, name: str) -> str:
    """The id of the environment in tests/envs.py with actions that the script takes."""
    return f"tests.envs:{name}-v0" if takes(script, "Discrete") else f"tests.envs:{name}Box-v0"


def environment(**more: str) -> dict[str, str]:
    """The variables that a script is run with, in any folder: one thread, tests.envs importable, no W&B but offline."""
    ours = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return os.environ | ours | {"SDL_AUDIODRIVER": "dummy", "XDG_RUNTIME_DIR": "/tmp"} | more


def python(*arguments, cwd, env=None, check=True, timeout=120) -> subprocess.CompletedProcess:
    """Python with these arguments in the folder `cwd`, and with `env` beside the usual variables."""
    command = [sys.executable, *map(str, arguments)]
    settings = {"cwd": cwd, "env": environment(**env or {}), "timeout": timeout}
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **settings)
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run(script: str, *flags: str, cwd, env=None, check=True, timeout=120) -> subprocess.CompletedProcess:
    """A script as a user runs it, in the folder `cwd`."""
    return python(ROOT / f"{script}.py", *flags, cwd=cwd, env=env, check=check, timeout=timeout)


def train(script: str, *flags: str) -> Path:
    """The same in this process, in the current folder: quicker, and what train() raises comes through."""
    module = importlib.import_module(script)
    return module.train(tyro.cli(module.Args, args=[str(flag) for flag in flags]))


def strict(constant: str):
    raise ValueError(f"{constant} is not JSON")


def rows(folder: Path, speed: bool = False) -> list[dict]:
    """The rows of metrics.jsonl, by default without the one number that no two runs share."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=strict) for line in lines]
    return found if speed else [{key: x for key, x in row.items() if key != "charts/SPS"} for row in found]


def only_run(cwd: Path) -> Path:
    """The folder of the one run that was made here."""
    (folder,) = (Path(cwd) / "runs").iterdir()
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder, and the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
