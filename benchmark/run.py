"""Fills the grid of experiments.py: each script on each environment with each seed, one process a run.

    python benchmark/run.py --dry-run                                     # the command lines, to copy one
    python benchmark/run.py --suites classic --scripts ppo dqn            # a part of the grid, a run on every core
    python benchmark/run.py --envs HalfCheetah-v5 --seeds choose --flags="--learning-rate 1e-3"
    python benchmark/run.py --suites mujoco --track                       # on Weights & Biases too
    python benchmark/run.py --suites mujoco --ray auto                    # on a Ray cluster (pip install ray)

What is done is skipped, what was cut off goes on from its checkpoint, so the same command again does what is left; only
a run whose checkpoint is damaged fails until its folder is deleted. A run is known by its flags, not by the text of its
script: after a change of a script that alters results, name another --runs-dir. Two of them may share a folder, even
from two machines. Ctrl-C stops every run with a checkpoint. Finished runs lose theirs.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro
from collect import fail, is_finished, read_json, read_rows, settings_hash
from experiments import EXPERIMENTS, Experiment, seeds_of, select

try:
    import fcntl
except ImportError:
    fcntl = None  # Windows: no protection from a second run.py in the same folder

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    suites: tuple[str, ...] = ()  # classic, box2d, mujoco, tianshou, mujoco-1m, ablation; all if none is named
    scripts: tuple[str, ...] = ()  # names of scripts, without .py
    envs: tuple[str, ...] = ()  # ids of environments
    variants: tuple[str, ...] = ()  # names of variants in the ablation
    seeds: str = "report"  # report, choose (collect.py and plot.py --tuning), or numbers and ranges such as 1,11-15
    flags: str = ""  # more flags for the scripts, --flags="--device cuda"; they win
    runs_dir: Path = Path("runs/benchmark")  # where the runs are; with --ray on a disk that all machines share
    workers: int = 0  # runs at the same time; 0 for one on each core
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project_name: str = "rungs"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    ray: str = ""  # address of a Ray cluster, `auto` for the one that this machine is in
    cpus_per_run: float = 1.0  # CPUs that a run takes of the Ray cluster
    gpus_per_run: float = 0.0  # GPUs that a run takes of the Ray cluster; 0.25 puts four runs on one
    dry_run: bool = False  # print the command lines and do nothing


class Job(NamedTuple):
    """One run of the grid."""

    folder: str  # of this run alone: its log, what it was made with, and the folder that the script makes
    script: str
    command: list[str]  # the script's flags
    env: dict[str, str]  # variables beside those of the process
    about: dict  # for collect.py
    edits: tuple = ()  # of the script's text, in an ablation

    @property
    def title(self) -> str:
        variant = self.about["variant"] and f" ({self.about['variant']})"
        return f"{self.script} {self.about['env_id']} {self.about['steps']:,} steps{variant} seed {self.about['seed']}"


def settings_of(script: str, flags: list[str], edits: tuple = ()) -> tuple[int, str]:
    """Steps and the hash of the settings that the flags make of the script, which an ablation may have edited."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    args = {"script": script} | asdict(tyro.cli(importlib.import_module(script).Args, args=flags, prog=f"{script}.py"))
    if not args["eval_episodes"]:
        fail("--eval-episodes 0 leaves a run without a result")
    return args["total_timesteps"], settings_hash(args, edits)


def plan(options: Options) -> list[tuple[Experiment, int, list[str]]]:
    """The experiments and seeds that the options name, seed by seed, each with its flags."""
    chosen = EXPERIMENTS
    try:
        for names, field in (
            (options.suites, "suite"),
            (options.scripts, "script"),
            (options.envs, "env_id"),
            (options.variants, "variant"),
        ):
            chosen = select(names, field, chosen)
        runs = [(e, seed) for e in chosen for seed in seeds_of(options.seeds, e)]
    except ValueError as error:
        fail(str(error))
    if not runs:
        fail("nothing in the grid is all of that; see --dry-run")
    try:
        more = shlex.split(options.flags)
    except ValueError as error:
        fail(f"--flags {options.flags}: {error}")
    for flag in more:
        if (name := flag.partition("=")[0].replace("_", "-")) in ("--env-id", "--seed", "--resume", "--runs-dir"):
            fail(f"--flags {options.flags}: {name} is the grid's own; see --envs, --seeds and --runs-dir")
    return [(e, seed, e.command(seed) + more) for e, seed in sorted(runs, key=lambda run: run[1])]


def jobs_of(options: Options) -> list[Job]:
    """The runs of the plan; the same one twice only once."""
    jobs, named = {}, {}
    for experiment, seed, flags in plan(options):
        if experiment not in named:
            steps, settings = settings_of(experiment.script, flags, experiment.edits)
            # Flags that change the result make a variant, which does not mix with the grid's own runs.
            own = settings_of(experiment.script, experiment.command(seed), experiment.edits)[1]
            changed = options.flags and own != settings
            variant = " ".join(filter(None, [experiment.variant, options.flags if changed else ""]))
            named[experiment] = settings, replace(experiment, steps=steps, variant=variant)
        settings, cell = named[experiment]
        name = re.sub(r"[^\w.-]+", "-", cell.name)[:150] + f"__{seed}__{settings}"
        about = {"script": cell.script, "env_id": cell.env_id, "steps": cell.steps, "variant": cell.variant}
        about |= {"seed": seed, "settings": settings}
        about["flags"] = " ".join(filter(None, [experiment.flags, options.flags]))
        command = [*flags, "--runs-dir", name]  # the run's process starts in the folder above
        if options.track:
            command += ["--track", "--wandb-project-name", options.wandb_project_name, "--wandb-group", cell.name]
            command += ["--wandb-entity", options.wandb_entity] if options.wandb_entity else []
        tags = [experiment.suite, experiment.script, experiment.env_id, *filter(None, [experiment.variant])]
        env = {"OMP_NUM_THREADS": "1", "WANDB_TAGS": ",".join(tags)}
        jobs[name] = Job(str(options.runs_dir.resolve() / name), experiment.script, command, env, about, cell.edits)
    return list(jobs.values())


def made_with(script: str) -> dict[str, str]:
    """Commit, versions and kind of machine; neither host name nor path."""

    def git(*arguments: str) -> str:
        with contextlib.suppress(OSError):  # there may be none
            return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()
        return ""

    commit, changed = git("rev-parse", "--short=10", "HEAD"), git("status", "--porcelain", f"{script}.py")
    versions = [f"python {platform.python_version()}"]
    for package in ("torch", "gymnasium", "numpy", "mujoco", "box2d"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = re.findall(r"^(.+?)\s*: *(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        about = dict(lines)
        if "model name" in about:
            cpu = f"{about['model name']} (family {about.get('cpu family')}, model {about.get('model')})"
    machine = f"{cpu}, {os.cpu_count()} cores"
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        machine += f", {len(gpus)} {gpus[0]}" if gpus else ""
    return {"commit": commit + ("+changes" if changed else ""), "versions": ", ".join(versions), "machine": machine}


def edited(script: str, edits: tuple[tuple[str, str], ...]) -> str:
    """The text of a script with the edits of an ablation; ValueError if one does not fit exactly one place."""
    text = (ROOT / f"{script}.py").read_text()
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{script}.py has {text.count(old)} times what an ablation replaces: {old!r}")
        text = text.replace(old, new)
    return text


def finish(folder: Path) -> bool:
    """Whether the run in a job's folder is finished; if so, its checkpoint goes: it may hold a buffer of gigabytes."""
    for agent in folder.glob("*/agent.pt"):
        if is_finished(read_json(agent.parent / "args.json"), read_rows(agent.parent)):
            (agent.parent / "checkpoint.pt").unlink(missing_ok=True)
            return True
    return False


def execute(job: Job, stop: threading.Event) -> str:
    """Does a run, or what is left of it: `done`, `failed`, `stopped`, or `busy` if another process is at it."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            # The script inherits the lock: even if this process dies, nobody else starts the run while it lives.
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop.wait(2)
            return "busy"
        if finish(folder):
            return "done"
        saved = [*folder.glob("*/checkpoint.pt"), *folder.glob("*/agent.pt")]
        made, before = made_with(job.script), read_json(folder / "run.json") if saved else {}
        for name, now in made.items():
            if name in before:  # a run that goes on with another commit or elsewhere has both
                made[name] = before[name] if before[name].endswith(now) else f"{before[name]}, then {now}"
        (folder / "run.json.part").write_text(json.dumps(job.about | made, indent=2))
        (folder / "run.json.part").replace(folder / "run.json")  # never half of it: it says which variant this is
        script = ROOT / f"{job.script}.py"
        if job.edits:
            script = folder / script.name
            script.write_text(edited(job.script, job.edits))
        command = [sys.executable, str(script), *job.command]
        if saved:
            newest = max(saved, key=lambda path: path.stat().st_mtime).parent
            command += ["--resume", f"{folder.name}/{newest.name}"]
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=folder.parent,
                env=os.environ | job.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal must not reach it beside our SIGTERM
                **({"pass_fds": [lock.fileno()]} if fcntl else {}),
            )
            try:
                while process.poll() is None and not stop.wait(0.2):
                    pass
            finally:  # in a Ray worker a cancelled task gets a KeyboardInterrupt
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        return "done" if finish(folder) else "stopped" if stop.is_set() else "failed"


def progress(job: Job) -> int | None:
    """The step that a run has come to; None if nothing was heard of it for ten minutes."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):  # no row yet, or half of one
        newest = max(Path(job.folder).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
        if time.time() - newest.stat().st_mtime < 600:
            with newest.open("rb") as file:
                file.seek(max(0, newest.stat().st_size - 4096))
                return json.loads(file.read().splitlines()[-1])["global_step"]
    return None


class Table:
    """What runs and what is left, drawn over itself once a second; nothing if stdout is no terminal."""

    def __init__(self):
        self.live, self.height, self.start = sys.stdout.isatty(), 0, time.monotonic()

    def say(self, line: str) -> None:
        """A line that stays, above the table."""
        self.clear()
        print(line, flush=True)

    def clear(self) -> None:
        if self.height:
            print(f"\x1b[{self.height}A\x1b[J", end="")
        self.height = 0

    def draw(self, running: list[Job], waiting: list[Job], ended: dict[str, list[Job]]) -> None:
        if not self.live:
            return
        width, most = shutil.get_terminal_size()
        steps = [(job, progress(job)) for job in running]
        lines = [f"  {job.title:60} {step:>12,}" for job, step in steps if step is not None]
        silent = [job for job, step in steps if step is None]  # without a row yet, or in the queue of Ray
        left = Counter(job.title.split(" seed ")[0] for job in [*silent, *waiting])
        all_jobs = {"running": lines, "starting or queued": silent, "waiting": waiting} | ended
        counts = ", ".join(f"{len(jobs)} {name}" for name, jobs in all_jobs.items() if jobs)
        lines = lines[: most - 4] + [f"{counts}; {(time.monotonic() - self.start) / 60:.0f} minutes"]
        lines += ["left: " + ", ".join(f"{title} ×{count}" for title, count in left.items())] if left else []
        self.clear()
        print("\n".join(line[: width - 1] for line in lines), flush=True)
        self.height = len(lines)


def fill(jobs: list[Job], submit, workers: int, stop: threading.Event, cancel=lambda future: None) -> dict:
    """Does the jobs, at most `workers` at a time; `submit` returns a Future of a job's outcome."""
    table, waiting, running = Table(), deque(jobs), {}
    ended = {"done": [], "failed": [], "stopped": []}
    while running or (waiting and not stop.is_set()):
        while waiting and len(running) < workers and not stop.is_set():
            job = waiting.popleft()
            running[submit(job)] = job
        table.draw(list(running.values()), list(waiting), ended)
        for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            error = future.exception()
            outcome = future.result() if error is None else "stopped" if stop.is_set() else "failed"
            if outcome == "busy":
                waiting.append(job)
                continue
            ended[outcome].append(job)
            table.say(f"{outcome:8} {job.title}" + (f": {error}" if outcome == "failed" and error else ""))
        if stop.is_set() and cancel:
            table.say("stopping; what runs leaves a checkpoint")
            for future in running:
                cancel(future)
            cancel = None
    table.clear()
    ended["left"] = list(waiting)
    return ended


def fill_here(jobs: list[Job], workers: int, stop: threading.Event) -> dict:
    """Does the jobs on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = workers or cores
    with ThreadPoolExecutor(workers) as pool:
        try:
            return fill(jobs, lambda job: pool.submit(execute, job, stop), workers, stop)
        finally:
            stop.set()  # whatever happened, no run is left behind


def fill_ray(jobs: list[Job], options: Options, stop: threading.Event) -> dict:
    """Does the jobs on a Ray cluster, whose machines have this repository and the runs' folder at the same paths."""
    try:
        import ray
    except ImportError:
        fail("--ray needs Ray: pip install ray")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=options.ray, log_to_driver=False, logging_level="ERROR")
    except Exception as error:
        fail(f"--ray {options.ray}: {str(error).splitlines()[0]}")
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own there, which stops no run in order

    # A task whose machine or worker dies is tried again elsewhere, and goes on from the run's checkpoint.
    @ray.remote(num_cpus=options.cpus_per_run, num_gpus=options.gpus_per_run, max_retries=10)
    def task(benchmark: str, job: tuple) -> str:
        sys.path.insert(0, benchmark)
        import run

        return run.execute(run.Job(*job), threading.Event())

    tasks = {}

    def submit(job: Job) -> Future:
        reference = task.remote(str(Path(__file__).resolve().parent), tuple(job))
        future = reference.future()
        tasks[future] = reference
        return future

    try:
        workers = options.workers or len(jobs)  # all are handed over at once: the cluster has its own queue
        return fill(jobs, submit, workers, stop, lambda future: ray.cancel(tasks[future]))
    finally:
        ray.shutdown()


def main(options: Options) -> None:
    """Fills the part of the grid that the options name; exit code 1 if a run failed."""
    if options.workers < 0:
        fail("--workers must not be below 0")
    jobs = jobs_of(options)  # flags that a script refuses end it here
    if options.dry_run:
        for experiment, _, flags in plan(options):
            edits = f", an edit of the script: {experiment.variant}" if experiment.edits else ""
            line = f"python {experiment.script}.py {shlex.join(flags)}   # {experiment.suite}: {experiment.source}"
            print(line + edits)
        return
    try:
        options.runs_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--runs-dir {options.runs_dir}: {error}")
    stop, signals = threading.Event(), []
    left = [job for job in jobs if not finish(Path(job.folder))]
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are done", flush=True)

    def on_signal(number: int, frame) -> None:
        """The first one stops the runs, a second one this program."""
        signals.append(number)
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    ended = fill_ray(left, options, stop) if options.ray else fill_here(left, options.workers, stop)
    counts = ", ".join(f"{len(jobs)} {outcome}" for outcome, jobs in ended.items() if jobs)
    print(f"{counts or 'nothing was left'}; runs in {options.runs_dir}")
    for job in ended["failed"]:
        log = options.runs_dir / Path(job.folder).name / "log.txt"
        print(f"failed: {job.title}" + (f"; its log: {log}" if log.exists() else ""))
    if signals:
        raise SystemExit(128 + signals[0])
    raise SystemExit(1 if ended["failed"] else 0)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
