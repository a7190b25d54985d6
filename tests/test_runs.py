"""What a run leaves behind, and that it can be stopped, killed, repeated and gone on with."""

import importlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, environment, flags, only_run, python, rows, run, takes, tiny_env, train

REPLAY = ("dqn", "ddpg", "td3", "sac")
each_script = pytest.mark.parametrize("script", SCRIPTS)
KEY = re.compile(
    r"global_step|charts/(episodes|episodic_return|episodic_length|SPS|learning_rate)|losses/\w+"
    r"|eval/(episodes|episodic_return|episodic_return_std)"
)


def each_script_with(discrete: tuple[str, ...] = (), box: tuple[str, ...] = ()):
    """A test for each script and each of these environments whose actions it takes."""
    kinds = {"Discrete": discrete, "Box": box}
    pairs = [(s, env_id) for s in SCRIPTS for kind, ids in kinds.items() if takes(s, kind) for env_id in ids]
    return pytest.mark.parametrize("script, env_id", pairs)


def evaluations(folder: Path) -> list[dict]:
    return [row for row in rows(folder) if "eval/episodic_return" in row]


def films(folder: Path) -> list[Path]:
    return sorted(folder.glob("videos/*.mp4"))


def check_run(done: subprocess.CompletedProcess, cwd: Path, script: str, env_id: str) -> None:
    """Everything that the contract says of a run with flags(script) and seed 3 that went well."""
    assert done.stderr == ""
    folder = only_run(cwd)
    assert re.fullmatch(rf"{env_id.replace(':', '-')}__{script}__3__[\w-]+", folder.name)
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "agent.pt"}
    args = json.loads((folder / "args.json").read_text())
    assert args.keys() == {"script"} | {f.name for f in fields(importlib.import_module(script).Args)}
    assert (args["script"], args["env_id"], args["seed"], args["total_timesteps"]) == (script, env_id, 3, 1500)

    *training, evaluation = rows(folder, speed=True)
    assert all(KEY.fullmatch(key) for row in [*training, evaluation] for key in row)
    assert all({"global_step", "charts/episodes", "charts/SPS"} <= row.keys() for row in training)
    assert any(key.startswith("losses/") for key in training[-1])
    turns = [row["global_step"] // 500 for row in training]
    assert turns[0] >= 1 and turns[-1] >= 3 and turns == sorted(set(turns)), "a row for every 500 steps"
    assert evaluation.keys() == {"global_step"} | {
        f"eval/{name}" for name in ("episodic_return", "episodic_return_std", "episodes")
    }
    assert evaluation["global_step"] == training[-1]["global_step"] and evaluation["eval/episodes"] == 2

    step, mean, std, episodes = re.fullmatch(
        r"Evaluation at step (\S+): return (\S+) ± (\S+) over (\d+) episodes", done.stdout.splitlines()[-1]
    ).groups()
    assert int(step.replace(",", "")) == evaluation["global_step"] and episodes == "2"
    assert float(mean) == pytest.approx(evaluation["eval/episodic_return"], abs=0.051)
    assert float(std) == pytest.approx(evaluation["eval/episodic_return_std"], abs=0.051)

    agent = torch.load(folder / "agent.pt", map_location="cpu", weights_only=True)
    assert len(agent) >= 6 and all(x.isfinite().all() for x in agent.values())


@each_script_with(discrete=("CartPole-v1",), box=("Pendulum-v1", "tests.envs:BoxTiny-v0"))
def test_a_run_leaves_what_the_contract_says(script, env_id, here):
    done = run(script, *flags(script, "--env-id", env_id, "--seed", "3"), cwd=here)
    check_run(done, here, script, env_id)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
@each_script_with(discrete=("CartPole-v1",), box=("Pendulum-v1",))
def test_a_run_on_cuda_leaves_the_same_and_can_be_evaluated_on_the_cpu(script, env_id, here):
    done = run(script, *flags(script, "--env-id", env_id, "--seed", "3", "--device", "cuda"), cwd=here)
    check_run(done, here, script, env_id)
    train(script, "--resume", only_run(here), "--device", "cpu")
    assert len(evaluations(only_run(here))) == 2


@each_script_with(discrete=("tests.envs:DiscreteFrom3-v0",))
def test_discrete_actions_may_start_anywhere(script, env_id, here):
    assert evaluations(train(script, *flags(script, "--env-id", env_id)))[0]["eval/episodic_return"] == 5


@pytest.mark.parametrize("script", REPLAY)
def test_a_run_says_how_large_its_replay_buffer_is(script, here, capsys):
    """As large as the run is long, if --buffer-size allows that."""
    for size, expected in (("1_000_000", "1,500"), ("101", "101")):
        train(script, *flags(script, "--buffer-size", size))
        assert f"\nreplay buffer: {expected} transitions, " in capsys.readouterr().out


QUIET_IMPORT = """
import os, random, signal, sys
import numpy, torch

def state():
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        random.getstate(), str(numpy.random.get_state()), [signal.getsignal(s) for s in (2, 15)], os.listdir(),
    )

before = state()
import SCRIPT
assert state() == before, "the import had a side effect"
folder = SCRIPT.train(SCRIPT.Args(total_timesteps=300, num_envs=2, eval_episodes=1))
assert "wandb" not in sys.modules
assert [signal.getsignal(s) for s in (2, 15)] == before[-2], "the signal handlers were not given back"
print(type(folder).__mro__[1].__name__, folder)
"""


@each_script
def test_a_script_is_a_module_without_side_effects_and_train_returns_the_folder(script, here):
    printed = python("-c", QUIET_IMPORT.replace("SCRIPT", script), cwd=here).stdout.splitlines()
    assert printed[-1] == f"Path runs/{only_run(here).name}"
    assert len(evaluations(only_run(here))) == 1


@each_script
def test_a_copied_script_runs_alone_in_an_empty_folder(script, here):
    shutil.copy(ROOT / f"{script}.py", here)
    more = ("--total-timesteps", "1000", *SMALL.get(script, ()))
    python(f"{script}.py", *more, cwd=here, env={"PYTHONPATH": ""})
    assert evaluations(only_run(here))[0]["eval/episodes"] == 10


@each_script
def test_a_copy_that_calls_train_itself_gets_the_flags_that_it_gives(script, here):
    """Its own command line is nobody else's."""
    text, last = (ROOT / f"{script}.py").read_text(), "    train(tyro.cli(Args, description=__doc__))\n"
    assert text.endswith(last)
    lines = [
        "folder = train(Args(total_timesteps=600, eval_episodes=1, checkpoint_every=300))",
        "train(Args(resume=str(folder), total_timesteps=900, eval_episodes=2))",
    ]
    Path("mine.py").write_text(text.removesuffix(last) + "".join(f"    {line}\n" for line in lines))
    printed = python("mine.py", "--my-flag", cwd=here).stdout
    assert "mine on " in printed and " to 900" in printed
    assert [row["eval/episodes"] for row in evaluations(only_run(here))] == [1, 2]


def test_a_script_that_is_pasted_into_a_notebook_trains(here, capsys):
    """There it has no file."""
    for script in SCRIPTS:
        cell = {"__name__": "cell"}
        exec((ROOT / f"{script}.py").read_text(), cell)
        folder = cell["train"](cell["Args"](total_timesteps=300, eval_episodes=1))
        assert json.loads((folder / "args.json").read_text())["script"] == "notebook"
        with pytest.raises(SystemExit):
            cell["train"](cell["Args"](env_id="Nowhere-v0"))
        assert capsys.readouterr().err.startswith("notebook.py: error: --env-id Nowhere-v0")


@each_script
def test_every_episode_counts_in_the_row_after_its_end(script, here, monkeypatch):
    monkeypatch.setenv("LEDGER", str(here / "ledger"))
    """With one environment for REINFORCE, which does not count what the others play while they wait for the last."""
    more = ("--env-id", tiny_env(script, "Ledger"), "--eval-episodes", "0", "--checkpoint-every", "400")
    folder = train(script, *flags(script, *more, "--num-envs", "1" if script == "reinforce" else "2"))
    truth = [tuple(map(float, line.split())) for line in (here / "ledger").read_text().splitlines()]
    assert len(truth) > 100
    for row in rows(folder):
        ended, truth = truth[: row["charts/episodes"]], truth[row["charts/episodes"] :]
        assert row["charts/episodic_return"] == pytest.approx(sum(r for r, _ in ended) / len(ended), abs=1e-4)
        assert row["charts/episodic_length"] == pytest.approx(sum(n for _, n in ended) / len(ended))
    assert not truth, "episodes that ended and are in no row"


@each_script_with(discrete=("CartPole-v1",), box=("Pendulum-v1",))
def test_the_seed_decides_every_number(script, env_id, here):
    first, again, other = (train(script, *flags(script, "--env-id", env_id, "--seed", seed)) for seed in "114")
    assert rows(first) == rows(again)
    assert (first / "agent.pt").read_bytes() == (again / "agent.pt").read_bytes()
    assert all(row not in rows(first) for row in rows(other))


@each_script
def test_the_seed_decides_the_first_weights(script, here):
    still = ("--learning-starts", "5000") if script in REPLAY else ("--learning-rate", "1e-30")
    agents = (train(script, *flags(script, *still, "--seed", seed)) / "agent.pt" for seed in "14")
    first, other = (torch.load(path, weights_only=True) for path in agents)
    assert not any(torch.equal(x, other[name]) for name, x in first.items() if x.dim() == 2)


@pytest.mark.parametrize("eval_every", ("0", "600"))
@each_script_with(discrete=("SignalsCartPole",), box=("SignalsPendulum",))
def test_a_killed_run_resumed_ends_bit_for_bit_where_the_uninterrupted_one_ends(script, env_id, eval_every, here):
    every = ("--checkpoint-every", "500", "--eval-every", eval_every, "--log-every", "100")
    settings = flags(script, "--env-id", f"tests.envs:{env_id}-v0", "--total-timesteps", "2000", *every)
    whole = train(script, *settings, "--runs-dir", "whole")
    killed = run(script, *settings, cwd=here, env={"SIGNAL": "SIGKILL", "SIGNAL_AT": "1300"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    folder = only_run(here)
    assert (folder / "checkpoint.pt").exists() and not (folder / "agent.pt").exists()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"a row": "that the kill to')
    shutil.copytree(folder, "copy")
    run(script, "--resume", folder, cwd=here)
    train(script, "--resume", "copy")
    for resumed in (folder, Path("copy")):
        assert rows(resumed) == rows(whole)
        assert (resumed / "agent.pt").read_bytes() == (whole / "agent.pt").read_bytes()


@pytest.mark.slow
@each_script_with(discrete=("SignalsCartPole",), box=("SignalsPendulum",))
def test_a_killed_run_with_compile_ends_where_the_uninterrupted_one_ends(script, env_id, here):
    """Bit for bit; but for reinforce.py, whose code is another for the first length of a batch than for later ones."""
    every = ("--checkpoint-every", "500", "--log-every", "100", "--compile")
    settings = flags(script, "--env-id", f"tests.envs:{env_id}-v0", "--total-timesteps", "1000", *every)
    whole = run(script, *settings, "--runs-dir", "whole", cwd=here) and next(Path("whole").iterdir())
    run(script, *settings, cwd=here, env={"SIGNAL": "SIGKILL", "SIGNAL_AT": "800"}, check=False)
    folder = only_run(here)
    assert (folder / "checkpoint.pt").exists() and not (folder / "agent.pt").exists()
    run(script, "--resume", folder, cwd=here)
    if script == "reinforce":
        assert all(row == pytest.approx(expected, rel=1e-3) for row, expected in zip(rows(folder), rows(whole)))
    else:
        assert rows(folder) == rows(whole)
        assert (folder / "agent.pt").read_bytes() == (whole / "agent.pt").read_bytes()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT), ids=lambda number: number.name)
@each_script
def test_a_signal_ends_a_run_in_good_order(script, number, here):
    command = [sys.executable, ROOT / f"{script}.py", *flags(script, "--total-timesteps", "100_000_000")]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            deadline = time.monotonic() + 60
            while not any(path.stat().st_size for path in here.glob("runs/*/metrics.jsonl")):
                assert time.monotonic() < deadline and job.poll() is None, "no row came"
                time.sleep(0.01)
            job.send_signal(number)
            out, err = job.communicate(timeout=10)
        finally:
            job.kill()
    assert job.returncode == 128 + number
    assert err == ""
    folder = only_run(here)
    step = rows(folder)[-1]["global_step"]
    assert f"Stopped at step {step:,}" in out and str(folder.name) in out.splitlines()[-1]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == step
    assert not (folder / "agent.pt").exists()

    train(script, "--resume", folder, "--total-timesteps", str(step + 600))
    assert (folder / "agent.pt").exists()
    steps = [row["global_step"] for row in rows(folder)]
    assert steps == sorted(steps) and steps[-1] >= step + 600 and steps.count(step) == 1


@each_script
def test_a_finished_run_resumed_is_evaluated_and_filmed_and_no_more(script, here, capsys):
    pytest.importorskip("moviepy")
    folder = train(script, *flags(script))
    before, agent = rows(folder, speed=True), (folder / "agent.pt").read_bytes()
    train(script, "--resume", folder, "--capture-video")
    assert rows(folder, speed=True) == [*before, before[-1]], "the same agent, environments and seeds: the same return"
    assert (folder / "agent.pt").read_bytes() == agent
    assert [path.stat().st_size > 1000 for path in films(folder)] == [True]


@pytest.mark.filterwarnings("error:.*Overwriting existing videos")
@each_script
def test_each_evaluation_is_filmed(script, here):
    pytest.importorskip("moviepy")
    folder = train(script, *flags(script, "--eval-every", "800", "--capture-video"))
    assert len(films(folder)) == len(evaluations(folder)) == 2
    assert all(path.stat().st_size > 1000 for path in films(folder))


@each_script
def test_a_resumed_run_takes_the_flags_given_beside_resume_even_where_they_equal_a_default(script, here):
    folder = train(script, *flags(script))
    run(script, "--resume", folder, "--eval-episodes", "10", cwd=here)
    assert [row["eval/episodes"] for row in evaluations(folder)] == [2, 10]


@each_script
def test_an_environment_that_never_ends_does_not_keep_a_run_from_its_end(script, here):
    more = ("--env-id", tiny_env(script, "Forever"), "--eval-episodes", "0")
    assert rows(train(script, *flags(script, *more)))[-1]["global_step"] < 1500 * 1.2


@each_script
def test_weights_and_biases_gets_the_same_rows_and_films(script, here):
    pytest.importorskip("wandb")
    pytest.importorskip("moviepy")
    quiet = {"WANDB_DIR": str(here), "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    track = ("--track", "--wandb-group", "tests", "--eval-every", "800", "--capture-video")
    run(script, *flags(script, *track), cwd=here, env=quiet)
    (log,) = here.glob("wandb/offline-run-*/*.wandb")
    inspect = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", log]
    printed = subprocess.run(inspect, env=environment(**quiet), capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in printed.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    history = [{key: x for key, x in row.items() if not key.startswith("_")} for row in history]
    shown = [row for row in history if any(key.startswith("eval/video") for key in row)]
    assert [row for row in history if row not in shown] == rows(only_run(here), speed=True)
    assert [row["global_step"] for row in shown] == [row["global_step"] for row in evaluations(only_run(here))]
    sent = here.glob("wandb/offline-run-*/files/media/videos/eval/*.mp4")
    assert sorted(path.read_bytes() for path in sent) == sorted(path.read_bytes() for path in films(only_run(here)))
    (logged,) = (record["run"] for record in records if record["type"] == "run")
    assert logged["display_name"] == only_run(here).name
    assert logged["config"]["update"]["num_envs"] == 2
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [0]


@each_script
def test_a_terminal_shows_the_progress(script, here):
    """That there is none where stderr is no terminal is in check_run."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    command = [sys.executable, ROOT / f"{script}.py", *flags(script)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=theirs) as job:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:  # how Linux says that the other end is closed
            pass
    os.close(ours)
    assert job.returncode == 0
    assert b"%|" in shown and re.search(rb"1\.5\dk.* steps/s, return -?\d", shown)


@pytest.mark.parametrize("script", ("ppo", "sac"))
def test_a_run_that_nobody_looks_at_goes_on_to_its_end(script, here):
    """stderr is closed, and the reader of stdout has left."""
    read, write = os.pipe()
    os.close(read)
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, ROOT / f"{script}.py", *flags(script)]
    done = subprocess.run(command, env=environment(), stdout=write)
    os.close(write)
    assert done.returncode == 0 and len(evaluations(only_run(here))) == 1


@each_script
def test_help_explains_every_flag(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        train(script, "--help")
    shown = re.sub(r"[│╭╮╰╯─\n]", "  ", capsys.readouterr().out)
    texts = dict(re.findall(r"  --([a-z][\w-]*)(?:,? \S+)*?\s{2,}(.*?)\s*\(default", shown))
    names = [f.name.replace("_", "-") for f in fields(importlib.import_module(script).Args)]
    assert list(texts) == names
    assert all(len(text.split()) >= 2 for text in texts.values())
    assert len(set(texts.values())) == len(names), "a text of one flag is that of another"


def test_help_begins_with_what_the_script_is(here):
    """The equations line by line, as in the file."""
    text, shown = importlib.import_module("sac").__doc__, run("sac", "--help", cwd=here, env={"COLUMNS": "160"}).stdout
    assert shown.index(text.partition("\n")[0]) < shown.index("--env-id STR")
    equations = [line for line in text.splitlines() if line.startswith("    ")]
    assert len(equations) > 8 and set(equations) <= {line.rstrip() for line in shown.splitlines()}


@pytest.mark.parametrize("script", ("ppo", *REPLAY))
def test_a_resumed_run_goes_on_with_other_flags(script, here):
    """As many environments and as large a step as the new flags say, whatever the checkpoint was made with."""
    more = ("--checkpoint-every", "500", "--learning-rate", "1e-3", "--total-timesteps", "1501")
    folder = train(script, *flags(script, *more))
    given = ("--learning-rate", "0.125", "--num-envs", "3", "--total-timesteps", "2400")
    train(script, "--resume", folder, *given, *(("--no-anneal-lr",) if script in ("ppo", "dqn") else ()))
    states = torch.load(folder / "checkpoint.pt", weights_only=True)["states"]
    optimizer = states["optimizer" if script == "ppo" else "critic_optimizer" if script == "dqn" else "actor_optimizer"]
    assert optimizer["param_groups"][0]["lr"] == 0.125
    assert rows(folder)[-1]["global_step"] >= 2400


@each_script
def test_a_finished_run_that_goes_on_keeps_the_evaluation_at_its_old_end(script, here):
    folder = train(script, *flags(script, "--checkpoint-every", "500"))
    before = rows(folder, speed=True)
    train(script, "--resume", folder, "--total-timesteps", "2400")
    assert rows(folder, speed=True)[: len(before)] == before
    assert len(evaluations(folder)) == 2 and evaluations(folder)[0] == before[-1]


@each_script
def test_a_torn_row_of_a_finished_run_gives_way(script, here):
    folder = train(script, *flags(script, "--checkpoint-every", "500"))
    *others, evaluation = rows(folder, speed=True)
    with (folder / "metrics.jsonl").open("rb+") as file:
        file.truncate(file.seek(-20, os.SEEK_END))
    train(script, "--resume", folder)
    assert rows(folder, speed=True) == [*others, evaluation]


@pytest.mark.parametrize("script", REPLAY)
def test_a_replay_buffer_fits_whatever_the_length_and_environments_of_the_resumed_run(script, here):
    """1000 steps and one more are 1007 with 7 environments, though 1001 would do for a run from the start."""
    short = flags(script, "--num-envs", "1", "--total-timesteps", "1000", "--checkpoint-every", "500")
    folder = train(script, *short)
    for more in (("--total-timesteps", "700"), ("--num-envs", "7", "--total-timesteps", "1001")):
        train(script, "--resume", folder, *more)
    train(script, "--resume", folder, "--total-timesteps", "1200")
    buffer = torch.load(folder / "checkpoint.pt", weights_only=True)["states"]["buffer"]
    assert buffer["added"] == len(buffer["reward"]) == 1007 + 28 * 7


@pytest.mark.parametrize("script", ("ppo", "dqn"))
def test_a_resumed_run_keeps_the_hidden_sizes(script, here):
    folder = train(script, *flags(script, "--hidden-sizes", "5", "7", "--checkpoint-every", "500"))
    resumed = run(script, "--resume", folder, "--total-timesteps", "2100", cwd=here)
    assert "Warning" not in resumed.stderr, "of a list in the place of the tuple"
    assert json.loads((folder / "args.json").read_text())["hidden_sizes"] == [5, 7]


def test_a_run_of_sac_resumed_with_a_fixed_temperature_has_that(here):
    folder = train("sac", *flags("sac", "--checkpoint-every", "500"))
    train("sac", "--resume", folder, "--total-timesteps", "2000", "--no-autotune", "--alpha", "0.125")
    assert torch.load(folder / "agent.pt", weights_only=True)["log_alpha"].exp().item() == pytest.approx(0.125)


@pytest.mark.parametrize("script", ("ppo", "dqn", "sac"))
def test_a_checkpoint_that_is_no_longer_asked_for_is_still_brought_to_the_end(script, here):
    """Or a later --resume would go back to it, behind the end of the training."""
    folder = train(script, *flags(script, "--checkpoint-every", "500"))
    run(script, "--resume", folder, "--checkpoint-every", "0", "--total-timesteps", "2100", cwd=here)
    end = rows(folder)[-1]["global_step"]
    assert end >= 2100 and torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == end


@pytest.mark.parametrize("script", ("reinforce", "ppo", "sac"))
def test_each_evaluation_is_made_once_also_at_the_end(script, here):
    found = rows(train(script, *flags(script, "--eval-every", "250")))
    steps = [row["global_step"] for row in found if "eval/episodic_return" in row]
    assert len(steps) > 2 and len(set(steps)) == len(steps)
    assert steps[-1] == found[-1]["global_step"] >= 1500
