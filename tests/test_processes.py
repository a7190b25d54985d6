"""torchrun: several processes learn the same thing from the same rollouts, and make what one alone would make."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, environment, only_run, python, rows
from tests.processes import train_and_save

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")  # a port of its own
FEW = "--seed 3 --eval-episodes 2 --log-every 1 --num-envs 4"
COMMANDS = {
    "reinforce": f"reinforce {FEW} --total-timesteps 150",
    "reinforce-none": f"reinforce {FEW} --total-timesteps 150 --baseline none",
    "a2c": f"a2c {FEW} --total-timesteps 300",
    "a2c-box": f"a2c {FEW} --total-timesteps 300 --env-id Pendulum-v1",
    "ppo": f"ppo {FEW} --total-timesteps 512 --num-steps 32 --checkpoint-every 256",
    "ppo-box": f"ppo {FEW} --total-timesteps 512 --num-steps 32 --env-id Pendulum-v1 --target-kl 0.05 --clip-vloss",
    "ppo-plain": f"ppo {FEW} --total-timesteps 512 --num-steps 32 --no-norm-obs --no-norm-reward --no-norm-adv",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folders of what two processes and one made of COMMANDS."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    python(*TORCHRUN, "-m", "tests.processes", two, *COMMANDS.values(), cwd=two, timeout=300)
    before = os.getcwd()
    os.chdir(one)
    try:
        train_and_save(list(COMMANDS.values()), one)
    finally:
        os.chdir(before)
    return two, one


def the_run(folder, number):
    """The folder of the run with this number, in the order of their time."""
    made = sorted((folder / "runs").iterdir(), key=lambda path: path.name.split("__")[-1])
    return made[number]


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_have_the_same_agent_to_the_last_bit(trained, name):
    first, second = (torch.load(trained[0] / f"{[*COMMANDS].index(name)}-{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("reinforce")])
def test_two_processes_make_what_one_alone_makes(trained, name):
    """The same environments, noise, rollouts, minibatches and steps: equal but for the rounding of sums."""
    number = [*COMMANDS].index(name)
    two, one = (torch.load(folder / f"{number}-0.pt") for folder in trained)
    assert two.keys() == one.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    two, one = (rows(the_run(folder, number)) for folder in trained)
    assert len(two) == len(one) > 2
    for mine, expected in zip(two, one):
        assert mine.keys() == expected.keys()
        for key in expected:
            assert mine[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("name", ["reinforce", "reinforce-none"])
def test_two_processes_of_reinforce_make_nearly_what_one_makes(trained, name):
    """Only nearly: halves of an odd number of steps have unlike means of the value's errors."""
    two, one = (torch.load(folder / f"{[*COMMANDS].index(name)}-0.pt") for folder in trained)
    for key in one:
        np.testing.assert_allclose(two[key], one[key], rtol=1e-2, atol=1e-3, err_msg=key)


def test_one_of_the_processes_writes(trained):
    two, one = trained
    assert len(list((two / "runs").iterdir())) == len(COMMANDS)
    for number in range(len(COMMANDS)):
        files = [sorted(path.name for path in the_run(folder, number).iterdir()) for folder in trained]
        assert files[0] == files[1]


@pytest.mark.slow
def test_two_processes_with_compile_make_what_those_without_make(trained, tmp_path):
    names = ["reinforce", "a2c", "ppo"]
    commands = [f"{COMMANDS[name]} --compile" for name in names]
    python(*TORCHRUN, "-m", "tests.processes", tmp_path, *commands, cwd=tmp_path, timeout=600)
    for number, name in enumerate(names):
        first, second = (torch.load(tmp_path / f"{number}-{rank}.pt") for rank in (0, 1))
        expected = torch.load(trained[0] / f"{[*COMMANDS].index(name)}-0.pt")
        assert all(torch.equal(first[key], second[key]) for key in first)
        for key in expected:
            torch.testing.assert_close(first[key], expected[key], rtol=1e-3, atol=1e-4)


def launched(script, *flags, cwd, env=None, check=True):
    return python(*TORCHRUN, ROOT / f"{script}.py", *flags, cwd=cwd, env=env, check=check, timeout=180)


def test_killed_processes_resume_to_the_same_bits(tmp_path):
    flags = (
        "--env-id tests.envs:SignalsCartPole-v0 --total-timesteps 1024 --num-steps 32 --checkpoint-every 256".split()
    )
    flags += "--eval-episodes 2 --log-every 256".split()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    out = launched("ppo", *flags, cwd=whole).stdout
    assert out.count("Evaluation at step") == out.count("from step 0 to") == 1
    kill = {"SIGNAL": "SIGKILL", "SIGNAL_AT": "300"}  # in each process, after 600 of both
    assert launched("ppo", *flags, cwd=cut, env=kill, check=False).returncode != 0
    assert rows(only_run(cut))[-1]["global_step"] == 512
    out = launched("ppo", "--resume", only_run(cut).relative_to(cut), cwd=cut).stdout
    assert "from step 512 to 1,024" in out
    assert rows(only_run(cut)) == rows(only_run(whole))
    mine, expected = (torch.load(only_run(folder) / "agent.pt", weights_only=True) for folder in (cut, whole))
    assert all(torch.equal(mine[key], expected[key]) for key in expected)


SHOWS_ITS_THREADS = """
import atexit, importlib, sys
from pathlib import Path

def show():
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    print("threads at the end:", names)

atexit.register(show)  # so it comes after what the script does at its end
script = importlib.import_module(sys.argv[1])
script.train(script.Args(num_envs=2, total_timesteps=300, eval_episodes=0))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux tells the threads of a process")
@pytest.mark.parametrize("script", ["reinforce", "a2c", "ppo"])
def test_the_threads_of_gloo_end_before_the_process(script, tmp_path):
    """One that outlives Python aborts the process now and then."""
    (tmp_path / "shows.py").write_text(SHOWS_ITS_THREADS)
    out = python(*TORCHRUN, tmp_path / "shows.py", script, cwd=tmp_path).stdout
    assert "threads at the end: [" in out and "gloo" not in out


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    flags = "--env-id tests.envs:SignalsCartPole-v0 --total-timesteps 4096 --num-steps 32".split()
    only_second = {"SIGNAL": "SIGTERM", "SIGNAL_AT": "300", "SIGNAL_RANK": "1"}
    done = launched("ppo", *flags, cwd=tmp_path, env=only_second, check=False)
    assert done.returncode != 0 and done.stdout.count("Stopped at step 640") == 1
    assert torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)["step"] == 640


def test_sigterm_ends_both_processes_with_a_checkpoint(tmp_path):
    command = [sys.executable, *TORCHRUN, str(ROOT / "ppo.py"), "--total-timesteps", "1000000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (rows_file := list(tmp_path.glob("runs/*/metrics.jsonl"))) or not rows_file[0].read_bytes():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out.count("Stopped at step") == 1 and "goes on from its last checkpoint" in out
    torch.load(only_run(tmp_path) / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(
    "script, flags, line",
    [
        ("ppo", "--num-envs 3", "--num-envs 3 cannot be split over 2 processes"),
        ("ppo", "--num-envs 2 --num-steps 9 --num-minibatches 2", "2 processes cannot share a minibatch"),
        ("sac", "", "torchrun is for reinforce.py, a2c.py and ppo.py"),
    ],
)
def test_what_two_processes_cannot_do_gets_a_line(script, flags, line, tmp_path):
    done = launched(script, *flags.split(), cwd=tmp_path, check=False)
    assert done.returncode != 0 and f"{script}.py: error: {line}" in done.stderr
    assert not (tmp_path / "runs").exists()
