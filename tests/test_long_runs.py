"""Memory, open files and processes over millions of steps."""

import json

import numpy as np
import pytest
from conftest import SCRIPTS, python, tiny_env

STEPS = 2_000_000
REPLAY = "--learning-starts 1000 --train-frequency 500 --gradient-steps 1 --batch-size 32 --buffer-size 20000".split()
FLAGS = {
    "reinforce": ["--num-envs", "64"],
    "a2c": ["--num-envs", "64", "--num-steps", "16"],
    "ppo": ["--num-envs", "64", "--num-minibatches", "8", "--update-epochs", "1"],
    **{script: ["--num-envs", "50", *REPLAY] for script in ("dqn", "ddpg", "td3", "sac")},
}

WATCH = """
import gc, importlib, json, os, sys
import tyro

script, *flags = sys.argv[1:]
module = importlib.import_module(script)
advance, points = module.Run.advance, []

def watched(run, step, row):
    old = run.step
    result = advance(run, step, row)
    if step // 50_000 > old // 50_000:
        gc.collect()
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
        points.append([step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))])
    return result

def children():
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and parent(pid) == os.getpid()]

def parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0

module.Run.advance = watched
before = len(os.listdir("/proc/self/fd"))
folder = module.train(tyro.cli(module.Args, args=flags))
left = [len(os.listdir("/proc/self/fd")) - before, len(children())]
print("WATCHED", json.dumps({"points": points, "left": left}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_memory_stays_flat_over_two_million_steps_and_nothing_is_left_open(script, here):
    where = ["--env-id", tiny_env(script, "Ledger"), "--total-timesteps", str(STEPS), "--log-every", "10000"]
    every = ["--eval-every", "200000", "--eval-episodes", "3", "--checkpoint-every", "200000"]
    done = python("-c", WATCH, script, *where, *every, *FLAGS[script], cwd=here, timeout=3000)
    watched = json.loads(done.stdout.split("WATCHED ")[1])
    step, memory, files = np.array(watched["points"], dtype=float).T
    late = step > STEPS / 4  # by then the buffers are full and the caches filled
    slope = np.polyfit(step[late] / 1e6, memory[late] / 1e6, 1)[0]
    print(f"{script}: {memory[-1] / 1e6:.0f} MB, {slope:+.2f} MB per million steps")
    assert step[-1] >= STEPS and len(step) >= 35
    assert slope < 2, "MB per million steps"
    assert files[late].max() == files[late].min()
    assert watched["left"] == [0, 0], "files and processes"
