"""Learning gates: fixed seeds, the commands of the README, evaluation without exploration on fresh environments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PENDULUM = "--env-id Pendulum-v1 --total-timesteps 100000 --gamma 0.95 --gae-lambda 0.9 --init-log-std 0 "
PENDULUM += "--learning-rate 1e-3 --num-steps 256 --update-epochs 10 --num-minibatches 16"
HALFCHEETAH = "--env-id HalfCheetah-v5 --total-timesteps 1000000 --num-envs 64 --num-steps 32 --update-epochs 10 "
HALFCHEETAH += "--num-minibatches 32 --learning-rate 3e-4 --init-log-std -1"

HALFCHEETAH_100K = "--env-id HalfCheetah-v5 --total-timesteps 100000 --learning-starts "
ACROBOT = "--env-id Acrobot-v1 --total-timesteps 100000"
VALUE = [("dqn", "", 490), ("dqn", ACROBOT, -80), ("ddpg", "", -160), ("td3", "", -160), ("sac", "", -160)]
CHEETAH = [
    ("ddpg", HALFCHEETAH_100K + "5000", 4000),
    ("td3", HALFCHEETAH_100K + "10000", 4800),
    ("sac", HALFCHEETAH_100K + "10000", 6000),
]


def final_return(script, tmp_path, seed, flags=""):
    """Trains from the command line; the return of the last evaluation."""
    command = [sys.executable, ROOT / f"{script}.py", "--seed", str(seed), "--runs-dir", tmp_path, *flags.split()]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    (metrics,) = tmp_path.glob(f"*__{script}__{seed}__*/metrics.jsonl")
    return json.loads(metrics.read_text().splitlines()[-1])["eval/episodic_return"]


@pytest.mark.parametrize("script, enough", [("reinforce", 450), ("a2c", 450), ("ppo", 475)])
def test_cartpole_at_the_default_settings(script, enough, tmp_path):
    assert final_return(script, tmp_path, seed=1) >= enough


def test_ppo_learns_pendulum_with_the_flags_of_the_readme(tmp_path):
    assert PENDULUM in (ROOT / "README.md").read_text()
    assert final_return("ppo", tmp_path, 1, PENDULUM) >= -300


def test_dqn_learns_cartpole_at_the_default_settings(tmp_path):
    """A random policy returns about 20. Not every seed reaches 500 yet: the slow test asks for that."""
    assert final_return("dqn", tmp_path, 1) >= 200


@pytest.mark.parametrize("script", ["ddpg", "td3", "sac"])
def test_pendulum_at_a_third_of_the_default_steps(script, tmp_path):
    """A random policy returns about -1200. A seed may fail in some episodes still; then the next one must not."""
    assert any(final_return(script, tmp_path, seed, "--total-timesteps 7000") >= -300 for seed in (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, enough", VALUE)
def test_the_value_rungs_over_five_seeds(script, flags, enough, tmp_path):
    """20 episodes each; the commands of the README."""
    assert f"python {script}.py {flags}".strip() in (ROOT / "README.md").read_text()
    returns = [final_return(script, tmp_path, seed, flags + " --eval-episodes 20") for seed in range(1, 6)]
    assert sum(returns) / 5 >= enough, returns


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, enough", CHEETAH)
def test_the_value_rungs_on_halfcheetah(script, flags, enough, tmp_path):
    """100,000 steps, 20 episodes, three seeds: hours on two cores."""
    assert f"python {script}.py {flags}" in (ROOT / "README.md").read_text()
    returns = [final_return(script, tmp_path, seed, flags + " --eval-episodes 20") for seed in (1, 2, 3)]
    assert sum(returns) / 3 >= enough, returns


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_reinforce_learns_with_each_baseline(baseline, tmp_path):
    """Noisier than with the value baseline: five times the return of a random policy (about 20)."""
    assert final_return("reinforce", tmp_path, 1, f"--baseline {baseline}") >= 100


@pytest.mark.slow
@pytest.mark.parametrize("script, enough, least", [("reinforce", 450, 8), ("a2c", 450, 8), ("ppo", 475, 9)])
def test_cartpole_over_ten_seeds(script, enough, least, tmp_path):
    returns = [final_return(script, tmp_path, seed) for seed in range(1, 11)]
    assert sum(x >= enough for x in returns) >= least, returns


@pytest.mark.slow
@pytest.mark.parametrize("flags, enough", [("--env-id HalfCheetah-v5", 1000), (HALFCHEETAH, 3000)])
def test_ppo_learns_halfcheetah(flags, enough, tmp_path):
    """Standing still returns 0, a random policy about -280; what a seed reaches depends on its gait: hence three."""
    assert flags in (ROOT / "README.md").read_text()
    returns = [final_return("ppo", tmp_path, seed, flags) for seed in (1, 2, 3)]
    assert sum(returns) / 3 >= enough, returns


@pytest.mark.slow
@pytest.mark.parametrize("script", ["reinforce", "a2c"])
def test_gaussian_policies_learn_to_balance(script, tmp_path):
    """Half of the 1000 that can be had; a random policy falls over after about 5."""
    flags = "--env-id InvertedPendulum-v5 --total-timesteps 200000"
    assert final_return(script, tmp_path, 1, flags) >= 500
