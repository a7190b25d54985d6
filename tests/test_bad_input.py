"""What bad input and bad luck get: one clear line, the right exit code, and nothing lost or left behind."""

import importlib
import json
import os
import pickle
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, flags, only_run, rows, run, takes, tiny_env, train

each_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture
def refused(here, capsys, monkeypatch):
    """A function that runs a script, checks that it ends with one line on stderr and `code`, and returns the line."""
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)

    def ended(script: str, *flags: str, code: int = 2) -> str:
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            warnings.showwarning = lambda *warning: print(*warning, file=sys.stderr)
            train(script, *flags)
        assert end.value.code == code
        out, err = capsys.readouterr()
        assert err.startswith(f"{script}.py: error: ") and err.endswith("\n") and err.count("\n") == 1, err
        if code == 2:
            assert not out and not Path("runs").exists(), "the training began"
        return err

    return ended


BAD_FLAGS = [
    ("--env-id CartPol-v1", "CartPol-v1", "Did you mean: `CartPole`?"),
    ("--env-id MountainCar-v9", "v9", "`v0`"),
    ("--env-id no_such_module:X-v0", "No module named 'no_such_module'"),
    ("--env-id tests.envs:DictObs-v0", "DictObs", "observations must be a Box", "Dict("),
    ("--env-id Taxi-v4", "Taxi-v4", "observations must be a Box", "Discrete(500)"),
    ("--env-id tests.envs:MultiDiscrete-v0", "MultiDiscrete-v0: actions must be", "MultiDiscrete([2 3])"),
    ("--device cuda", "--device cuda", "none here"),
    ("--device mps", "--device mps", "none here"),
    ("--gamma 1.01", "--gamma", "between 0 and 1"),
    ("--gamma -0.1", "--gamma"),
    ("--gamma nan", "--gamma"),
    ("--seed 18446744073709551616", "--seed", "below 2 ** 64"),
    ("--hidden-sizes 0 8", "--hidden-sizes", "above 0"),
    ("--hidden-sizes 8 -1", "--hidden-sizes", "above 0"),
    ("--learning-rate nan", "--learning-rate"),
    ("--learning-rate inf", "--learning-rate", "finite"),
    ("--learning-rate 0", "--learning-rate", "above 0"),
    ("--learning-rate -1e-3", "--learning-rate", "above 0"),
    *(
        (f"--{name} {x}", f"--{name}", "above 0")
        for name in "total-timesteps num-envs log-every".split()
        for x in "0 -1".split()
    ),
    ("--num-threads 0", "--num-threads", "above 0"),
    ("--num-threads 100000", "--num-threads", "1024"),
    *((f"--{name} -1", f"--{name}", "below 0") for name in "seed eval-episodes eval-every checkpoint-every".split()),
    ("--resume nowhere", "--resume nowhere", "args.json"),
]
WRONG_ACTIONS = {"Discrete": "CartPole-v1", "Box": "Pendulum-v1"}
HELP = {"dqn": "sac.py", "ddpg": "dqn.py", "td3": "dqn.py", "sac": "dqn.py"}  # a script that takes those actions
REPLAY = [s for s in SCRIPTS if s in HELP]
COEFS = ("vf-coef", "ent-coef")
OWN_FLAGS = [
    *(
        (s, f"--env-id {i}", f"{i}: actions must be", "not", "take", "ppo.py", HELP[s])
        for s in SCRIPTS
        for k, i in WRONG_ACTIONS.items()
        if not takes(s, k)
    ),
    ("ppo", "--num-minibatches 7", "512", "minibatches"),
    *((s, "--vf-coef nan", "--vf-coef", "NaN") for s in ("a2c", "ppo")),
    *((s, f"--{name} {x}", f"--{name}", "finite") for s in ("a2c", "ppo") for name in COEFS for x in ("inf", "-inf")),
    ("ppo", "--num-minibatches 512", "minibatch", "2 steps"),
    ("ppo", "--num-minibatches 0", "--num-minibatches", "above 0"),
    ("ppo", "--num-steps -128", "--num-steps", "above 0"),
    ("ppo", "--update-epochs 0", "--update-epochs", "above 0"),
    ("ppo", "--max-grad-norm nan", "--max-grad-norm"),
    ("a2c", "--num-steps 0", "--num-steps", "above 0"),
    ("a2c", "--max-grad-norm 0", "--max-grad-norm", "above 0"),
    ("reinforce", "--baseline mean --num-envs 1", "--baseline mean", "2 environments"),
    *(
        (s, f"--{name} {x}", f"--{name}", "above 0")
        for s in REPLAY
        for name in "buffer-size batch-size train-frequency gradient-steps tau".split()
        for x in "0 -1".split()
    ),
    *((s, "--tau 1.1", "--tau", "above 1") for s in REPLAY),
    *((s, "--learning-starts -1", "--learning-starts", "below 0") for s in REPLAY),
    *((s, "--buffer-size 10_000_000_000_000 --total-timesteps 10_000_000_000_000", "buffer-size") for s in REPLAY),
    *((s, f"--q-lr {x}", "--q-lr", "above 0") for s in REPLAY if s != "dqn" for x in ("0", "inf")),
    *((s, "--q-lr nan", "--q-lr", "NaN") for s in REPLAY if s != "dqn"),
    *((s, "--exploration-noise -0.1", "--exploration-noise", "below 0") for s in ("ddpg", "td3")),
    ("td3", "--policy-frequency 0", "--policy-frequency", "above 0"),
    ("td3", "--policy-noise -1", "--policy-noise", "below 0"),
    ("td3", "--noise-clip nan", "--noise-clip"),
    ("sac", "--alpha 0", "--alpha", "above 0"),
    ("dqn", "--target-network-frequency 0", "--target-network-frequency", "above 0"),
    ("dqn", "--huber-delta 0", "--huber-delta", "above 0"),
    ("dqn", "--huber-delta nan", "--huber-delta", "NaN"),
    *(("dqn", f"--{name} 1.1", f"--{name}", "above 1") for name in ("start-e", "end-e", "eval-epsilon")),
    ("dqn", "--exploration-fraction -1", "--exploration-fraction", "below 0"),
    ("dqn", "--exploration-fraction 2", "--exploration-fraction"),
    *((s, "--env-id tests.envs:Unbounded-v0", "finite bounds", "inf", "ppo.py") for s in ("ddpg", "td3", "sac")),
]
CASES = [(script, *case) for script in SCRIPTS for case in BAD_FLAGS] + OWN_FLAGS


@pytest.mark.parametrize("script, bad, words", [(s, f, words) for s, f, *words in CASES], ids=lambda x: str(x)[:40])
def test_bad_flags_get_one_line_before_any_training(script, bad, words, refused):
    line = refused(script, *bad.split())
    assert all(word in line for word in words), line


@pytest.mark.parametrize("bad", ("--num-envs two", "--total-timesteps 1e6", "--device tpu", "--gama 0.9"))
@each_script
def test_flags_that_tyro_cannot_read_get_exit_code_2(script, bad, here):
    with pytest.raises(SystemExit) as end:
        train(script, *bad.split())
    assert end.value.code == 2 and not any(here.iterdir())


@each_script
def test_the_shell_sees_exit_code_2_and_one_line(script, here):
    done = run(script, "--env-id", "Pendulun-v1", cwd=here, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}.py: error: ") and done.stderr.count("\n") == 1
    assert "`Pendulum`" in done.stderr and not any(here.iterdir())


@each_script
def test_tracking_without_a_login_is_refused(script, here):
    """The address is that of nobody: what would ask the network fails at once."""
    login = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(here), "NETRC": str(here / "netrc")}
    quiet = {"WANDB_DIR": str(here), "WANDB_ERROR_REPORTING": "false", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = run(script, "--track", cwd=here, env=login | quiet, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}.py: error: --track: ") and done.stderr.count("\n") == 1
    assert "wandb login" in done.stderr and "WANDB_MODE=offline" in done.stderr
    assert not (here / "runs").exists()


@each_script
def test_filming_without_moviepy_is_refused(script, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    assert "pip install moviepy" in refused(script, "--capture-video")


@each_script
def test_filming_an_environment_that_cannot_be_seen_is_refused_before_the_training(script, refused):
    pytest.importorskip("moviepy")
    assert "rgb_array" in refused(script, *flags(script, "--env-id", tiny_env(script, "Raises"), "--capture-video"))


@each_script
def test_a_runs_folder_that_cannot_be_written_is_refused(script, refused, here):
    (here / "file").touch()
    assert "cannot be written" in refused(script, *flags(script, "--runs-dir", "file"))


def test_a_folder_that_cannot_be_written_is_refused_with_its_flags_as_they_were(stopped, refused, monkeypatch):
    script, folder = stopped
    before, rows = (folder / "args.json").read_bytes(), (folder / "metrics.jsonl").read_bytes()

    def read_only(file):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", read_only)
        assert "Read-only" in refused(script, "--resume", folder, "--eval-episodes", "3")
    assert (folder / "metrics.jsonl").read_bytes() == rows
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").mkdir()
    assert "directory" in refused(script, "--resume", folder, "--eval-episodes", "3")
    assert (folder / "args.json").read_bytes() == before and not (folder / "args.json.part").exists()


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory) -> tuple[str, Path]:
    """A script and the folder of a run of it that has a checkpoint.pt beside its agent.pt."""
    more = ("--checkpoint-every", "1000", "--runs-dir", tmp_path_factory.mktemp("finished"), "--seed", "3")
    return request.param, train(request.param, *flags(request.param, *more))


@pytest.fixture
def stopped(finished, here) -> tuple[str, Path]:
    """A script and a copy of such a folder as a run that was stopped leaves it: without agent.pt."""
    script, folder = finished
    shutil.copytree(folder, here / "run")
    (here / "run" / "agent.pt").unlink()
    return script, here / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def not_resumed(refused):
    """A function that checks that --resume refuses the folder and leaves it as it is; returns the line on stderr."""

    def ended(script: str, folder: Path, *flags: str) -> str:
        before = contents(folder)
        line = refused(script, "--resume", folder, *flags)
        assert str(folder) in line and contents(folder) == before
        return line

    return ended


@pytest.mark.parametrize("size", (0, 1, 0.5, -1), ids=("nothing", "a byte", "half", "all but a byte"))
def test_a_torn_checkpoint_is_refused(stopped, not_resumed, size):
    script, folder = stopped
    whole = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(whole[: size if isinstance(size, int) else int(size * len(whole))])
    assert "torn" in not_resumed(script, folder)


def test_a_checkpoint_of_garbage_is_refused(stopped, not_resumed):
    script, folder = stopped
    (folder / "checkpoint.pt").write_bytes(bytes(range(256)) * 64)
    assert "cannot be read" in not_resumed(script, folder)


def test_no_flipped_bit_gets_into_a_resumed_run(stopped, capsys):
    """Some bits of the file mean nothing (padding, for instance); flipping any other is noticed."""
    script, folder = stopped
    module = importlib.import_module(script)
    path, args = folder / "checkpoint.pt", module.Args(resume=str(folder))
    whole = path.read_bytes()
    good = module.load_run(args)[1]
    weight = max((x for x in good["states"]["agent"].values() if x.dtype.is_floating_point), key=torch.numel)
    inside = whole.index(weight.numpy().tobytes()) + weight.nbytes // 2
    generator, refusals = random.Random(0), 0
    for place in (inside, *(generator.randrange(len(whole)) for _ in range(50))):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            assert equal(module.load_run(args)[1], good)
        except SystemExit as end:
            assert end.code == 2 and str(folder) in capsys.readouterr().err
            refusals += 1
        assert refusals, "the first flip is in the middle of a weight"


def equal(x, y) -> bool:
    """Whether two checkpoints hold the same."""
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(equal, x, y))
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("other", ({}, {"step": 3}, {"step": 3, "states": {"agent": 3}}, [1, 2], "agent.pt"), ids=str)
def test_a_file_that_torch_reads_but_is_no_checkpoint_is_refused(stopped, finished, not_resumed, other):
    script, folder = stopped
    torch.save(other, folder / "checkpoint.pt")
    if other == "agent.pt":
        shutil.copy(finished[1] / "agent.pt", folder / "checkpoint.pt")
    not_resumed(script, folder)


@pytest.mark.parametrize(
    "save", (torch.save, lambda x, file: pickle.dump(x, file, protocol=2)), ids=("torch", "pickle")
)
def test_a_crafted_checkpoint_is_refused_and_not_executed(stopped, not_resumed, here, save):
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (str(here / "executed"),)

    script, folder = stopped
    with (folder / "checkpoint.pt").open("wb") as file:
        save({"step": 1000, "states": Crafted()}, file)
    not_resumed(script, folder)
    assert not (here / "executed").exists()


@pytest.mark.parametrize("text", ("", '{"script": "ppo", "env_id', "[]", "{}", "3"))
def test_flags_that_cannot_be_read_are_refused(stopped, not_resumed, text):
    script, folder = stopped
    (folder / "args.json").write_text(text)
    not_resumed(script, folder)


def test_a_run_from_before_a_flag_was_there_has_its_default(stopped):
    script, folder = stopped
    old = json.loads((folder / "args.json").read_text())
    del old["gamma"]
    (folder / "args.json").write_text(json.dumps(old))
    train(script, "--resume", folder)
    assert (folder / "agent.pt").exists()
    assert json.loads((folder / "args.json").read_text())["gamma"] == importlib.import_module(script).Args.gamma


def test_a_run_with_a_flag_that_the_script_does_not_have_is_refused(stopped, not_resumed):
    script, folder = stopped
    old = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(old | {"a_flag_of_once": 1}))
    not_resumed(script, folder)


@pytest.mark.parametrize("missing", ("args.json", "checkpoint.pt"))
def test_a_folder_with_a_part_missing_is_refused(stopped, not_resumed, missing):
    script, folder = stopped
    (folder / missing).unlink()
    assert "nothing to go on from" in not_resumed(script, folder)


def test_a_run_of_another_script_is_refused(stopped, not_resumed):
    script, folder = stopped
    other = SCRIPTS[SCRIPTS.index(script) - 1]
    assert f"{script}.py" in not_resumed(other, folder)


def test_a_run_of_another_environment_or_seed_is_refused(stopped, not_resumed):
    script, folder = stopped
    env_id = importlib.import_module(script).Args.env_id
    assert f"--env-id {env_id}" in not_resumed(script, folder, "--env-id", "Acrobot-v1")
    assert "--seed 3" in not_resumed(script, folder, "--seed", "4")


@each_script
def test_a_run_of_another_environment_or_seed_is_refused_even_where_the_flag_equals_the_default(script, here):
    folder = train(script, *flags(script, "--env-id", tiny_env(script, "Ledger"), "--seed", "3"))
    before = contents(folder)
    defaults = importlib.import_module(script).Args()
    for name in ("env_id", "seed"):
        flag = (f"--{name.replace('_', '-')}", str(getattr(defaults, name)))
        done = run(script, "--resume", folder, *flag, cwd=here, check=False)
        assert done.returncode == 2 and flag[0] in done.stderr and contents(folder) == before


def test_a_checkpoint_of_other_networks_is_refused(stopped, not_resumed):
    script, folder = stopped
    other = {"dqn": ("--dueling",), "ddpg": (), "td3": (), "sac": ()}.get(script, ("--no-norm-obs",))
    for flag in filter(None, (other, ("--hidden-sizes", "8", "8"))):
        assert "does not fit" in not_resumed(script, folder, *flag)
    if script in REPLAY:
        assert "does not fit: its replay buffer" in not_resumed(script, folder, "--buffer-size", "1000")


def test_more_steps_after_the_end_need_a_checkpoint(finished, stopped, not_resumed):
    script, folder = stopped
    (folder / "checkpoint.pt").unlink()
    shutil.copy(finished[1] / "agent.pt", folder)
    assert "without a checkpoint" in not_resumed(script, folder, "--total-timesteps", "5000")


def all_finite(state) -> bool:
    if isinstance(state, dict):
        return all(map(all_finite, state.values()))
    if isinstance(state, (list, tuple)):
        return all(map(all_finite, state))
    return bool(torch.as_tensor(state).isfinite().all()) if isinstance(state, (torch.Tensor, float)) else True


@each_script
def test_observations_that_turn_nan_stop_the_run_and_the_checkpoint_stays_good(script, refused, here):
    more = ("--env-id", tiny_env(script, "NaN"), "--checkpoint-every", "200", "--log-every", "10")
    line = refused(script, *flags(script, *more), code=1)
    folder = only_run(here)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 0 < saved["step"] <= 600 and all_finite(saved)
    assert rows(folder)[-1]["global_step"] >= saved["step"]
    assert "not finite at step " in line and "smaller learning rates" in line and f"--resume runs/{folder.name}" in line
    assert {path.name for path in folder.iterdir()} == {"args.json", "metrics.jsonl", "checkpoint.pt"}


@each_script
def test_a_learning_rate_too_high_stops_the_run(script, refused, here):
    line = refused(script, *flags(script, "--learning-rate", "1e30"), code=1)
    assert "not finite at step " in line and "no checkpoint" in line
    assert not (only_run(here) / "agent.pt").exists()
    rows(only_run(here))


@each_script
def test_an_environment_that_raises_ends_the_run_with_its_message_and_the_way_on(script, here):
    more = ("--env-id", tiny_env(script, "Raises"), "--checkpoint-every", "200", "--log-every", "10")
    with pytest.raises(RuntimeError, match="the environment broke") as error:
        train(script, *flags(script, *more))
    folder = only_run(here)
    step = rows(folder)[-1]["global_step"]
    assert f"at step {step:,}; --resume runs/{folder.name} goes on from" in error.value.__notes__[0]
    assert 500 <= step <= 600 and all_finite(torch.load(folder / "checkpoint.pt", weights_only=True))


@each_script
def test_an_evaluation_without_environments_ends_the_run_with_the_way_on(script, here, monkeypatch, capsys):
    monkeypatch.setenv("LIMIT", "2")
    monkeypatch.setattr("tests.envs.Limited.made", 0)
    more = ("--env-id", tiny_env(script, "Limited"), "--checkpoint-every", "500", "--eval-every", "500")
    with pytest.raises(SystemExit) as end:
        train(script, *flags(script, *more))
    folder = only_run(here)
    reason, way_on = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and "no license for another one" in reason
    assert way_on.startswith("It ended the run at step 5") and f"--resume runs/{folder.name} goes on from" in way_on
    monkeypatch.setenv("LIMIT", "100")
    train(script, "--resume", folder)
    assert "eval/episodic_return" in rows(folder)[-1] and (folder / "agent.pt").exists()


@each_script
def test_a_last_evaluation_that_raises_can_be_made_again(script, here, monkeypatch):
    def evaluate(*inputs):
        raise RuntimeError("the evaluation broke")

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module(script), "evaluate", evaluate)
        with pytest.raises(RuntimeError, match="the evaluation broke") as error:
            train(script, *flags(script))
    folder = only_run(here)
    assert f"--resume runs/{folder.name} goes on from" in error.value.__notes__[0]
    train(script, "--resume", folder)
    assert "eval/episodic_return" in rows(folder)[-1]


@each_script
def test_a_full_disk_costs_the_checkpoint_in_hand_and_no_more(script, refused, here, monkeypatch):
    first, fsync = [], os.fsync

    def full_after_the_first(file):
        for path in here.glob("runs/*/checkpoint.pt"):
            first.append(path.read_bytes())
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_the_first)
        line = refused(script, *flags(script, "--checkpoint-every", "500"), code=1)
    assert "No space left on device" in line and "checkpoint.pt" in line
    left = contents(only_run(here))
    assert left.keys() == {"args.json", "metrics.jsonl", "checkpoint.pt"} and left["checkpoint.pt"] == first[0]
    train(script, "--resume", only_run(here))
    assert (only_run(here) / "agent.pt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_disk_too_full_for_a_row_gets_one_line(stopped, refused):
    script, folder = stopped
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    assert "No space left on device" in refused(script, "--resume", folder, code=1)
