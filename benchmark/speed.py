"""Steps per second of the scripts and of their peers, in alternating pairs.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py                                    # every case, an hour or two on two cores
    python benchmark/speed.py --cases sac-HalfCheetah --pairs 3  # a part of them

A pair is one run of the script and one of each peer, one after the other, each in a process of its own, with the same
environment, networks, batch and number of updates. The clock starts after the warm-up, in which compilers compile.
Ratios are taken within a pair, so that a machine that is slow for a while slows both. Leave it alone meanwhile.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
OFF_POLICY = dict(learning_starts=500, buffer_size=100_000)  # 256-256 networks, batches of 256, an update a step
PEER_OFF_POLICY = dict(batch_size=256, train_freq=1, gradient_steps=1, policy_kwargs=dict(net_arch=[256, 256]))
PPO_CARTPOLE = dict(num_envs=4, num_steps=128, update_epochs=4, num_minibatches=4)
PEER_PPO_CARTPOLE = dict(n_steps=128, batch_size=128, n_epochs=4)
PPO_CHEETAH = dict(num_envs=1, num_steps=2048, update_epochs=10, num_minibatches=32)
PLAIN = dict(norm_obs=False, norm_reward=False)  # the peers do not normalise unless told to
DQN = dict(train_frequency=10, gradient_steps=1, batch_size=128, learning_starts=500, buffer_size=10_000, double=False)
DQN |= dict(end_e=0.05, exploration_fraction=0.1)  # as the peers explore by default
PEER_DQN = dict(batch_size=128, train_freq=10, gradient_steps=1, learning_starts=500, buffer_size=10_000)

# name: environment, flags of the script, class of the peers and its arguments, steps of warm-up and of measurement
CASES = {
    "ppo-CartPole": ("CartPole-v1", PPO_CARTPOLE | PLAIN, "PPO", PEER_PPO_CARTPOLE, 20_000, 60_000),
    "a2c-CartPole": ("CartPole-v1", dict(num_envs=4, num_steps=5) | PLAIN, "A2C", dict(n_steps=5), 10_000, 60_000),
    "dqn-CartPole": ("CartPole-v1", DQN, "DQN", PEER_DQN | dict(policy_kwargs=dict(net_arch=[120, 84])), 3_000, 30_000),
    "ppo-HalfCheetah": ("HalfCheetah-v5", PPO_CHEETAH | PLAIN, "PPO", dict(n_steps=2048), 4_096, 16_384),
    "ddpg-HalfCheetah": ("HalfCheetah-v5", OFF_POLICY, "DDPG", PEER_OFF_POLICY | OFF_POLICY, 1_000, 3_000),
    "td3-HalfCheetah": ("HalfCheetah-v5", OFF_POLICY, "TD3", PEER_OFF_POLICY | OFF_POLICY, 1_000, 3_000),
    "sac-HalfCheetah": ("HalfCheetah-v5", OFF_POLICY, "SAC", PEER_OFF_POLICY | OFF_POLICY, 1_000, 3_000),
}


@dataclass
class Options:
    cases: tuple[str, ...] = tuple(CASES)  # which of the cases
    runners: tuple[str, ...] = ("rungs", "rungs-compile", "sb3", "sbx")  # of these, each in a pair
    threads: tuple[int, ...] = (1, 2)  # threads of each runner; of each the better number counts
    pairs: int = 5  # runs of each
    device: str = "cpu"  # of the scripts and of sb3
    out: Path | None = None  # a file to which a row a run is appended, as JSON
    worker: str = ""  # for internal use: one run, described as JSON


def clock(times: list[tuple[int, float]], warm_up: int) -> float:
    """Steps per second from the end of the warm-up on."""
    (first_step, start), (last_step, end) = next(t for t in times if t[0] >= warm_up), times[-1]
    return (last_step - first_step) / (end - start)


def run_script(case: str, compile: bool, threads: int, device: str) -> float:
    """One run of our script; returns steps per second."""
    env_id, flags, _, _, warm_up, steps = CASES[case]
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(case.split("-")[0])
    times = []
    advance = module.Run.advance

    def timed(self, step, row):
        result = advance(self, step, row)
        times.append((step, time.perf_counter()))
        return result

    module.Run.advance = timed
    module.train(
        module.Args(
            env_id=env_id,
            total_timesteps=warm_up + steps,
            eval_episodes=0,
            num_threads=threads,
            compile=compile,
            device=device,
            runs_dir=tempfile.mkdtemp(),
            **flags,
        )
    )
    return clock(times, warm_up)


def run_peer(library: str, case: str, threads: int, device: str) -> float:
    """One run of the peer with the same settings; returns steps per second."""
    env_id, flags, name, options, warm_up, steps = CASES[case]
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(threads)
    module = importlib.import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[library])
    times = []

    class Timer(BaseCallback):
        def _on_step(self) -> bool:
            times.append((self.num_timesteps, time.perf_counter()))
            return True

    if library == "sb3":
        options = options | dict(device=device)
    else:
        options = {k: v for k, v in options.items() if k != "device"}
    envs = make_vec_env(env_id, n_envs=flags.get("num_envs", 1))
    getattr(module, name)("MlpPolicy", envs, seed=1, **options).learn(warm_up + steps, callback=Timer())
    return clock(times, warm_up)


def measure(runner: str, case: str, threads: int, device: str) -> float | None:
    """Steps per second of a run in a process of its own."""
    task = json.dumps(dict(runner=runner, case=case, threads=threads, device=device))
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if runner == "sbx" and threads == 1:
        env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    command = [sys.executable, __file__, "--worker", task]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return None
    return float(done.stdout.split()[-1])


def main(options: Options) -> None:
    """Measures, and prints a table."""
    print("| case | | threads | steps/s (range) | ours / this (range) |\n|---|---|---|---|---|", flush=True)
    for case in options.cases:
        speeds = {(runner, threads): [] for runner in options.runners for threads in options.threads}
        for pair in range(options.pairs):
            for runner, threads in speeds:
                speed = measure(runner, case, threads, options.device)
                if speed is None:  # no such algorithm, or no such device
                    continue
                speeds[runner, threads].append(speed)
                row = dict(case=case, runner=runner, threads=threads, pair=pair, device=options.device, speed=speed)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
        best = {}
        for runner in options.runners:
            measured = {t: speeds[runner, t] for t in options.threads if len(speeds[runner, t]) == options.pairs}
            if measured:
                threads = max(measured, key=lambda t: statistics.median(measured[t]))
                best[runner] = threads, measured[threads]
        ours = max(
            (r for r in best if r.startswith("rungs")), key=lambda r: statistics.median(best[r][1]), default=None
        )
        for runner, (threads, values) in best.items():
            ratios = [a / b for a, b in zip(best[ours][1], values)] if ours else [float("nan")]
            print(f"| {case} | {runner} | {threads} | {spread(values, '.0f')} | {spread(ratios, '.2f')} |", flush=True)


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if chosen.worker:
        task = json.loads(chosen.worker)
        runner = task.pop("runner")
        if runner.startswith("rungs"):
            print(run_script(compile=runner == "rungs-compile", **task))
        else:
            print(run_peer(runner, **task))
    else:
        main(chosen)
