"""Steps per second of the scripts and of their peers, in alternating pairs; how they scale; how far from the limit.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/speed.py                                    # every case, about an hour on two cores
    python benchmark/speed.py --cases sac-HalfCheetah --pairs 3  # a part of them
    python benchmark/speed.py --scaling                          # the scripts over environments, threads and widths
    python benchmark/speed.py --profile                          # what the time of a step goes into
    python benchmark/speed.py --width 8                          # the pairs with narrow layers: what is not products
    python benchmark/speed.py --pairs 0                          # the tables and figures of what was measured

Each runner is a process of its own, with the same environment, networks, batch and number of updates. After a warm-up,
in which compilers compile, they take turns of a second or so: one goes on while the others wait. A pair is one turn of
each, and ratios are taken within it, so that a machine that is slow for a while slows all. Leave it alone meanwhile.

The limit is what the environment takes alone and the products of matrices of the updates at the speed that this machine
reaches with large ones; the rest of a step is Python, dispatch, small operations and waiting for memory.
"""

import contextlib
import csv
import functools
import importlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from collect import fail
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

# name: environment, flags of the script, class of the peers and its arguments, steps of warm-up and of ten turns
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
PEERS = ("stable-baselines3", "sbx-rl", "jax")
WIDTHS = (64, 256, 1024)
NUM_ENVS = (1, 4, 16, 64, 256, 1024)
TURNS = 10  # in the steps of CASES
# part of a step: what it consists of, in any of the scripts
PARTS = {
    "environment": ("Environments.step",),
    "acting": ("Agent.act", "Agent.random_action", "Agent.to_env"),
    "memory": ("true_next_obs", "stack", "gather", "ReplayBuffer.add", "ReplayBuffer.sample"),
    "gradients": ("a2c_loss", "ppo_loss", "critic_loss", "actor_loss", "Tensor.backward"),
    "optimizer": ("FastOptimizer.step", "FastOptimizer.zero_grad", "polyak"),
}
FIELDS = ("case", "runner", "threads", "num_envs", "width", "pair", "speed", "device", "commit", "versions", "machine")
PROFILE_FIELDS = ("case", "threads", *PARTS, "rest", "commit", "versions", "machine")  # microseconds a step


@dataclass
class Options:
    cases: tuple[str, ...] = tuple(CASES)  # which of the cases
    runners: tuple[str, ...] = tuple(RUNNERS)  # of these, each in a pair
    threads: tuple[int, ...] = (1, 2)  # threads of each runner; of each the better number counts
    pairs: int = 12  # turns of each
    width: int = 0  # units of each hidden layer of the script and its peers; 0 for those of the case
    scaling: bool = False  # measure the scripts over environments, threads and widths instead of beside their peers
    profile: bool = False  # measure the parts of the scripts' steps on the CPU instead
    device: Literal["cpu", "cuda", "mps"] = "cpu"  # of the scripts and of sb3
    out: Path = Path(__file__).with_name("speed.csv")  # where a row a run is appended; the profile beside it
    chart: Path = Path(__file__).with_name("speed.png")  # the figure of all rows
    worker: str = ""  # for internal use: one run, described as JSON


def flags_of(task: dict) -> dict:
    """The flags of the script in this case, with the environments and the width of the task."""
    flags = dict(CASES[task["case"]][1])
    if task["num_envs"]:
        flags |= dict(num_envs=task["num_envs"], num_steps=32)
    if task["width"]:
        flags |= dict(hidden_sizes=(task["width"],) * 2)
    return flags


class Turns:
    """Lets the run of a worker go on for some steps whenever a line comes in; prints the speed of each such turn."""

    def __init__(self, task: dict, warm_up: int, steps: int):
        """The first turn comes after the warm-up; `steps` is what all turns of a short measurement take."""
        flags = flags_of(task)
        rollout = flags.get("num_envs", 1) * flags.get("num_steps", 1)
        self.steps = -(-steps // (TURNS * rollout)) * rollout  # whole rollouts: each turn has as many updates
        self.next, self.begun = warm_up, None
        self.total = warm_up + (task["turns"] + 2) * (self.steps + rollout)

    def __call__(self, step: int) -> None:
        """To be called after every step or rollout."""
        if step < self.next:
            return
        speed = self.begun and (step - self.begun[0]) / (time.perf_counter() - self.begun[1])
        print(f"\n{json.dumps({'turn': speed})}", flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        self.next, self.begun = step + self.steps, (step, time.perf_counter())


class Worker:
    """A run in a process of its own, of which nothing moves but in its turn."""

    def __init__(self, task: dict):
        self.errors = tempfile.TemporaryFile("w+")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.task, self.process = task, subprocess.Popen(command_of(task), env=environment_of(task), text=True, **pipes)

    def result(self) -> float | None:
        """The speed of the turn that ends next, None for that of the warm-up; ChildProcessError if the run ends."""
        for line in self.process.stdout:
            if line.startswith('{"turn": '):
                return json.loads(line)["turn"]
        self.process.wait()
        self.errors.seek(0)
        raise ChildProcessError(last_line(self.errors.read(), self.process.returncode))

    def turn(self) -> float:
        """Steps per second of a turn."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.result()

    def end(self) -> None:
        """Ends the run, wherever it is."""
        self.process.kill()
        self.process.communicate()


def load_script(task: dict):
    """The script of the task's case, as a module."""
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(task["case"].split("-")[0])


def watch(module) -> dict[str, float]:
    """Makes the functions of PARTS that the script has add up the seconds that they take."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def watched(function, part: str):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[part] += time.perf_counter() - start
            return result

        return call

    for part, names in PARTS.items():
        for name in names:
            *path, last = name.split(".")
            try:
                owner = functools.reduce(getattr, path, module)
                setattr(owner, last, watched(getattr(owner, last), part))
            except AttributeError:
                pass  # another script has it
    return seconds


def run_profile(task: dict) -> str:
    """One run of our script; returns the microseconds of a step by part, as JSON."""
    module, snapshots = load_script(task), []
    seconds = watch(module)
    advance = module.Run.advance

    def snapshot(self, step, row):
        result = advance(self, step, row)
        snapshots.append((step, dict(seconds)))
        return result

    module.Run.advance = snapshot
    warm_up, steps = CASES[task["case"]][4:]
    times, total = [], warm_up + steps
    clock = lambda step: times.append((step, time.perf_counter()))  # noqa: E731
    run_script(task | dict(runner="rungs", num_envs=0, width=0), clock, total)
    (first, start), (last, end) = next(pair for pair in times if pair[0] >= warm_up), times[-1]
    speed = (last - first) / (end - start)
    (first, start), (last, end) = next(pair for pair in snapshots if pair[0] >= warm_up), snapshots[-1]
    parts = {part: 1e6 * (end[part] - start[part]) / (last - first) for part in PARTS}
    parts["rest"] = 1e6 / speed - sum(parts.values())
    return json.dumps({part: round(x, 2) for part, x in parts.items()})


def take_turns(task: dict) -> None:
    """A run of our script or of the peer in turns."""
    *_, warm_up, steps = CASES[task["case"]]
    if task["num_envs"]:
        warm_up, steps = 200 * task["num_envs"] + warm_up // 4, 400 * task["num_envs"] + steps // 4
    if task["width"] > 256:
        steps //= 4  # the widest makes 20 steps a second
    turns = Turns(task, warm_up, steps)
    (run_script if task["runner"].startswith("rungs") else run_peer)(task, turns, turns.total)


def run_script(task: dict, tick: Callable[[int], None], total: int) -> None:
    """A run of our script; `tick` is called with the step after every step or rollout."""
    module = load_script(task)
    advance = module.Run.advance

    def ticking(self, step, row):
        result = advance(self, step, row)
        tick(step)
        return result

    module.Run.advance = ticking
    module.train(
        module.Args(
            env_id=CASES[task["case"]][0],
            total_timesteps=total,
            eval_episodes=0,
            num_threads=task["threads"],
            compile=task["runner"] == "rungs-compile",
            device=task["device"],
            runs_dir=tempfile.mkdtemp(),
            **flags_of(task),
        )
    )


def run_peer(task: dict, tick: Callable[[int], None], total: int) -> None:
    """A run of the peer with the same settings; `tick` is called with the step after every step."""
    env_id, flags, name, options, _, _ = CASES[task["case"]]
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(task["threads"])
    module = importlib.import_module({"sb3": "stable_baselines3", "sbx": "sbx"}[task["runner"]])

    class Ticking(BaseCallback):
        def _on_step(self) -> bool:
            tick(self.num_timesteps)
            return True

    if task["runner"] == "sb3":
        options = options | dict(device=task["device"])
    if task["width"]:
        options = options | dict(policy_kwargs=dict(net_arch=[task["width"]] * 2))
    envs = make_vec_env(env_id, n_envs=flags.get("num_envs", 1))
    getattr(module, name)("MlpPolicy", envs, seed=1, **options).learn(total, callback=Ticking())


def run_limit(task: dict) -> float:
    """Steps per second if nothing took time but the environment and the products of matrices."""
    env_id, flags, _, _, _, _ = CASES[task["case"]]
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module = load_script(task)
    on_policy = "num_steps" in flags
    start = 0 if on_policy else flags["learning_starts"]
    steps = 2 * flags["num_steps"] * flags["num_envs"] if on_policy else 200
    if task["width"]:
        flags = flags | dict(hidden_sizes=(task["width"],) * 2)
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


def command_of(task: dict) -> list[str]:
    """The command of a worker."""
    return [sys.executable, __file__, "--worker", json.dumps(task)]


def environment_of(task: dict) -> dict[str, str]:
    """The environment variables of a worker."""
    env = os.environ | {"OMP_NUM_THREADS": str(task["threads"])}
    if task["runner"] == "sbx" and task["threads"] == 1:
        env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return env


def last_line(errors: str, code: int) -> str:
    """What a worker said last, or the code that it ended with."""
    return (errors.strip() or f"exit code {code}").splitlines()[-1]


def measure(task: dict) -> float | dict[str, float] | None:
    """The limit or a profile, by a worker; None if it cannot be had."""
    done = subprocess.run(command_of(task), env=environment_of(task), capture_output=True, text=True)
    if done.returncode:
        print(f"{task}: {last_line(done.stderr, done.returncode)}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def append(path: Path, fields: tuple[str, ...], row: dict) -> None:
    """A row at the end of a CSV file; what is no field is left out."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def profile_all(options: Options) -> int:
    """Measures where the time of a step goes, and appends a row a run; returns how many runs failed."""
    failed = 0
    for case in options.cases:
        made = made_with(case.split("-")[0])
        for _ in range(options.pairs):
            for threads in options.threads:
                task = dict(case=case, runner="profile", threads=threads, device="cpu")
                parts = measure(task)
                failed += parts is None
                if parts:
                    print(case, threads, parts, flush=True)
                    append(profile_of(options), PROFILE_FIELDS, task | parts | made)
    return failed


def profile_of(options: Options) -> Path:
    """The file of the profile."""
    return options.out.with_name(f"{options.out.stem}_profile.csv")


def report_profile(path: Path) -> None:
    """Prints the median parts of a step, with the number of threads that takes less time, as a table in Markdown.

    Of a case those of the machine that it was measured on last.
    """
    runs = {}
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        last = {row["case"]: row["machine"] for row in rows}
        for row in rows:
            if row["machine"] == last[row["case"]]:
                parts = [float(row[part]) for part in (*PARTS, "rest")]
                runs.setdefault(row["case"], {}).setdefault(row["threads"], []).append(parts)
        print(f"\n| microseconds a step | threads | {' | '.join(PARTS)} | rest | sum |\n|{'---|' * (len(PARTS) + 4)}")
    for case in [case for case in CASES if case in runs]:
        medians = {t: [statistics.median(column) for column in zip(*rows)] for t, rows in runs[case].items()}
        threads, parts = min(medians.items(), key=lambda item: sum(item[1]))
        print(f"| {case} | {threads} | {' | '.join(f'{x:,.1f}' for x in [*parts, sum(parts)])} |")


def measure_all(options: Options) -> int:
    """Measures pair by pair, and appends a row a turn; returns how many runs failed."""
    failed = 0
    if options.scaling:
        shapes = [("ppo-CartPole", "rungs", 1, n, 0) for n in NUM_ENVS]
        shapes += [("sac-HalfCheetah", "rungs", t, 0, width) for width in WIDTHS for t in options.threads]
        groups = [shapes]
    else:
        runners = ("limit", *options.runners)
        groups = [[(case, r, t, 0, options.width) for r in runners for t in options.threads] for case in options.cases]
    made = {name.split("-")[0]: made_with(name.split("-")[0]) for name in CASES}
    for package in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for about in made.values():
                about["versions"] += f", {package} {importlib.metadata.version(package)}"
    done = 1 + max((pair for pairs in read(options.out).values() for pair in pairs), default=-1)

    def note(task: dict, pair: int, speed: float) -> None:
        print(*(task[name] or "" for name in FIELDS[:5]), f"{speed:,.0f}", flush=True)
        append(options.out, FIELDS, task | {"pair": pair, "speed": round(speed, 1)} | made[task["case"].split("-")[0]])

    for group in groups if options.pairs else []:
        tasks = []
        for shape in group:
            task = dict(zip(FIELDS, shape))  # as far as the shape goes
            if task["runner"] == "sbx" and task["case"].startswith("a2c"):
                continue  # it has none
            tasks.append(task | dict(device=options.device, turns=options.pairs))
        for task in [task for task in tasks if task["runner"] == "limit"]:
            speed = measure(task)
            failed += speed is None
            if speed is not None:
                note(task, done, speed)
        with contextlib.ExitStack() as stack:
            workers = [Worker(task) for task in tasks if task["runner"] != "limit"]
            for worker in workers:
                stack.callback(worker.end)
            for pair in range(done - 1, done + options.pairs):  # the first is the warm-up of all
                for worker in list(workers):
                    try:
                        speed = worker.turn() if pair >= done else worker.result()
                    except ChildProcessError as error:
                        print(f"{worker.task}: {error}", file=sys.stderr)
                        workers.remove(worker)
                        failed += 1
                        continue
                    if pair >= done:
                        note(worker.task, pair, speed)
    return failed


def read(path: Path) -> dict[tuple, dict[int, float]]:
    """The speeds by case, runner, threads, number of environments and width; of each by its pair.

    Of a case those of the machine, device and commit that it was measured on last, beside its peers and scaled: others
    do not compare.
    """
    speeds, rows = {}, []
    if path.exists():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    last = {}
    for row in rows:
        row["key"] = row["case"], row["runner"], int(row["threads"]), int(row["num_envs"]), int(row["width"])
        row["table"] = row["case"], row["key"][3:] == (0, 0)
        last[row["table"]] = row["machine"], row["device"], row["commit"]
    for row in rows:
        if (row["machine"], row["device"], row["commit"]) == last[row["table"]]:
            speeds.setdefault(row["key"], {})[int(row["pair"])] = float(row["speed"])
    return speeds


def best_of(speeds: dict[tuple, dict], case: str, runner: str) -> tuple[int, dict[int, float]] | None:
    """The number of threads with the highest median, and the speeds with it."""
    of = {key[2]: values for key, values in speeds.items() if key[:2] == (case, runner) and key[3:] == (0, 0)}
    return max(of.items(), key=lambda item: statistics.median(item[1].values())) if of else None


def ratios(ours: dict[int, float], peers: dict[int, float]) -> list[float]:
    """How many times as fast ours are, pair by pair."""
    return [ours[pair] / peers[pair] for pair in ours if pair in peers]


def report(speeds: dict[tuple, dict[int, float]]) -> None:
    """Prints the tables in Markdown."""
    print(
        "| case | runner | threads | steps/s (middle half) | Rungs plain / this | best of Rungs / this | of the limit |"
    )
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        best = {runner: best_of(speeds, case, runner) for runner in ("limit", *RUNNERS)}
        ours = [best[r][1] for r in ("rungs", "rungs-compile") if best[r]]
        for runner, about in RUNNERS.items():
            if not best[runner]:
                continue
            threads, values = best[runner]
            cells = [case, about, str(threads), spread(values.values(), ",.0f")]
            fastest = max(ours, key=lambda x: statistics.median(x.values())) if ours else {}
            for mine in (best["rungs"][1] if best["rungs"] else {}, fastest):
                cells.append("" if mine is values else spread(ratios(mine, values), ".2f"))
            limit = best["limit"] and statistics.median(best["limit"][1].values())
            cells.append(f"{statistics.median(values.values()) / limit:.0%}" if limit else "")
            print(f"| {' | '.join(cells)} |")
    scaling = {key: values for key, values in speeds.items() if key[3:] != (0, 0)}
    if scaling:
        print("\n| case | runner | threads | environments | width | steps/s (middle half) |\n|---|---|---|---|---|---|")
    for (case, runner, threads, num_envs, width), values in sorted(scaling.items()):
        cells = [case, RUNNERS.get(runner, runner), threads, num_envs or "", width or ""]
        print(f"| {' | '.join(map(str, cells))} | {spread(values.values(), ',.0f')} |")


def bounds(values: list[float]) -> tuple[float, float]:
    """Where the middle half of the values lies; of fewer than ten where all of them lie."""
    if len(values) < 10:
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4)
    return low, high


def spread(values: Iterable[float], form: str) -> str:
    """Median and bounds."""
    values = list(values)
    if not values:
        return ""
    low, high = bounds(values)
    return f"{statistics.median(values):{form}} ({low:{form}}–{high:{form}})"


def draw(speeds: dict[tuple, dict[int, float]], path: Path) -> None:
    """A bar chart: how many times as fast as Stable-Baselines3 each runner is, median over the pairs and bounds."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    cases = [case for case in CASES if best_of(speeds, case, "rungs")]
    if not cases:
        return
    figure, axes = plt.subplots(figsize=(1.6 * len(cases) + 2, 4), layout="constrained")
    for offset, (runner, about) in enumerate(RUNNERS.items()):
        for place, case in enumerate(cases):
            unit = best_of(speeds, case, "sb3") or best_of(speeds, case, "rungs")
            best = best_of(speeds, case, runner)
            if best and (heights := ratios(best[1], unit[1])):
                middle = statistics.median(heights)
                low, high = bounds(heights)
                error = [[middle - low], [high - middle]]
                x = place + 0.2 * (offset - 1.5)
                axes.bar(x, middle, 0.19, yerr=error, color=f"C{offset}", label=about if place == 0 else None)
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_ylabel("times as fast as Stable-Baselines3")
    axes.axhline(1, color="black", linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=len(RUNNERS))
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    """Measures, and reports and draws all there is; exit code 1 if a run failed."""
    for names, known in ((options.cases, CASES), (options.runners, RUNNERS)):
        if unknown := set(names) - set(known):
            fail(f"{', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    for name in ("pairs", "width"):
        if getattr(options, name) < 0:
            fail(f"--{name} must not be below 0")
    if min(options.threads, default=1) < 1:
        fail("--threads must be above 0")
    for path in (options.out, options.chart):
        if not path.parent.is_dir():
            fail(f"there is no folder {path.parent} for {path.name}")
    failed = (profile_all if options.profile else measure_all)(options)
    report(read(options.out))
    report_profile(profile_of(options))
    draw(read(options.out), options.chart)
    if failed:
        print(f"{failed} run{'s' if failed > 1 else ''} failed", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    if chosen.worker:
        described = json.loads(chosen.worker)
        workers = {"limit": run_limit, "profile": run_profile}
        print(workers.get(described["runner"], take_turns)(described))
    else:
        main(chosen)
