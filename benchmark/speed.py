"""Steps per second of the scripts and of their peers, in alternating pairs; how they scale; how far from the limit.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/speed.py                                    # every case, an hour or two on two cores
    python benchmark/speed.py --cases sac-HalfCheetah --pairs 3  # a part of them
    python benchmark/speed.py --scaling                          # the scripts over environments, threads and widths
    python benchmark/speed.py --pairs 0                          # the tables and figures of what was measured

A pair is one run of the script and one of each peer, one after the other, each in a process of its own, with the same
environment, networks, batch and number of updates. The clock starts after the warm-up, in which compilers compile.
Ratios are taken within a pair, so that a machine that is slow for a while slows both. Leave it alone meanwhile.

The limit is what the environment takes alone and the products of matrices of the updates at the speed that this machine
reaches with large ones; the rest of a step is Python, dispatch, small operations and waiting for memory.
"""

import csv
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
from run import made_with

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
RUNNERS = {"rungs": "Rungs", "rungs-compile": "Rungs, --compile", "sb3": "Stable-Baselines3", "sbx": "SBX"}
WIDTHS = (64, 256, 1024)
NUM_ENVS = (1, 4, 16, 64, 256, 1024)
FIELDS = ("case", "runner", "threads", "num_envs", "width", "pair", "speed", "device", "commit", "versions", "machine")


@dataclass
class Options:
    cases: tuple[str, ...] = tuple(CASES)  # which of the cases
    runners: tuple[str, ...] = tuple(RUNNERS)  # of these, each in a pair
    threads: tuple[int, ...] = (1, 2)  # threads of each runner; of each the better number counts
    pairs: int = 5  # runs of each
    scaling: bool = False  # measure the scripts over environments, threads and widths instead of beside their peers
    device: str = "cpu"  # of the scripts and of sb3
    out: Path = Path(__file__).with_name("speed.csv")  # where a row a run is appended
    chart: Path = Path(__file__).with_name("speed.png")  # the figure of all rows
    worker: str = ""  # for internal use: one run, described as JSON


def clock(times: list[tuple[int, float]], warm_up: int) -> float:
    """Steps per second from the end of the warm-up on."""
    (first_step, start), (last_step, end) = next(t for t in times if t[0] >= warm_up), times[-1]
    return (last_step - first_step) / (end - start)


def load_script(name: str, width: int):
    """The script as a module; with a width, that of its hidden layers in the place of 256."""
    sys.path.insert(0, str(ROOT))
    if not width:
        return importlib.import_module(name)
    folder = Path(tempfile.mkdtemp())
    text = (ROOT / f"{name}.py").read_text()
    (folder / f"{name}.py").write_text(
        text.replace(", 256)", f", {width})").replace("nn.Linear(256,", f"nn.Linear({width},")
    )
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def run_script(task: dict) -> float:
    """One run of our script; returns steps per second."""
    env_id, flags, _, _, warm_up, steps = CASES[task["case"]]
    module = load_script(task["case"].split("-")[0], task["width"])
    if task["num_envs"]:
        flags = flags | dict(num_envs=task["num_envs"], num_steps=32)
        warm_up, steps = 200 * task["num_envs"] + warm_up // 4, 400 * task["num_envs"] + steps // 4
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
            num_threads=task["threads"],
            compile=task["runner"] == "rungs-compile",
            device=task["device"],
            runs_dir=tempfile.mkdtemp(),
            **flags,
        )
    )
    return clock(times, warm_up)


def run_peer(task: dict) -> float:
    """One run of the peer with the same settings; returns steps per second."""
    env_id, flags, name, options, warm_up, steps = CASES[task["case"]]
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(task["threads"])
    module = importlib.import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[task["runner"]])
    times = []

    class Timer(BaseCallback):
        def _on_step(self) -> bool:
            times.append((self.num_timesteps, time.perf_counter()))
            return True

    if task["runner"] == "sb3":
        options = options | dict(device=task["device"])
    envs = make_vec_env(env_id, n_envs=flags.get("num_envs", 1))
    getattr(module, name)("MlpPolicy", envs, seed=1, **options).learn(warm_up + steps, callback=Timer())
    return clock(times, warm_up)


def run_limit(task: dict) -> float:
    """Steps per second if nothing took time but the environment and the products of matrices."""
    env_id, flags, _, _, _, _ = CASES[task["case"]]
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module = load_script(task["case"].split("-")[0], task["width"])
    on_policy = "num_steps" in flags
    start = 0 if on_policy else flags["learning_starts"]
    steps = 2 * flags["num_steps"] * flags["num_envs"] if on_policy else 200
    args = module.Args(
        env_id=env_id, eval_episodes=0, num_threads=task["threads"], runs_dir=tempfile.mkdtemp(), **flags
    )
    with FlopCounterMode(display=False) as counter:
        module.train(module.replace(args, total_timesteps=start + steps))
    flops = counter.get_total_flops() / steps

    x = torch.randn(1024, 1024)
    product = module.accelerated(lambda: x @ x, args, torch.device("cpu"))
    best = min(timed(product) for _ in range(20))
    envs = module.make_envs(args, args.num_envs)
    envs.reset(seed=1)
    action = envs.action_space.sample()
    alone = statistics.median(timed(lambda: envs.step(action)) for _ in range(3_000)) / args.num_envs
    return 1 / (alone + flops / (2 * 1024**3 / best))


def timed(function) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(task: dict) -> float | None:
    """Steps per second of a run in a process of its own; None if it cannot be had."""
    env = os.environ | {"OMP_NUM_THREADS": str(task["threads"])}
    if task["runner"] == "sbx" and task["threads"] == 1:
        env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    command = [sys.executable, __file__, "--worker", json.dumps(task)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        print(f"{task}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return float(done.stdout.split()[-1])


def measure_all(options: Options) -> None:
    """Measures pair by pair, and appends a row a run."""
    if options.scaling:
        shapes = [("ppo-CartPole", "rungs", 1, n, 0) for n in NUM_ENVS]
        shapes += [("sac-HalfCheetah", "rungs", t, 0, width) for width in WIDTHS for t in options.threads]
        groups = [shapes]
    else:
        runners = ("limit", *options.runners)
        groups = [[(case, r, t, 0, 0) for r in runners for t in options.threads] for case in options.cases]
    made = {name.split("-")[0]: made_with(name.split("-")[0]) for name in CASES}
    for group in groups:
        for pair in range(options.pairs):
            for case, runner, threads, num_envs, width in group:
                if runner == "sbx" and case.startswith("a2c"):
                    continue  # it has none
                task = dict(case=case, runner=runner, threads=threads, num_envs=num_envs, width=width)
                task["device"] = options.device
                speed = measure(task)
                if speed is None:
                    continue
                print(f"{case} {runner} {threads} {num_envs or ''} {width or ''} {speed:,.0f}", flush=True)
                new = not options.out.exists()
                with options.out.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    if new:
                        writer.writeheader()
                    writer.writerow(task | {"pair": pair, "speed": round(speed, 1)} | made[case.split("-")[0]])


def read(path: Path) -> dict[tuple, list[float]]:
    """The speeds by case, runner, threads, number of environments and width."""
    speeds = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = row["case"], row["runner"], int(row["threads"]), int(row["num_envs"]), int(row["width"])
                speeds.setdefault(key, []).append(float(row["speed"]))
    return speeds


def best_of(speeds: dict[tuple, list[float]], case: str, runner: str) -> tuple[int, list[float]] | None:
    """The number of threads with the highest median, and the speeds with it."""
    of = {key[2]: values for key, values in speeds.items() if key[:2] == (case, runner) and key[3:] == (0, 0)}
    return max(of.items(), key=lambda item: statistics.median(item[1])) if of else None


def report(speeds: dict[tuple, list[float]]) -> None:
    """Prints the tables in Markdown."""
    print("| case | runner | threads | steps/s (range) | Rungs plain / this | best of Rungs / this | of the limit |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        best = {runner: best_of(speeds, case, runner) for runner in ("limit", *RUNNERS)}
        ours = [best[r][1] for r in ("rungs", "rungs-compile") if best[r]]
        for runner, about in RUNNERS.items():
            if not best[runner]:
                continue
            threads, values = best[runner]
            cells = [case, about, str(threads), spread(values, ",.0f")]
            cells.append(spread([a / b for a, b in zip(best["rungs"][1], values)], ".2f") if best["rungs"] else "")
            fastest = max(ours, key=statistics.median) if ours else []
            cells.append(spread([a / b for a, b in zip(fastest, values)], ".2f") if ours else "")
            limit = best["limit"] and statistics.median(best["limit"][1])
            cells.append(f"{statistics.median(values) / limit:.0%}" if limit else "")
            print(f"| {' | '.join(cells)} |")
    scaling = {key: values for key, values in speeds.items() if key[3:] != (0, 0)}
    if scaling:
        print("\n| case | threads | environments | width | steps/s (range) |\n|---|---|---|---|---|")
    for (case, _, threads, num_envs, width), values in sorted(scaling.items()):
        print(f"| {case} | {threads} | {num_envs or ''} | {width or ''} | {spread(values, ',.0f')} |")


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    if not values:
        return ""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def draw(speeds: dict[tuple, list[float]], path: Path) -> None:
    """A bar chart: each runner's median steps per second over those of the slowest, with the range."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    cases = [case for case in CASES if best_of(speeds, case, "rungs")]
    if not cases:
        return
    figure, axes = plt.subplots(figsize=(1.6 * len(cases) + 2, 4), layout="constrained")
    for offset, (runner, about) in enumerate(RUNNERS.items()):
        for place, case in enumerate(cases):
            unit = statistics.median((best_of(speeds, case, "sb3") or best_of(speeds, case, "rungs"))[1])
            if best := best_of(speeds, case, runner):
                ratios = [value / unit for value in best[1]]
                middle = statistics.median(ratios)
                error = [[middle - min(ratios)], [max(ratios) - middle]]
                x = place + 0.2 * (offset - 1.5)
                axes.bar(x, middle, 0.19, yerr=error, color=f"C{offset}", label=about if place == 0 else None)
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_ylabel("steps/s, relative to Stable-Baselines3")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    if chosen.worker:
        described = json.loads(chosen.worker)
        workers = {"rungs": run_script, "rungs-compile": run_script, "limit": run_limit}
        print(workers.get(described["runner"], run_peer)(described))
    else:
        measure_all(chosen)
        report(read(chosen.out))
        draw(read(chosen.out), chosen.chart)
