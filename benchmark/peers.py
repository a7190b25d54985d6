"""What Stable-Baselines3 returns here, with RL Zoo's settings, in cells most of which stay below a published number.

    pip install -r requirements.txt -r benchmark/requirements.txt "gymnasium[box2d]~=1.4.0"
    python benchmark/peers.py                         # every case, seeds 11 to 15
    python benchmark/peers.py --cases dqn-MountainCar

Then the same environments, versions and evaluation (20 episodes without exploration, at the end) are behind both
numbers. Most published ones are of one run, or of older environments. A run that is in the table with the same settings
is skipped; plot.py puts the means beside our own, of the last row of each seed.
"""

import csv
import hashlib
import importlib.metadata
import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from collect import fail
from experiments import EVAL_EPISODES
from run import made_with
from speed import append

# The settings of RL Zoo (DLR-RM/rl-baselines3-zoo, hyperparams/).
DQN = dict(batch_size=128, exploration_fraction=0.12, exploration_final_eps=0.1, policy_kwargs=dict(net_arch=[256] * 2))
DQN_LANDER = DQN | dict(learning_rate=6.3e-4, buffer_size=50_000, learning_starts=0, target_update_interval=250)
DQN_LANDER |= dict(train_freq=4, gradient_steps=-1)
DQN_CAR = DQN | dict(learning_rate=4e-3, buffer_size=10_000, learning_starts=1_000, target_update_interval=600)
DQN_CAR |= dict(gamma=0.98, exploration_fraction=0.2, exploration_final_eps=0.07, train_freq=16, gradient_steps=8)
DQN_POLE = DQN | dict(learning_rate=2.3e-3, batch_size=64, buffer_size=100_000, learning_starts=1_000)
DQN_POLE |= dict(train_freq=256, gradient_steps=128, target_update_interval=10)
DQN_POLE |= dict(exploration_fraction=0.16, exploration_final_eps=0.04)
PPO_PENDULUM = dict(n_steps=1024, gamma=0.9, learning_rate=1e-3, use_sde=True, sde_sample_freq=4)
LANDER = "LunarLander-v3"
# name: our script, environment, steps, class of the peer, its environments, its arguments ("lin": annealed to zero)
CASES = {
    "a2c-LunarLander": ("a2c", LANDER, 200_000, "A2C", 8, dict(gamma=0.995, learning_rate="lin_8.3e-4", ent_coef=1e-5)),
    "dqn-LunarLander": ("dqn", LANDER, 100_000, "DQN", 1, DQN_LANDER),
    "dqn-Acrobot": ("dqn", "Acrobot-v1", 100_000, "DQN", 1, DQN_LANDER),
    "dqn-CartPole": ("dqn", "CartPole-v1", 50_000, "DQN", 1, DQN_POLE),
    "dqn-MountainCar": ("dqn", "MountainCar-v0", 120_000, "DQN", 1, DQN_CAR),
    "ppo-Pendulum": ("ppo", "Pendulum-v1", 100_000, "PPO", 4, PPO_PENDULUM),
}
RESULT = ("script", "env_id", "steps", "seed", "return", "return_std", "episodes", "wall_s")
FIELDS = (*RESULT, "settings", "versions", "machine")


@dataclass
class Options:
    cases: tuple[str, ...] = tuple(CASES)  # which of the cases
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15)  # a run with each
    out: Path = Path(__file__).with_name("peers.csv")  # where a row a run is appended


def settings_of(case: str) -> str:
    """A short hash of what a case consists of."""
    return hashlib.sha256(json.dumps(CASES[case], sort_keys=True).encode()).hexdigest()[:8]


def run(case: str, seed: int) -> dict:
    """One run of the peer on one thread; returns its row."""
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    script, env_id, steps, name, num_envs, options = CASES[case]
    rate = options.get("learning_rate")
    if isinstance(rate, str):
        options = options | dict(learning_rate=lambda remaining: remaining * float(rate.removeprefix("lin_")))
    start = time.perf_counter()
    envs = make_vec_env(env_id, num_envs, seed=seed)
    model = getattr(stable_baselines3, name)("MlpPolicy", envs, seed=seed, device="cpu", **options).learn(steps)
    wall = time.perf_counter() - start
    fresh = make_vec_env(env_id, 1, seed=seed + 10_000)
    mean, std = evaluate_policy(model, fresh, n_eval_episodes=EVAL_EPISODES, deterministic=True)
    row = dict(script=script, env_id=env_id, steps=steps, seed=seed, episodes=EVAL_EPISODES, wall_s=round(wall, 1))
    row["settings"] = settings_of(case)
    made = made_with(script)
    made["versions"] += f", stable-baselines3 {importlib.metadata.version('stable-baselines3')}"
    return row | {"return": round(float(mean), 3), "return_std": round(float(std), 3)} | made


def main(options: Options) -> None:
    """Runs what is not in the table yet."""
    for case in options.cases:
        if case not in CASES:
            fail(f"--cases {case}: there are {', '.join(CASES)}")
    if not options.out.parent.is_dir():
        fail(f"--out {options.out}: there is no folder {options.out.parent}")
    key = ("script", "env_id", "steps", "seed", "settings")
    rows = list(csv.DictReader(options.out.open(newline=""))) if options.out.exists() else []
    if any(row.keys() != set(FIELDS) for row in rows):
        fail(f"--out {options.out}: its columns are not {', '.join(FIELDS)}")
    done = {tuple(row[name] for name in key) for row in rows}
    for seed in options.seeds:
        for case in options.cases:
            if (*map(str, CASES[case][:3]), str(seed), settings_of(case)) in done:
                continue
            row = run(case, seed)
            append(options.out, FIELDS, row)
            print(f"{case} seed {seed}: {row['return']:.1f} ± {row['return_std']:.1f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
