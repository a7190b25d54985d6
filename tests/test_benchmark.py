"""The benchmark: its grid, its runner, its tables and figures."""

import contextlib
import csv
import dataclasses
import importlib
import importlib.util
import json
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, SCRIPTS, environment

BENCHMARK = ROOT / "benchmark"
EVALUATION = {"eval/episodic_return": 10.0, "eval/episodic_return_std": 2.0, "eval/episodes": 20}


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))


def module(name: str):
    return importlib.import_module(name)


def start(*arguments, cwd) -> subprocess.Popen:
    """benchmark/run.py as a user starts it."""
    command = [sys.executable, BENCHMARK / "run.py", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=cwd, env=environment(), start_new_session=True, **pipes)


def wait_for(condition, seconds: float = 60):
    """What `condition` returns, once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
    return found


def job(runs_dir: Path, *flags: str, script: str = "ppo", env_id: str = "CartPole-v1", seed: int = 7):
    """A job for run.execute."""
    about = {"env_id": env_id, "seed": seed, "variant": "", "steps": 3000, "settings": "s", "flags": ""}
    command = ["--env-id", env_id, "--seed", str(seed), "--runs-dir", "job", *flags]
    return module("run").Job(str(runs_dir / "job"), script, command, environment(), about)


SHORT = ("--total-timesteps", "1500", "--eval-episodes", "2")


# ----- the grid -------------------------------------------------------------------------------------------------------


def test_every_experiment_has_flags_that_its_script_takes():
    experiments = module("experiments")
    names = [experiment.name for experiment in experiments.EXPERIMENTS]
    settings = [module("run").settings_of(e.script, e.command(seed=11)) for e in experiments.EXPERIMENTS]
    assert len(set(zip(names, settings))) == len(names)
    for e in experiments.EXPERIMENTS:
        args = tyro.cli(module(e.script).Args, args=e.command(seed=11))
        assert (args.env_id, args.seed, args.total_timesteps, args.eval_episodes) == (e.env_id, 11, e.steps, 20)
        assert e.env_id in experiments.ENVIRONMENTS and e.script in SCRIPTS
        assert e.source.split()[0].strip(",") in ("after", "ours", "defaults")
        assert not set(experiments.seeds_of("report", e)) & set(experiments.CHOOSE)
        if e.script == "ppo":
            assert args.num_envs * args.num_steps % args.num_minibatches == 0


def test_settings_are_the_same_whatever_does_not_change_the_result():
    settings_of = module("run").settings_of
    usual = settings_of("ppo", [])
    assert settings_of("ppo", ["--seed", "3", "--num-threads", "2", "--track", "--runs-dir", "x"]) == usual
    assert settings_of("ppo", ["--learning-rate", "1e-3"]) != usual
    assert settings_of("a2c", []) != usual


def test_hidden_sizes_at_the_default_leave_the_settings_as_they_were_before_the_flag():
    settings_of, settings_hash = module("run").settings_of, module("collect").settings_hash
    for script in SCRIPTS:
        args = {"script": script} | dataclasses.asdict(importlib.import_module(script).Args())
        sizes = args.pop("hidden_sizes")
        assert settings_of(script, ["--hidden-sizes", *map(str, sizes)])[1] == settings_hash(args)
        assert settings_of(script, ["--hidden-sizes", "8", "8"])[1] != settings_hash(args)


def test_dry_run_prints_lines_that_the_scripts_take(capsys):
    run = module("run")
    run.main(run.Options(suites=("classic",), seeds="11-12", dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 48 and "--seed 11 " in lines[0]
    for line in lines:
        python, script, *flags = line.split("   #")[0].split()
        assert python == "python" and (ROOT / script).exists()
        tyro.cli(module(script.removesuffix(".py")).Args, args=flags)


@pytest.mark.parametrize(
    "options, message",
    (
        ({"envs": ("HalfCheetah-v4",)}, "did you mean HalfCheetah-v5?"),
        ({"suites": ("xyz",)}, "there are classic, box2d, mujoco"),
        ({"scripts": ("dqn",), "envs": ("Hopper-v5",)}, "nothing in the grid"),
        ({"seeds": "1-x"}, "report, choose"),
        ({"seeds": "11-"}, "report, choose"),
        ({"workers": -1}, "--workers must not be below 0"),
        ({"flags": "it's"}, "--flags it's: No closing quotation"),
        ({"flags": "--seed 3"}, "--seed is the grid's own"),
        ({"flags": "--gamma 0.9 --env_id=Acrobot-v1"}, "--env-id is the grid's own"),
        ({"flags": "--eval-episodes 0", "dry_run": True}, "without a result"),
        ({"scripts": ("ppo",), "envs": ("CartPole-v1",), "ray": "127.0.0.1:9"}, "--ray"),
    ),
)
def test_bad_input_to_run_is_refused_in_one_line(options, message, capsys, monkeypatch, tmp_path):
    run = module("run")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as end:
        run.main(run.Options(runs_dir=tmp_path, **options))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_flags_that_a_script_refuses_end_a_dry_run_too(capsys):
    run = module("run")
    with pytest.raises(SystemExit) as end:
        run.main(run.Options(scripts=("ppo",), envs=("CartPole-v1",), flags="--nope 1", dry_run=True))
    assert end.value.code == 2 and capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_made_is_refused_before_any_run(capsys, tmp_path):
    run = module("run")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        run.main(run.Options(runs_dir=tmp_path / "file/runs", scripts=("ppo",), envs=("CartPole-v1",)))
    error = capsys.readouterr().err
    assert end.value.code == 2 and "--runs-dir" in error and error.count("\n") == 1


# ----- the runner -----------------------------------------------------------------------------------------------------


def test_one_failure_does_not_stop_the_rest_and_what_is_done_is_not_done_again(capsys, monkeypatch, tmp_path):
    run, experiments = module("run"), module("experiments")
    good = experiments.Experiment("classic", "ppo", "CartPole-v1", 1000, "", "test", 1)
    bad = dataclasses.replace(good, env_id="Nowhere-v1")
    monkeypatch.setattr(run, "EXPERIMENTS", [bad, good])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    options = run.Options(runs_dir=tmp_path / "runs", workers=1, flags="--eval-episodes 2")
    codes = []
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            run.main(options)
        codes.append(end.value.code)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    out = capsys.readouterr().out
    assert codes == [1, 1]
    assert (
        out.count("done     ppo CartPole-v1 1,000 steps (--eval-episodes 2) seed 11") == 1
        and "1 of 2 runs are done" in out
    )
    (log,) = {line.split("its log: ")[1] for line in out.splitlines() if line.startswith("failed: ppo Nowhere-v1")}
    assert "Nowhere" in Path(log).read_text()
    (agent,) = tmp_path.rglob("agent.pt")
    assert agent.parent.name.startswith("CartPole-v1__ppo__11__")
    about = json.loads((agent.parent.parent / "run.json").read_text())
    assert about["variant"] == "--eval-episodes 2" and "torch" in about["versions"] and about["machine"]
    assert os.uname().nodename not in json.dumps(about) and str(tmp_path) not in json.dumps(about)


def test_what_is_left_of_a_run_that_was_cut_off_at_its_end(monkeypatch, tmp_path):
    """Its checkpoint goes when it is found finished; a folder without flags or with bytes that are no text is none."""
    run = module("run")
    agent = make_run(tmp_path, evaluation(4000))
    (agent / "checkpoint.pt").touch()
    assert run.finish(tmp_path) and not (agent / "checkpoint.pt").exists()
    (agent / "args.json").unlink()
    assert not run.finish(tmp_path)
    folder = make_run(tmp_path / "torn", evaluation(4000))
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe" + (folder / "metrics.jsonl").read_bytes())
    assert not run.finish(tmp_path / "torn")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.made_with("ppo")["commit"] == "", "there is no git"


def test_ctrl_c_stops_with_checkpoints_and_the_same_command_goes_on(tmp_path):
    flags = "--total-timesteps 40000 --eval-episodes 2 --checkpoint-every 10000"
    command = ("--scripts", "ppo", "--envs", "CartPole-v1", "--seeds", "3", "--workers", "1", f"--flags={flags}")
    first = start(*command, cwd=tmp_path)
    wait_for(lambda: [p for p in tmp_path.rglob("metrics.jsonl") if p.stat().st_size])
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does, to every process that it started
    out, err = first.communicate(timeout=30)
    assert first.returncode == 130 and "1 stopped" in out and "left" not in out and err == ""
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")

    second = start(*command, cwd=tmp_path)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and "1 done" in out and err == ""
    assert not checkpoint.exists() and (checkpoint.parent / "agent.pt").exists()
    log = (checkpoint.parent.parent / "log.txt").read_text()
    assert log.count("from step 0 to") == 1 and log.count(" to 40,000") == 2
    steps = [json.loads(line)["global_step"] for line in (checkpoint.parent / "metrics.jsonl").open()]
    assert steps == sorted(steps)


def test_a_run_that_goes_on_elsewhere_names_both_machines(monkeypatch, tmp_path):
    run = module("run")
    made = {"commit": "a", "versions": "torch 1", "machine": "old"}
    monkeypatch.setattr(run, "made_with", lambda script: dict(made))

    def result(machine: str, *flags: str) -> dict:
        made["machine"] = machine
        run.execute(job(tmp_path, "--eval-episodes", "2", *flags), threading.Event())
        return json.loads((tmp_path / "job/run.json").read_text())

    assert result("old", "--total-timesteps", "none")["machine"] == "old"
    assert result("new", "--total-timesteps", "none")["machine"] == "new", "the first try left nothing behind"
    result("old", "--total-timesteps", "2000", "--checkpoint-every", "1000")
    (agent,) = tmp_path.rglob("agent.pt")
    for machine in ("new", "new"):  # its evaluation was cut off
        rows = (agent.parent / "metrics.jsonl").read_text().splitlines(keepends=True)
        (agent.parent / "metrics.jsonl").write_text("".join(row for row in rows if "eval/" not in row))
        about = result(machine, "--total-timesteps", "2000", "--checkpoint-every", "1000")
        assert (about["machine"], about["commit"]) == ("old, then new", "a")


def test_a_run_whose_runner_was_killed_is_left_to_end_and_not_done_twice(tmp_path):
    run = module("run")
    work = job(tmp_path, "--total-timesteps", "20000", "--eval-episodes", "2")
    code = f"import run, threading; run.execute(run.Job(*{tuple(work)!r}), threading.Event())"
    runner = subprocess.Popen([sys.executable, "-c", code], env=environment(PYTHONPATH=str(BENCHMARK)))
    wait_for(lambda: list(tmp_path.rglob("metrics.jsonl")))
    runner.kill()
    runner.wait()
    at_once = threading.Event()
    at_once.set()
    assert run.execute(work, at_once) == "busy"

    def outcome() -> str | None:
        result = run.execute(work, at_once)
        return result if result != "busy" else None

    assert wait_for(outcome) == "done" and len(list(tmp_path.rglob("agent.pt"))) == 1
    assert run.execute(work, threading.Event()) == "done"
    assert (tmp_path / "job/log.txt").read_text().count("Evaluation at step") == 1


def test_a_busy_run_is_tried_again_after_the_others(tmp_path):
    run = module("run")
    jobs = [job(tmp_path, seed=seed) for seed in (1, 2, 3)]
    outcomes, tried = {1: ["done", "busy"], 2: ["failed"], 3: ["done"]}, []

    def submit(job):
        tried.append(job.about["seed"])
        future = run.Future()
        future.set_result(outcomes[job.about["seed"]].pop())
        return future

    ended = run.fill(jobs, submit, workers=1, stop=threading.Event())
    assert tried == [1, 2, 3, 1] and [len(ended[name]) for name in ("done", "failed", "stopped", "left")] == [
        2,
        1,
        0,
        0,
    ]


def test_the_table_shows_what_runs_and_what_is_left(capsys, monkeypatch, tmp_path):
    run = module("run")
    monkeypatch.setattr(run.sys.stdout, "isatty", lambda: True, raising=False)
    running, waiting = job(tmp_path), [job(tmp_path, seed=seed) for seed in (8, 9)]
    folder = Path(running.folder, "a run")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"global_step": 1024}\n')
    table = run.Table()
    table.draw([running], waiting, {"done": [running], "failed": []})
    table.draw([], [], {})
    out = capsys.readouterr().out
    assert (
        "ppo CartPole-v1 3,000 steps seed 7" in out
        and " 1,024\n" in out
        and "1 running, 2 waiting, 1 done; 0 min" in out
    )
    assert "left: ppo CartPole-v1 3,000 steps ×2" in out and "\x1b[3A" in out
    table.draw([running, waiting[0]._replace(folder=str(tmp_path / "queued"))], [], {})  # Ray takes more than it runs
    out = capsys.readouterr().out
    assert "1 running, 1 starting or queued; 0 min" in out and "left: ppo CartPole-v1 3,000 steps ×1" in out
    for text in ("", '{"global_st'):
        (folder / "metrics.jsonl").write_text(text)
        assert run.progress(running) is None


def test_track_names_group_and_tags(monkeypatch, tmp_path):
    run = module("run")
    options = run.Options(scripts=("ppo",), suites=("ablation",), variants=("one-env",), seeds="1", track=True)
    (work,) = run.jobs_of(dataclasses.replace(options, runs_dir=tmp_path))
    assert "--track" in work.command and work.env["WANDB_TAGS"] == "ablation,ppo,HalfCheetah-v5,one-env"
    assert work.command[work.command.index("--wandb-group") + 1] == "ppo__HalfCheetah-v5__1000000__one-env"


def test_a_tracked_run_has_its_group_and_tags(monkeypatch, tmp_path):
    run = module("run")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = run.Options(scripts=("ppo",), envs=("CartPole-v1",), seeds="1", track=True, runs_dir=tmp_path)
    (work,) = run.jobs_of(dataclasses.replace(options, flags="--total-timesteps 1024 --eval-episodes 1"))
    assert run.execute(work, threading.Event()) == "done"
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", log]
    shown = subprocess.run(inspect, env=environment(), capture_output=True, text=True, check=True).stdout
    (sent,) = (record["run"] for record in map(json.loads, shown.splitlines()) if record["type"] == "run")
    assert sent["run_group"].startswith("ppo__CartPole-v1__1024__") and sent["project"] == "rungs"
    assert sent["tags"][:3] == ["classic", "ppo", "CartPole-v1"]


@pytest.fixture
def edited_ppo(tmp_path):
    """Makes the module of ppo.py as a variant of the ablation has it, by the variant's name."""
    made = []

    def make(name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ppo.py").write_text(text)
        spec = importlib.util.spec_from_file_location(f"edited_{len(made)}", tmp_path / name / "ppo.py")
        script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        made.append(spec.name)
        spec.loader.exec_module(script)
        return script

    yield make
    for name in made:
        del sys.modules[name]


def edits_of(variant):
    return next(e.edits for e in module("experiments").EXPERIMENTS if e.variant == variant)


def minibatches_of(script, args, var=None):
    """The minibatches of an update on one rollout, in float64, by a policy that does not move."""
    torch.manual_seed(0)
    space = gym.spaces.Box(-1, 1, (2,), np.float32)
    obs_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    envs = SimpleNamespace(single_observation_space=obs_space, single_action_space=space, num_envs=2)
    agent = script.Agent(envs, args, torch.device("cpu")).double()
    if var is not None:
        agent.return_statistics.var[:] = var
    numbers = torch.randn(4, 8, 2, 3, dtype=torch.float64)
    done = torch.rand(8, 2) < 0.3
    rollout = script.Rollout(numbers[0], numbers[1, ..., :2], numbers[2, ..., 0], numbers[3], done, done)
    seen = []

    def take_step(agent, optimizer, batch, args):
        seen.append(batch)
        agent.critic.out.bias.data += 1.0  # as if V had learned
        return {"losses/approx_kl": torch.zeros(())}

    optimizer = torch.optim.SGD(agent.parameters(), lr=0.0)
    script.ppo_update(agent, optimizer, rollout, args, take_step)
    return seen, agent


def test_scaled_targets_are_returns_over_their_standard_deviation(edited_ppo):
    """The critic learns R / std, where A = R - std V of GAE; only then the variance takes up the returns."""
    script = edited_ppo("scaled-targets", module("run").edited("ppo", edits_of("scaled-targets")))
    args = script.Args(norm_reward=False, norm_obs=False, norm_adv=False, update_epochs=1, num_minibatches=1)
    ((_, _, _, value, target, advantage),), agent = minibatches_of(script, args, var=9.0)
    torch.testing.assert_close(3 * target, advantage + 3 * value)
    assert agent.return_statistics.var.item() == pytest.approx((3 * target).var(correction=0).item())


def test_advantages_of_every_pass_are_those_of_the_critic_as_it_is(edited_ppo):
    """Where V has grown by 1 everywhere, delta = r + gamma V' - V falls by 1 - gamma, by 1 where it ends."""
    script = edited_ppo("every-pass", module("run").edited("ppo", edits_of("advantages-every-pass")))
    options = dict(norm_reward=False, norm_obs=False, norm_adv=False, update_epochs=2, num_minibatches=1)
    (first, second), _ = minibatches_of(script, script.Args(gae_lambda=0.0, gamma=0.9, **options))
    by_reward = [dict(zip(batch[0][:, 0].tolist(), zip(*(x.tolist() for x in batch[3:])))) for batch in (first, second)]
    falls = {round(by_reward[0][key][2] - by_reward[1][key][2], 6) for key in by_reward[0]}
    assert falls == {0.1, 1.0}
    for value, target, advantage in by_reward[1].values():
        assert target == pytest.approx(value + advantage)


def test_the_edits_of_an_ablation_change_a_script_that_still_trains(tmp_path, edited_ppo):
    run, experiments = module("run"), module("experiments").EXPERIMENTS
    texts = {"plain": (ROOT / "ppo.py").read_text()}
    texts |= {e.variant: run.edited(e.script, e.edits) for e in experiments if e.edits}
    assert {"default-init", "advantages-every-pass", "scaled-targets"} < set(texts)
    metrics = {}
    for name, text in texts.items():
        script = edited_ppo(name, text)
        args = script.Args(env_id="tests.envs:BoxTiny-v0", num_envs=2, num_steps=16, update_epochs=2, log_every=1)
        args = dataclasses.replace(args, total_timesteps=64, eval_episodes=0, norm_reward=False, runs_dir=str(tmp_path))
        rows = module("collect").read_rows(script.train(args))
        metrics[name] = [row["losses/value_loss"] for row in rows]
    del metrics["as-cleanrl"]  # what it edits is what no-bootstrap-at-time-limit edits
    assert len(set(map(tuple, metrics.values()))) == len(metrics) and all(map(len, metrics.values()))


def test_an_edit_that_fits_no_place_is_refused_and_one_that_fits_is_run(tmp_path):
    run = module("run")
    with pytest.raises(ValueError, match="0 times"):
        run.edited("ppo", (("no such text", ""),))
    with pytest.raises(ValueError, match="times"):
        run.edited("ppo", (("self", "this"),))
    assert run.settings_of("ppo", [], (("a", "b"),)) != run.settings_of("ppo", [])
    train = "    train(tyro.cli(Args, description=__doc__))"
    work = job(tmp_path, *SHORT)._replace(edits=((train, f"    print('edited')\n{train}"),))
    assert run.execute(work, threading.Event()) == "done"
    assert "edited" in Path(work.folder, "log.txt").read_text()


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_node_does_every_run_once(tmp_path):
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        flags = "--total-timesteps 60000 --eval-episodes 2 --checkpoint-every 5000"
        command = ("--scripts", "ppo", "--envs", "CartPole-v1", "--seeds", "1-4", f"--flags={flags}")
        driver = start(*command, "--ray", cluster.address, cwd=tmp_path)
        wait_for(lambda: len(list(tmp_path.rglob("checkpoint.pt"))) >= 2, 120)

        # A machine that goes down takes all its processes along, the scripts too.
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        family = [raylet, *raylet.children(recursive=True)]
        killed = [p.cmdline() for p in family if "ppo.py" in " ".join(p.cmdline())]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        cluster.remove_node(node, allow_graceful=False)
        out, err = driver.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert killed, "a run was under way on the node"
    assert driver.returncode == 0 and "4 done" in out, err
    runs = list(tmp_path.rglob("agent.pt"))
    assert sorted(path.parent.name.split("__")[2] for path in runs) == ["1", "2", "3", "4"]
    assert len(list(tmp_path.rglob("args.json"))) == 4, "none was begun twice"
    logs = [path.read_text() for path in tmp_path.rglob("log.txt")]
    assert all(log.count("from step 0 to") == 1 for log in logs)
    assert sum(log.count(" to 60,000") for log in logs) == 5, "the one that was killed went on from its checkpoint"


@pytest.mark.slow
def test_sigterm_stops_the_runs_on_a_ray_cluster_in_order(tmp_path):
    """Ray has a handler of its own, which ends the program at once."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        flags = "--total-timesteps 200000 --eval-episodes 2"
        command = ("--scripts", "ppo", "--envs", "CartPole-v1", "--seeds", "1", f"--flags={flags}")
        driver = start(*command, "--ray", cluster.address, cwd=tmp_path)
        wait_for(lambda: [p for p in tmp_path.rglob("metrics.jsonl") if p.stat().st_size], 120)
        driver.terminate()
        out, err = driver.communicate(timeout=60)
        wait_for(lambda: list(tmp_path.rglob("checkpoint.pt")))
    finally:
        cluster.shutdown()
    assert driver.returncode == 143 and "1 stopped" in out, err


# ----- tables and figures ---------------------------------------------------------------------------------------------


def make_run(folder: Path, *rows: dict, about: dict | None = None, script: str = "ppo", seed: int = 11, **args) -> Path:
    """A run's folder as the scripts leave it."""
    run = folder / f"CartPole-v1__{script}__{seed}__now"
    run.mkdir(parents=True)
    args = {"script": script, "env_id": "CartPole-v1", "seed": seed, "total_timesteps": 4000} | args
    (run / "args.json").write_text(json.dumps(args))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "agent.pt").touch()
    if about is not None:
        (folder / "run.json").write_text(json.dumps({"variant": "", "settings": "s"} | about))
    return run


def row(step: int, sps: float, episodes: int = 0, mean: float = 0.0) -> dict:
    result = {"global_step": step, "charts/SPS": sps, "charts/episodes": episodes}
    return result | ({"charts/episodic_return": mean} if episodes else {})


def evaluation(step: int, mean: float = 10.0) -> dict:
    return {"global_step": step} | EVALUATION | {"eval/episodic_return": mean}


def test_a_run_becomes_a_row_and_a_curve(tmp_path):
    collect = module("collect")
    rows = (row(50, 100, 1, 4.0), row(100, 50, 3, 8.0), row(2000, 1900), row(4096, 1048), evaluation(4096))
    make_run(tmp_path, *rows)
    (run,) = collect.read_folder(tmp_path)
    assert (run["script"], run["env_id"], run["steps"], run["seed"]) == ("ppo", "CartPole-v1", 4000, 11)
    assert (run["return"], run["return_std"], run["episodes"]) == (10.0, 2.0, 20)
    assert run["wall_s"] == pytest.approx(0.5 + 1 + 1 + 2) and run["steps_per_s"] == round(4096 / 4.5)
    assert run["curve"] == [7.0] + [""] * 39  # (1 × 4 + 3 × 8) / 4


def test_a_damaged_row_is_left_out_and_the_run_is_not(tmp_path):
    collect = module("collect")
    folder = make_run(tmp_path, row(1000, 100, 1, 4.0), row(2000, 100), row(4096, 1048), evaluation(4096))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for damaged in ('{"global_st', "7", "{}", "\x00\x00"):
        (folder / "metrics.jsonl").write_text("\n".join([lines[0], damaged, *lines[2:]]) + "\n")
        assert [r["global_step"] for r in collect.read_rows(folder)] == [1000, 4096, 4096]
        (run,) = collect.read_folder(tmp_path)
        assert run["return"] == 10.0 and module("run").finish(tmp_path)


def test_what_is_left_out_is_said(tmp_path, capsys):
    collect = module("collect")
    make_run(tmp_path / "torn", row(4000, 1), seed=14, about={})
    (make_run(tmp_path / "lost", evaluation(4000), seed=15).parent / "lock").touch()
    for seed in (1, 2):
        make_run(tmp_path / f"chosen{seed}", evaluation(4000), seed=seed, about={})
    assert collect.read_folder(tmp_path) == []
    said = capsys.readouterr().err
    assert "15__now, whose run.json is lost" in said and "14__now, not evaluated at the end" in said
    assert "2 finished runs on the seeds on which settings are chosen; --tuning takes them" in said
    assert said.count("\n") == 3
    assert len(collect.read_folder(tmp_path, tuning=True)) == 2


def test_only_finished_runs_of_reported_seeds_with_the_newest_settings_count(tmp_path):
    collect = module("collect")
    seeds = {"old": (11, "old"), "new": (11, "new"), "again": (11, "new"), "other": (12, "old"), "chosen": (3, "new")}
    for age, (name, (seed, settings)) in enumerate(seeds.items()):
        folder = make_run(tmp_path / name, evaluation(4000, mean=age), seed=seed, about={"settings": settings})
        os.utime(folder / "agent.pt", (1000 + age, 1000 + age))
    os.utime(tmp_path / "other/CartPole-v1__ppo__12__now/agent.pt", (900, 900))
    make_run(tmp_path / "short", evaluation(3000), seed=13, about={"settings": "new"})
    make_run(tmp_path / "torn", row(4000, 1), seed=14, about={"settings": "new"})
    assert [(run["seed"], run["return"]) for run in collect.read_folder(tmp_path)] == [(11, 2)]
    assert [run["seed"] for run in collect.read_folder(tmp_path, tuning=True)] == [3]
    make_run(tmp_path / "by hand", evaluation(4000), seed=2)
    assert [run["seed"] for run in collect.read_folder(tmp_path / "by hand")] == [2]


def test_tables_keep_what_they_have(tmp_path, capsys):
    collect = module("collect")
    for seed in (11, 12):
        make_run(tmp_path / f"a{seed}", row(2000, 10, 1, 5.0), evaluation(4000), seed=seed, about={})
    collect.main(collect.Options(tmp_path, out=tmp_path / "out"))
    before = (tmp_path / "out/results.csv").read_text()
    collect.main(collect.Options(tmp_path / "a11", out=tmp_path / "out"))
    assert (tmp_path / "out/results.csv").read_text() == before and before.count("\n") == 3
    assert (tmp_path / "out/curves.csv").read_text().count("5.0") == 2
    (tmp_path / "b").mkdir()
    make_run(tmp_path / "b", evaluation(4000, mean=50.0), seed=12, about={"settings": "other"})
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        collect.main(collect.Options(tmp_path / "b", out=tmp_path / "out"))
    error = capsys.readouterr().err
    assert end.value.code == 2 and "rows of ppo CartPole-v1 4000; --replace" in error and error.count("\n") == 1
    assert (tmp_path / "out/results.csv").read_text() == before, "nothing is lost"
    collect.main(collect.Options(tmp_path / "b", out=tmp_path / "out", replace=True))
    assert "left out: 2 runs of ppo CartPole-v1 4000 with other settings" in capsys.readouterr().err
    (only,) = collect.read_tables(tmp_path / "out")
    assert (only["seed"], only["return"]) == ("12", "50.0"), "the whole cell gave way to its new settings"
    with pytest.raises(SystemExit) as end:
        collect.main(collect.Options(tmp_path / "nowhere"))
    assert end.value.code == 2 and "no folder" in capsys.readouterr().err
    make_run(tmp_path / "c", evaluation(4000, mean=60.0), seed=12, about={"settings": "other"})
    collect.main(collect.Options(tmp_path / "c", out=tmp_path / "out"))
    assert "ppo CartPole-v1 4000 seed 12: 60.0 in the place of 50.0" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ("results.csv", "curves.csv"))
def test_a_table_without_the_other_is_not_written_over(lost, tmp_path, capsys):
    collect = module("collect")
    make_run(tmp_path / "a", evaluation(4000), seed=11, about={})
    make_run(tmp_path / "b", evaluation(4000), seed=12, about={})
    out = tmp_path / "out"
    collect.main(collect.Options(tmp_path / "a", out=out))
    (out / lost).unlink()
    (left,) = out.iterdir()
    before = left.read_text()
    with pytest.raises(SystemExit) as end:
        collect.main(collect.Options(tmp_path / "b", out=out))
    assert end.value.code == 2 and "not of the same runs" in capsys.readouterr().err
    assert left.read_text() == before and list(out.iterdir()) == [left]


def test_tables_that_cannot_be_read_or_written_are_refused_and_stay_whole(tmp_path, capsys):
    collect, out = module("collect"), tmp_path / "out"
    make_run(tmp_path / "a", evaluation(4000), seed=11, about={})
    collect.main(collect.Options(tmp_path / "a", out=out))
    before = (out / "results.csv").read_text()
    (out / "curves.csv.part").mkdir()
    for text, message in ((before, "cannot be written"), (before.replace("10.0,", "ten,"), "results.csv: could not")):
        (out / "results.csv").write_text(text)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            collect.main(collect.Options(tmp_path / "a", out=out))
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.count("\n") == 1
        assert (out / "results.csv").read_text() == text and not (out / "results.csv.part").exists()


def test_seeds_of_a_range():
    experiments = module("experiments")
    hopper = next(e for e in experiments.EXPERIMENTS if (e.script, e.env_id) == ("ppo", "Hopper-v5"))
    assert experiments.seeds_of("1,11-13,1", hopper) == [1, 11, 12, 13]
    assert experiments.seeds_of("report", hopper) == [14, 15, 16, 17, 18]
    with pytest.raises(ValueError, match="3-1 goes backwards"):
        experiments.seeds_of("3-1", hopper)


def test_a_run_without_an_evaluation_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        module("run").settings_of("ppo", ["--eval-episodes", "0"])
    assert end.value.code == 2 and "without a result" in capsys.readouterr().err


def test_published_rows_belong_to_the_grid():
    lines = (BENCHMARK / "published.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert header[:4] == ["script", "env_id", "steps", "published_env_id"]
    cells = [tuple(line.split(",")[:3]) for line in lines[1:]]
    known = {(e.script, e.env_id, str(e.steps)) for e in module("experiments").EXPERIMENTS}
    assert len(set(cells)) == len(cells) and set(cells) <= known


@pytest.fixture
def plot():
    for name in ("pandas", "matplotlib"):
        pytest.importorskip(name)
    return module("plot")


def fake_tables(folder: Path) -> None:
    """Tables of two scripts on two environments; sac's return is always above td3's."""
    runs = []
    for script, mean in (("td3", 3000.0), ("sac", 5000.0)):
        for env_id in ("HalfCheetah-v5", "Hopper-v5"):
            for seed in (11, 12, 14):
                run = {"script": script, "env_id": env_id, "steps": 100_000, "variant": "", "seed": seed}
                run |= {"return": mean + seed, "steps_per_s": 200, "curve": ["", *range(39)]}
                runs.append(dict.fromkeys(module("collect").RESULT, "") | run)
    runs.append(runs[-1] | {"variant": "no-autotune", "seed": 3})
    module("collect").write_tables(folder, runs)


def test_figures_and_tables(plot, tmp_path, capsys):
    pytest.importorskip("rliable")
    fake_tables(tmp_path)
    plot.main(plot.Options(tables=tmp_path, out=tmp_path / "figures", reps=50))
    text = (tmp_path / "figures/results.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "| HalfCheetah-v5 | td3 | 100,000 | 3,012 (3,011 to 3,014) | 11–12, 14 | 5,336 ± 376.5, 10 runs |" in text
    assert "| Hopper-v5 | sac | 100,000 | **5,012** (5,011 to 5,014) | 11–12, 14 | 2,613 ± 990.8, 10 runs |" in text
    variants = (tmp_path / "figures/variants.md").read_text()
    assert "| Hopper-v5 | sac: `no-autotune` | 100,000 | 5,014 | 3* |" in variants and "seeds of 1–5, on" in variants
    assert "| Hopper-v5 | sac | 100,000 | **5,012** (5,011 to 5,014) | 11–12, 14 |" in variants
    assert "td3" not in variants and "HalfCheetah" not in variants, "which have no variants"
    assert "no-autotune" not in text and "settings were chosen" not in text
    one = plot.load(plot.Options(tables=tmp_path)).query("env_id == 'Hopper-v5' and script == 'sac' and seed == 11")
    single = plot.results_table(one, plot.pd.read_csv(plot.Options().published))
    assert "| 5,011 | 11 |" in single and "settings were chosen" not in single
    bad = plot.pd.read_csv(plot.Options().published).assign(return_mean=plot.ENVIRONMENTS["Hopper-v5"][1] - 1)
    assert "**" not in plot.results_table(plot.load(plot.Options(tables=tmp_path)).query("env_id == 'Hopper-v5'"), bad)
    assert "| sac | 1.00 (1.00 to 1.00) | 3 |" in text and "| sac > td3 | 1.00 (1.00 to 1.00) |" in text
    for name in ("curves-mujoco.png", "published.png", "variants.png"):
        assert (tmp_path / "figures" / name).stat().st_size > 10_000


def test_figures_of_a_folder_of_runs_go_there_and_variants_alone_are_shown(plot, tmp_path, capsys):
    pytest.importorskip("rliable")
    committed = {path: path.stat().st_mtime_ns for path in (BENCHMARK / "figures").iterdir()}
    make_run(tmp_path / "runs/a", row(2000, 10, 1, 5.0), evaluation(4000), about={"variant": "--gamma 0.9"})
    plot.main(plot.Options(runs_dir=tmp_path / "runs", reps=10))
    assert "| CartPole-v1 | ppo: `--gamma 0.9` | 4,000 | 10.0 | 11 |" in capsys.readouterr().out
    assert (tmp_path / "runs/figures/results.md").exists()
    assert {path: path.stat().st_mtime_ns for path in (BENCHMARK / "figures").iterdir()} == committed


def test_curves_of_few_seeds_are_dotted(plot, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plot.plt, "close", shown.append)
    fake_tables(tmp_path)
    runs = plot.load(plot.Options(tables=tmp_path)).query("env_id == 'HalfCheetah-v5'")
    plot.draw_curves(runs[(runs["script"] == "sac") | (runs["seed"] != 11)], tmp_path / "curves.png")
    (axis,) = shown[0].axes
    assert {line.get_color(): line.get_linestyle() for line in axis.lines} == {
        plot.COLORS["td3"]: ":",  # two seeds
        plot.COLORS["sac"]: "-",
    }
    assert axis.get_xlabel() == "steps"


def test_what_the_figures_need_is_named_where_it_is_missing():
    code = "import sys, runpy; sys.modules['matplotlib'] = None; sys.path.insert(0, {0!r}); runpy.run_path({1!r})"
    command = [sys.executable, "-c", code.format(str(BENCHMARK), str(BENCHMARK / "plot.py"))]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert "no matplotlib: pip install -r benchmark/requirements.txt" in ended.stderr


def test_returns_of_a_peer_stand_beside_ours(plot, tmp_path):
    fake_tables(tmp_path)
    peers = [{"script": "td3", "env_id": env_id, "steps": 100_000} for env_id in ("Hopper-v5", "Swimmer-v5")]
    peers = [cell | {"seed": seed, "return": 1000 + seed} for cell in peers for seed in (11, 13)]
    runs, peers = plot.load(plot.Options(tables=tmp_path)), plot.pd.DataFrame(peers)
    lines = plot.peers_table(runs, peers).splitlines()
    theirs = "1,012 (1,011 to 1,013) | 11, 13 |"
    assert lines[4:] == [f"| Hopper-v5 | td3 | 100,000 | 3,012 (3,011 to 3,014) | 11–12, 14 | {theirs}"]
    assert plot.peers_table(runs, peers.query("env_id == 'Swimmer-v5'")) == ""


def test_cases_of_the_peer_are_cells_of_the_grid():
    peers, experiments = module("peers"), module("experiments").EXPERIMENTS
    known = {(e.script, e.env_id, e.steps) for e in experiments}
    assert {case[:3] for case in peers.CASES.values()} <= known


def test_an_unknown_case_of_the_peer_is_refused(capsys):
    peers = module("peers")
    with pytest.raises(SystemExit) as refused:
        peers.main(peers.Options(cases=("dqn-Acrobat",)))
    assert refused.value.code == 2 and "dqn-Acrobat: there are" in capsys.readouterr().err


def test_a_peer_runs_once_for_each_seed(tmp_path, monkeypatch, capsys):
    peers = module("peers")
    monkeypatch.setitem(peers.CASES, "tiny", ("a2c", "CartPole-v1", 100, "A2C", 2, {"learning_rate": "lin_1e-3"}))
    for seeds in ((11,), (11, 12)):
        peers.main(peers.Options(cases=("tiny",), seeds=seeds, out=tmp_path / "peers.csv"))
    header, *rows = (tmp_path / "peers.csv").read_text().splitlines()
    assert header.split(",") == list(peers.FIELDS) and [row.split(",")[3] for row in rows] == ["11", "12"]
    assert all(float(row.split(",")[4]) > 0 and "stable-baselines3" in row for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setitem(peers.CASES, "tiny", ("a2c", "CartPole-v1", 100, "A2C", 2, {}))
    peers.main(peers.Options(cases=("tiny",), seeds=(11,), out=tmp_path / "peers.csv"))
    assert len(capsys.readouterr().out.splitlines()) == 1, "other settings are another run"
    (tmp_path / "old.csv").write_text("script,env_id\na2c,CartPole-v1\n")
    for out, message in ((tmp_path / "old.csv", "its columns are not"), (tmp_path / "none/x.csv", "no folder")):
        with pytest.raises(SystemExit) as refused:
            peers.main(peers.Options(cases=("tiny",), seeds=(11,), out=out))
        assert refused.value.code == 2 and message in capsys.readouterr().err


def test_the_rows_of_the_peer_are_of_its_cases_as_they_are():
    peers = module("peers")
    with (BENCHMARK / "peers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = {(*map(str, case[:3]), peers.settings_of(name)) for name, case in peers.CASES.items()}
    assert {tuple(row[name] for name in ("script", "env_id", "steps", "settings")) for row in rows} == cases


def drawn(figure) -> list[tuple[list[float], float]]:
    """The rows of a figure of returns from above: the dots, the stroke at their mean."""
    (axis,) = figure.axes
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first row is above"
    dots, strokes = axis.lines[1::2], axis.lines[2::2]
    assert [line.get_ydata()[0] for line in dots] == [*range(len(dots))]
    return [([*d.get_xdata()], s.get_xdata()[0]) for d, s in zip(dots, strokes, strict=True)]


def test_variants_stand_below_each_other_the_best_mean_above(plot, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plot.plt, "close", shown.append)
    returns = {"": (5.0, 7.0), "better": (9.0,), "worse": (1.0, 2.0, 6.0)}
    runs = [{"variant": v, "return": x, "seed": seed} for v, some in returns.items() for seed, x in enumerate(some)]
    unpaired = {"variant": "", "return": 99.0, "seed": 3}  # no variant has this seed
    plot.draw_variants(plot.pd.DataFrame([*runs, unpaired]), tmp_path / "variants.png")
    assert drawn(shown[0]) == [([9.0], 9.0), ([5.0, 7.0], 6.0), ([1.0, 2.0, 6.0], 3.0)]
    (axis,) = shown[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["better (1)", "as it is (2)", "worse (3)"]
    assert list(axis.lines[0].get_xdata()) == [6.0, 6.0]
    plot.draw_variants(plot.pd.DataFrame([unpaired, *runs[2:]]), tmp_path / "variants.png")
    assert drawn(shown[1])[0] == ([99.0], 99.0), "better than none"


def test_a_published_number_is_1_and_a_random_policy_0(plot, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plot.plt, "close", shown.append)
    zero = plot.ENVIRONMENTS["Hopper-v5"][1]
    cell = {"env_id": "Hopper-v5", "steps": 100, "script": "sac"}
    runs = [
        cell | {"variant": "", "seed": 11, "return": zero},
        cell | {"variant": "", "seed": 12, "return": 500 + zero},
    ]
    first, last = {"env_id": "CartPole-v1"}, {"steps": 1000, "script": "ppo"}
    runs += [runs[0] | {"variant": "other"}, runs[0] | {"script": "td3"}, runs[0] | {"steps": 200}]
    runs += [runs[0] | first | {"return": 100.0}, runs[0] | last]
    published = [cell | {"return_mean": 250 + zero}, cell | {"steps": 200, "return_mean": zero - 1}]
    published += [cell | first | {"return_mean": 100.0}, cell | last | {"return_mean": 5000.0}]
    plot.draw_published(plot.pd.DataFrame(runs), plot.pd.DataFrame(published), tmp_path / "published.png")
    assert drawn(shown[0]) == [([1], 1), ([0], 0), (pytest.approx([0, 2]), pytest.approx(1))]
    (axis,) = shown[0].axes
    assert (
        axis.get_xscale() == "symlog"
        and axis.get_xlim() == pytest.approx((-0.2, 2.4))
        and [*axis.get_xticks()] == [0, 1, 2]
    )
    bands = {label.get_text(): place for label, place in zip(axis.get_yticklabels(), axis.get_yticks())}
    assert bands == {"CartPole-v1": 0, "Hopper-v5": 1.5}
    assert [(text.get_text(), text.xy[1]) for text in axis.texts] == [("100 (1)", 0), ("1,000 (1)", 1), ("100 (2)", 2)]
    ((legend,),) = [[*figure.legends] for figure in shown]
    assert [text.get_text() for text in legend.get_texts()] == ["sac", "ppo"]
    strokes = dict(zip(("sac", "ppo"), legend.get_lines()))
    assert all(stroke.get_color() == plot.COLORS[script] for script, stroke in strokes.items())
    assert [line.get_color() for line in axis.lines[2::2]] == [plot.COLORS[name] for name in ("sac", "ppo", "sac")]
    wide = [run | {"return": zero + x * 250} for run, x in zip(runs, (-4.0, 30.0))]
    plot.draw_published(plot.pd.DataFrame(wide), plot.pd.DataFrame(published), tmp_path / "published.png")
    (axis,) = shown[1].axes
    assert axis.get_xlim() == pytest.approx((-4.8, 36)), "no dot is cut by the edge"
    ticks = {label.get_text(): place for label, place in zip(axis.get_xticklabels(), axis.get_xticks())}
    assert ticks == {"−2": -2, "−1": -1, "0": 0, "1": 1, "2": 2, "5": 5, "10": 10, "20": 20}


def test_sources_are_links(plot):
    one, many = "someone/a-b.c@12ab:docs/x.md#L3", "someone/some@12ab:data/ppo/seed_*/x.csv"
    assert plot.linked(one) == "[a-b.c](https://github.com/someone/a-b.c/blob/12ab/docs/x.md#L3)"
    assert plot.linked(many) == "[some](https://github.com/someone/some/tree/12ab/data/ppo)"
    assert plot.linked("a figure") == "a figure" and plot.linked("some@12ab:x.svg") == "some@12ab:x.svg"


@pytest.mark.parametrize(
    "returns, text", [([1], ""), ([1, 3], " (1.0 to 3.0)"), ([1, 2, 3, 9], " (1.0 to 9.0)"), ([5] * 5, " [5.0, 5.0]")]
)
def test_of_fewer_than_five_runs_the_range_is_shown(plot, returns, text):
    assert plot.spread(plot.np.array(returns, float)) == text


def test_aggregates_are_the_same_again(plot, tmp_path):
    """Whatever was drawn from numpy's generator before."""
    pytest.importorskip("rliable")
    fake_tables(tmp_path)
    runs = plot.load(plot.Options(tables=tmp_path))
    runs["return"] += plot.np.random.default_rng(0).normal(size=len(runs)) * 1000
    texts = []
    for seed in (1, 2):
        plot.np.random.seed(seed)
        texts.append(plot.aggregates(runs, reps=50))
    assert texts[0] == texts[1] and "to 1." in texts[0]


def test_runs_by_hand_with_other_flags_do_not_mix(tmp_path, capsys):
    collect = module("collect")
    for age, gamma in enumerate((0.9, 0.99)):
        folder = make_run(tmp_path / str(gamma), evaluation(4000, mean=age), seed=11 + age)
        args = json.loads((folder / "args.json").read_text()) | {"gamma": gamma}
        (folder / "args.json").write_text(json.dumps(args))
        os.utime(folder / "agent.pt", (1000 + age, 1000 + age))
    assert [run["seed"] for run in collect.read_folder(tmp_path)] == [12]
    assert capsys.readouterr().err == "left out: 1 run of ppo CartPole-v1 4000 with other settings than the newest\n"


def test_the_tables_go_into_a_page_between_its_comments(plot, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- results -->\nold\n<!-- end of results -->\nbelow\n")
    for text in ("| old |", "| new |"):
        plot.put_into(page, text)
    assert page.read_text() == "above\n<!-- results -->\n\n| new |\n\n<!-- end of results -->\nbelow\n"
    page.write_text("<!-- end of results -->\n<!-- results -->\n")
    with pytest.raises(SystemExit):
        plot.put_into(page, "| lost |")
    assert page.read_text() == "<!-- end of results -->\n<!-- results -->\n"


def test_the_readme_has_the_committed_results():
    page, tables = (ROOT / "README.md").read_text(), (ROOT / "benchmark/figures/results.md").read_text()
    assert f"<!-- results -->\n\n{tables}\n<!-- end of results -->" in page
    for figure in (ROOT / "benchmark/figures").glob("*.png"):
        assert f"benchmark/figures/{figure.name}" in page


def test_scores_put_a_random_policy_at_0_and_the_best_mean_at_1(plot, tmp_path):
    fake_tables(tmp_path)
    (group,) = plot.scores_of(plot.load(plot.Options(tables=tmp_path))).values()
    zero = module("experiments").ENVIRONMENTS["Hopper-v5"][1]
    runs = plot.load(plot.Options(tables=tmp_path))
    few = runs[~((runs["script"] == "td3") & (runs["env_id"] == "Hopper-v5") & (runs["seed"] == 11))]
    assert all("td3" not in scripts for scripts in plot.scores_of(few).values()), "two seeds are too few"
    first = runs[(runs["script"] == "td3") & (runs["env_id"] == "Hopper-v5") & (runs["seed"] == 11)]
    more = plot.pd.concat([first.assign(seed=10, **{"return": 1e6}), runs])
    for before, after in zip(group.values(), *(x.values() for x in plot.scores_of(more).values())):
        assert after == pytest.approx(before), "of more seeds on one environment the last ones count"
    assert not plot.scores_of(runs[runs["script"] == "sac"]), "a script alone is compared with nothing"
    assert group["sac"].mean(0) == pytest.approx([1, 1]) and group["td3"].shape == (3, 2)
    assert group["td3"][0, 1] == pytest.approx((3011 - zero) / (5000 + 37 / 3 - zero))


def test_scripts_are_compared_on_the_environments_that_they_share(plot, tmp_path):
    fake_tables(tmp_path)
    runs = plot.load(plot.Options(tables=tmp_path))
    hopper = runs[(runs["script"] == "sac") & (runs["env_id"] == "Hopper-v5")]
    walker = hopper.assign(env_id="Walker2d-v5", variant="", seed=range(11, 11 + len(hopper)))
    ddpg = runs[runs["script"] == "td3"].assign(script="ddpg")
    ddpg["return"] += 9000
    ppo, alone = ddpg.assign(script="ppo"), hopper.assign(script="dqn")
    groups = plot.scores_of(plot.pd.concat([runs, walker, ddpg, ppo, alone]))
    shared = ("mujoco", "value", ("HalfCheetah-v5", "Hopper-v5"))  # Walker2d-v5 is sac's alone, ppo is on another side
    assert list(groups) == [shared] and set(groups[shared]) == {"ddpg", "td3", "sac"}
    assert groups[shared]["ddpg"].mean(0) == pytest.approx([1, 1])
    wide = plot.pd.concat([runs, walker, ddpg, walker.assign(script="ddpg")])
    keys = {env_ids: set(group) for (_, _, env_ids), group in plot.scores_of(wide).items()}
    assert keys[*shared[2], "Walker2d-v5"] == {"sac", "ddpg"} and keys[shared[2]] == {"ddpg", "td3", "sac"}


def test_the_interval_is_that_of_the_mean(plot):
    numpy = pytest.importorskip("numpy")
    values = numpy.random.default_rng(1).normal(5, 2, size=(200, 3))
    low, high = plot.interval(values)
    error = 1.96 * values.std(0) / 200**0.5
    assert low == pytest.approx(values.mean(0) - error, abs=0.05)
    assert high == pytest.approx(values.mean(0) + error, abs=0.05)
    low, high = plot.interval(values[:4])
    assert (low == values[:4].min(0)).all() and (high == values[:4].max(0)).all(), "of a few seeds the range"


def test_runs_of_a_wandb_project(plot):
    rows = [{"_step": 1, **evaluation(4000)}, {"_step": 0, **row(4000, 100, 2, 3.0), "eval/episodes": None}]
    config = {"env_id": "CartPole-v1", "seed": 11, "total_timesteps": 4000}
    group = "ppo__CartPole-v1__4000__one-env"
    runs = [
        SimpleNamespace(name="CartPole-v1__ppo__11__now", config=config, group=group, scan_history=lambda: rows),
        SimpleNamespace(name="CartPole-v1__ppo__12__now", config=config, group=None, scan_history=lambda: rows[1:]),
    ]
    (run,) = plot.read_wandb("team/project", api=SimpleNamespace(runs=lambda path, order: runs))
    assert (run["script"], run["variant"], run["return"], run["wall_s"]) == ("ppo", "one-env", 10.0, 40.0)
    assert run["curve"][-1] == 3.0
    runs[0].config = config | {"seed": 3}  # one on which settings are chosen
    api = SimpleNamespace(runs=lambda path, order: runs[:1])
    assert plot.read_wandb("team/project", api=api) == []
    assert [run["seed"] for run in plot.read_wandb("team/project", tuning=True, api=api)] == [3]
    runs[0].name = "fluffy-cloud-3"
    assert plot.read_wandb("team/project", tuning=True, api=api) == []
    runs[0].name, runs[0].config = runs[1].name, {}
    assert plot.read_wandb("team/project", tuning=True, api=api) == []


def test_what_was_logged_twice_counts_once(plot):
    """A run that was killed after step 300, and went on from a checkpoint of step 100."""
    first, again = ([row(step, sps) for step in (200, 300)] for sps in (1, 2))
    rows = [row(100, 1), evaluation(100), first[0], evaluation(200), first[1], *again, evaluation(300)]
    assert plot.last_time(rows) == [*rows[:2], *again, rows[-1]]


def test_a_curve_is_of_the_largest_number_of_steps_that_has_enough_seeds(plot):
    steps = {100: 3, 125: 1, 50: 5}
    assert plot.budget(plot.pd.DataFrame({"steps": sum(([s] * n for s, n in steps.items()), [])})) == 100
    assert plot.budget(plot.pd.DataFrame({"steps": [100, 125]})) == 125


@pytest.mark.parametrize(
    "options, message",
    (
        ({"runs_dir": Path("nowhere")}, "no folder"),
        ({}, "no finished runs"),
        ({"tables": BENCHMARK, "published": Path("nowhere.csv")}, "nowhere.csv"),
        ({"tables": BENCHMARK, "peers": Path(os.devnull)}, os.devnull),
        ({"tables": BENCHMARK, "out": BENCHMARK / "plot.py"}, "--out"),
    ),
)
def test_bad_input_to_plot_is_refused_in_one_line(plot, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(plot.Options(**{"tables": tmp_path, "out": tmp_path} | options))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_numbers_of_the_tables_have_a_minus_sign_only_below_zero():
    plot = module("plot")
    assert [plot.number(x) for x in (-0.005, -78.24, 0.04, -1234.5)] == ["0.0", "−78.2", "0.0", "−1,234"]


def has(script, name: str) -> bool:
    try:
        return bool(operator.attrgetter(name)(script))
    except AttributeError:
        return False


def test_every_part_of_a_profile_is_in_a_script():
    """A function that was renamed would count as the rest, and nobody would see it."""
    speed, scripts = module("speed"), [*map(module, SCRIPTS)]
    for name in sum(speed.PARTS.values(), ()):
        assert any(has(script, name) for script in scripts), name


def test_a_profile_adds_up_the_time_of_each_part(monkeypatch):
    speed, now = module("speed"), [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    class Agent:
        def act(self, seconds):
            now[0] += seconds
            return "an action"

    script = SimpleNamespace(Agent=Agent)
    seconds = speed.watch(script)
    assert [script.Agent().act(2.0), script.Agent().act(3.0)] == ["an action"] * 2
    assert seconds == dict.fromkeys(speed.PARTS, 0.0) | {"acting": 5.0}


def three_pairs(folder: Path):
    """The speed tool and the speeds of three pairs, of which one lacks our run."""
    speed = module("speed")
    runs = [("rungs", 0, 20.0), ("sb3", 0, 10.0), ("sb3", 1, 5.0), ("rungs", 2, 60.0), ("sb3", 2, 15.0)]
    for runner, pair, steps in runs:
        row = dict(case="dqn-CartPole", runner=runner, threads=1, num_envs=0, width=0, pair=pair, speed=steps)
        speed.append(folder / "speed.csv", speed.FIELDS, row)
    return speed, speed.read(folder / "speed.csv")


def test_ratios_are_those_of_one_pair(tmp_path, capsys):
    """Also where a run of a pair failed."""
    speed, speeds = three_pairs(tmp_path)
    assert speed.ratios(*(speed.best_of(speeds, "dqn-CartPole", runner)[1] for runner in ("rungs", "sb3"))) == [2, 4]
    speed.report(speeds)
    assert "| dqn-CartPole | Stable-Baselines3 | 1 | 10 (5–15) | 3.00 (2.00–4.00) |" in capsys.readouterr().out


def test_of_many_turns_the_bounds_are_those_of_the_middle_half():
    speed = module("speed")
    assert speed.bounds([3.0, 1.0, 2.0]) == (1, 3) and speed.bounds([*range(1, 12)]) == (3, 9)
    assert speed.spread([*range(1, 12)], ".0f") == "6 (3–9)"


def test_bars_are_ratios_of_pairs(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    speed, speeds = three_pairs(tmp_path)
    speed.draw(speeds, tmp_path / "speed.png")
    (axes,) = pyplot.gcf().axes
    assert [bar.get_height() for bar in axes.patches] == [3, 1]
    ranges = [lines.get_paths()[0].vertices[:, 1].tolist() for lines in axes.collections]
    assert ranges == [[2, 4], [1, 1]]
    pyplot.close()


def test_speeds_of_several_machines_or_commits_do_not_mix(tmp_path):
    speed = module("speed")
    kinds = [
        ("ppo", "old", "cpu", "a"),
        ("dqn", "old", "cpu", "a"),
        ("ppo", "new", "cpu", "a"),
        ("ppo", "new", "cuda", "a"),
    ]
    for pair, (case, machine, device, commit) in enumerate([*kinds, ("ppo", "new", "cuda", "b")]):
        row = dict(case=case, runner="rungs", threads=1, num_envs=0, width=0, pair=pair, speed=pair)
        speed.append(tmp_path / "speed.csv", speed.FIELDS, row | dict(machine=machine, device=device, commit=commit))
    speeds = speed.read(tmp_path / "speed.csv")
    assert speeds == {("dqn", "rungs", 1, 0, 0): {1: 1.0}, ("ppo", "rungs", 1, 0, 0): {4: 4.0}}
    row = dict(case="ppo", runner="rungs", threads=1, num_envs=64, width=0, pair=5, speed=5, machine="third")
    speed.append(tmp_path / "speed.csv", speed.FIELDS, row | {"device": "cpu"})
    scaled = {("ppo", "rungs", 1, 64, 0): {5: 5.0}}
    assert speed.read(tmp_path / "speed.csv") == speeds | scaled, "scaled elsewhere, which says nothing of its peers"


def test_profiles_of_several_machines_do_not_mix(tmp_path, capsys):
    speed = module("speed")
    for machine, spent in (("old", 1.0), ("new", 5.0)):
        row = dict(case="dqn-CartPole", threads=1, machine=machine) | dict.fromkeys((*speed.PARTS, "rest"), spent)
        speed.append(tmp_path / "profile.csv", speed.PROFILE_FIELDS, row)
    speed.report_profile(tmp_path / "profile.csv")
    assert f"| dqn-CartPole | 1 | {'5.0 | ' * 6}30.0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    (
        ({"pairs": -1}, "--pairs must not be below 0"),
        ({"width": -1}, "--width must not be below 0"),
        ({"threads": (0, 1)}, "--threads must be above 0"),
        ({"out": Path("nowhere/speed.csv")}, "there is no folder nowhere"),
        ({"chart": Path("nowhere/speed.png")}, "there is no folder nowhere"),
    ),
)
def test_bad_input_to_the_speed_tool_is_refused_before_it_measures(options, message, tmp_path, capsys, monkeypatch):
    speed = module("speed")
    monkeypatch.setattr(speed, "measure", lambda task: pytest.fail("it measures"))
    with pytest.raises(SystemExit) as end:
        speed.main(speed.Options(**{"out": tmp_path / "speed.csv", "chart": tmp_path / "speed.png"} | options))
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def with_workers(speed, monkeypatch, of):
    """The speed tool with workers whose speed in each turn is that of the function; who ended is in the list."""
    ended = []

    class Worker:
        def __init__(self, task):
            self.task, self.turns = task, -1

        def result(self):
            self.turns += 1
            return of(self.task, self.turns)

        turn = result

        def end(self):
            ended.append((self.task["runner"], self.task["threads"]))

    monkeypatch.setattr(speed, "Worker", Worker)
    return ended


def test_runs_of_the_speed_tool_that_fail_are_counted(tmp_path, capsys, monkeypatch):
    """In the warm-up or in a later turn; the others go on without them."""
    pytest.importorskip("matplotlib")
    speed = module("speed")

    def of(task, turn):
        if (task["runner"], turn) in (("rungs-compile", 0), ("sb3", 2)):
            raise ChildProcessError("it broke")
        return 10.0 * turn

    ended = with_workers(speed, monkeypatch, of)
    monkeypatch.setattr(speed, "measure", lambda task: None)
    where = {"out": tmp_path / "speed.csv", "chart": tmp_path / "speed.png"}
    with pytest.raises(SystemExit) as end:
        speed.main(speed.Options(cases=("a2c-CartPole",), threads=(1,), pairs=3, **where))
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("it broke") == 2 and error.endswith("3 runs failed\n")
    speeds = speed.read(tmp_path / "speed.csv")
    assert speeds[("a2c-CartPole", "rungs", 1, 0, 0)] == {0: 10.0, 1: 20.0, 2: 30.0}
    assert speeds[("a2c-CartPole", "sb3", 1, 0, 0)] == {0: 10.0} and len(speeds) == 2
    assert sorted(ended) == [("rungs", 1), ("rungs-compile", 1), ("sb3", 1)], "SBX has no A2C"
    speed.main(speed.Options(cases=("a2c-CartPole",), runners=("rungs",), threads=(1,), pairs=0, **where))


def test_profiles_that_fail_are_counted(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    speed = module("speed")
    spent = dict.fromkeys((*speed.PARTS, "rest"), 1.0)
    monkeypatch.setattr(speed, "measure", lambda task: None if task["threads"] == 2 else spent)
    where = {"out": tmp_path / "speed.csv", "chart": tmp_path / "speed.png"}
    options = speed.Options(cases=("a2c-CartPole",), pairs=1, profile=True, **where)
    with pytest.raises(SystemExit) as end:
        speed.main(options)
    assert end.value.code == 1 and capsys.readouterr().err == "1 run failed\n"
    speed.main(dataclasses.replace(options, threads=(1,)))


def test_every_runner_of_a_pair_has_the_width_that_was_asked_for(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    speed, widths = module("speed"), {}
    speed_of = lambda task, turn=0: widths.setdefault(task["runner"], 100.0 + task["width"])  # noqa: E731
    with_workers(speed, monkeypatch, speed_of)
    monkeypatch.setattr(speed, "measure", speed_of)
    where = {"out": tmp_path / "speed.csv", "chart": tmp_path / "speed.png"}
    speed.main(speed.Options(cases=("sac-HalfCheetah",), pairs=1, threads=(1,), width=8, **where))
    assert widths == dict.fromkeys(("limit", *speed.RUNNERS), 108.0)
    assert "| sac-HalfCheetah | SBX | 1 |  | 8 | 108 (108–108) |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "case, num_envs, steps", (("ppo-CartPole", 4, 6144), ("ppo-HalfCheetah", 1, 2048), ("dqn-CartPole", 1, 3000))
)
def test_a_turn_has_as_many_updates_as_the_next(case, num_envs, steps, monkeypatch, capsys):
    """Whole rollouts; the clock runs from the line that begins a turn to the end of its last step."""
    speed, now, begun = module("speed"), [0.0], []
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])

    def readline():
        now[0] += 1000.0  # the others have their turns
        begun.append(step)
        return "\n" if len(begun) < 4 else ""

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=readline))
    turns = speed.Turns(dict(case=case, num_envs=0, width=0, turns=3), 5000, speed.CASES[case][5])
    with pytest.raises(SystemExit):
        for step in range(0, turns.total + 1, num_envs):  # as the peers count
            now[0] += num_envs / 50
            turns(step)
    speeds = [json.loads(line)["turn"] for line in capsys.readouterr().out.splitlines() if line]
    assert speeds == [None, *[pytest.approx(50.0)] * 3]
    assert begun[0] >= 5000 and [later - first for first, later in zip(begun, begun[1:])] == [steps] * 3


WORKER = """
import json, sys
for turn in range(3):
    print("something else")
    print(json.dumps({"turn": 7.5 * turn or None}), flush=True)
    sys.stdin.readline()
print("a warning", file=sys.stderr)
sys.exit("it broke")
"""


def test_a_worker_moves_in_its_turn_only_and_says_why_it_ended(monkeypatch):
    speed = module("speed")
    monkeypatch.setattr(speed, "command_of", lambda task: [sys.executable, "-c", WORKER])
    worker = speed.Worker(dict(runner="rungs", threads=1))
    assert worker.result() is None and worker.turn() == 7.5 and worker.turn() == 15.0
    with pytest.raises(ChildProcessError, match="it broke"):
        worker.turn()
    worker.end()
    other = speed.Worker(dict(runner="rungs", threads=1))
    assert other.result() is None and other.process.poll() is None, "it waits"
    other.end()
    assert other.process.returncode < 0


@pytest.mark.parametrize("flags", (["--cases", "ppo-CartPol"], ["--runners", "rungs", "sb4"]))
def test_an_unknown_case_or_runner_of_the_speed_tool_is_refused(flags, tmp_path):
    """Before anything is measured or written."""
    command = [sys.executable, BENCHMARK / "speed.py", *flags]
    ended = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and not any(tmp_path.iterdir())
    assert ended.stderr.startswith("speed.py: error: ") and f"{flags[-1]}: choose from" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
