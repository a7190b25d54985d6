# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13", "gymnasium[classic-control,mujoco]>=1.4", "tyro>=1.0", "wandb", "numpy", "tqdm"]
# ///
"""Twin Delayed DDPG: DDPG with three remedies for the errors of its critic.

In each update, on a minibatch of a replay buffer (Algorithm 1 of the paper):

    a'       = clip(mu'(s') + clip(noise, -c, c), -1, 1)        target policy smoothing, noise N(0, sigma^2)
    y        = r + gamma (1 - terminated) min_i Qi'(s', a')     the target of both critics, Q1 and Q2
    L(Q)     = E[ (Q1(s, a) - y)^2 + (Q2(s, a) - y)^2 ]         the critics go down L
    J(mu)    = E[ Q1(s, mu(s)) ]                                the actor mu goes up J, in the first of every d updates
    Q'       = tau Q + (1 - tau) Q', and mu' likewise           the target networks follow slowly, when mu moves

E is the mean over transitions (s, a, r, s') from the buffer: state, action, reward, next state. Q(s, a), the critic,
estimates the discounted return that follows action a in state s. A prime marks what comes next (s', a'), and on a
network (Q') its target network. No gradient goes through y, and each loss moves its own parameters only.

An actor that climbs Q finds the errors of Q that look like good actions, and the target spreads them. Two critics
with different initial weights err differently: the lower of them seldom promises too much (clipped double Q-learning).
The noise in a' averages Q' over similar actions, so that no narrow peak pays; c is --noise-clip. The delay lets the
critics settle before the actor follows them; d is --policy-frequency, sigma --policy-noise.

Learning is off-policy: the networks choose the action in s', so transitions of older policies serve as well.
To explore, the first --learning-starts actions are random; later ones mu(s) plus Gaussian noise, clipped to [-1, 1].

After termination there is no further reward. A time limit (truncation) only cuts the episode short: y still has what
would have followed s'.
Actions are in units where the bounds of each dimension are -1 and 1.

Fujimoto, van Hoof and Meger 2018, "Addressing function approximation error in actor-critic methods", arXiv 1802.09477.

    python td3.py                                                  # Pendulum-v1
    python td3.py --env-id HalfCheetah-v5 --total-timesteps 100000 --learning-starts 10000
    python td3.py --resume runs/FOLDER --capture-video             # film a finished run

The diff from ddpg.py is these three ideas: twin critics, smoothed targets, a delayed actor.
"""

import copy
import importlib.util
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
import zipfile
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch import Tensor
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Pendulum-v1"  # Gymnasium's id of the environment; `module:Id` imports the module first
    seed: int = 1  # seed of every random generator
    total_timesteps: int = 20_000  # steps, each a transition of one environment; rounded up to whole iterations
    num_envs: int = 1  # environments that step together
    learning_rate: float = 1e-3  # step size of the actor (TD3's paper; SAC's: 3e-4)
    gamma: float = 0.99  # discount factor (that of most papers)
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"  # where to train; auto takes a GPU if there is one
    num_threads: int = 1  # CPU threads of torch; one is fastest for small networks, or if every core has a run
    onednn: bool = True  # multiply with oneDNN where that stays float32: faster for wide layers on AMD with AVX-512
    compile: bool = False  # compile the update with torch.compile; on the CPU needs a C++ compiler
    track: bool = False  # log to Weights & Biases as well (WANDB_MODE=offline works)
    wandb_project_name: str = "rungs"  # project on Weights & Biases
    wandb_entity: str | None = None  # team on Weights & Biases
    wandb_group: str | None = None  # group of runs on Weights & Biases
    capture_video: bool = False  # film the first episode of each evaluation
    runs_dir: str = "runs"  # where the run's folder is made
    log_every: int = 2_000  # steps between two rows of metrics
    eval_episodes: int = 10  # episodes in an evaluation, all without exploration; 0 for no evaluation
    eval_every: int = 0  # steps between two evaluations; 0 for the one at the end only
    checkpoint_every: int = 0  # steps between two checkpoints, each of which resets the environments; 0 for none
    resume: str = ""  # folder of a run to go on with; its flags apply, except those given here

    hidden_sizes: tuple[int, int] = (256, 256)  # units of the two hidden layers of each network (SAC's paper)
    buffer_size: int = 1_000_000  # transitions in the replay buffer (as in the papers); the oldest give way
    learning_starts: int = 1_000  # first steps, with uniformly random actions, no updates (TD3's paper: 1k or 10k)
    train_frequency: int = 1  # steps between two turns of learning
    gradient_steps: int = 1  # updates in a turn of learning
    batch_size: int = 256  # transitions in an update (SAC's paper)
    tau: float = 0.005  # how far a target network moves towards its network in an update (TD3's paper); 1 copies it
    q_lr: float = 1e-3  # step size of Q (TD3's paper)
    exploration_noise: float = 0.1  # standard deviation of the noise on actions where bounds are +-1 (TD3's paper)
    policy_frequency: int = 2  # d: updates of the critics for one of the actor and the target networks (the paper's)
    policy_noise: float = 0.2  # sigma: standard deviation of the noise on the actions of the target (the paper's)
    noise_clip: float = 0.5  # c: the largest noise on the actions of the target (the paper's)


# ----- networks -------------------------------------------------------------------------------------------------------


class Module(nn.Module):
    """nn.Module whose submodules are plain attributes too: to look one up takes a fourth as long as a small layer."""

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(name, value)
        if name in self._modules:
            self.__dict__[name] = value


class Linear(nn.Linear):
    """nn.Linear whose calls run no hooks: looking for them, and for weight and bias, takes as long as the rest."""

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._parameters.values()
        if torch.compiler.is_compiling():  # bias and ReLU in one kernel; a plus would be fused into the product again
            return x @ weight.T - -bias
        return nn.functional.linear(x, weight, bias)


class DeterministicActor(Module):
    """mu(s): the action in each state."""

    def __init__(self, obs_dim: int, hidden_sizes: tuple[int, int], action_dim: int):
        super().__init__()
        h1, h2 = hidden_sizes
        self.fc1, self.fc2, self.out = Linear(obs_dim, h1), Linear(h1, h2), Linear(h2, action_dim)

    def forward(self, obs: Tensor) -> Tensor:
        """Actions (B, action_dim) between -1 and 1 for obs (B, obs_dim)."""
        hidden = self.fc2(self.fc1(obs).relu_()).relu_()
        return self.out(hidden).tanh()


class Critic(Module):
    """Q1(s, a) and Q2(s, a) side by side: one batched product per layer takes less time than two."""

    def __init__(self, obs_dim: int, hidden_sizes: tuple[int, int], action_dim: int):
        super().__init__()
        h1, h2 = hidden_sizes
        twins = [[Linear(obs_dim + action_dim, h1), Linear(h1, h2), Linear(h2, 1)] for _ in range(2)]
        for i, layers in enumerate(zip(*twins), 1):
            setattr(self, f"w{i}", nn.Parameter(torch.stack([layer.weight.T for layer in layers])))  # (2, in, out)
            setattr(self, f"b{i}", nn.Parameter(torch.stack([layer.bias[None] for layer in layers])))  # (2, 1, out)

    def forward(self, obs: Tensor, action: Tensor, both: bool = True) -> Tensor:
        """Q1 and Q2 (2, B) for obs (B, obs_dim) and action (B, action_dim), or Q1 alone (1, B) if not `both`."""
        w1, b1, w2, b2, w3, b3 = (x if both else x[:1] for x in self._parameters.values())
        hidden = torch.cat([obs, action], dim=-1).expand(len(w1), -1, -1)
        hidden = torch.baddbmm(b1, hidden, w1).relu_()
        hidden = torch.baddbmm(b2, hidden, w2).relu_()
        return torch.baddbmm(b3, hidden, w3).squeeze(-1)


class Agent(Module):
    """The networks mu and Q, and the target networks."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args, device: torch.device):
        super().__init__()
        space, sizes = envs.single_action_space, args.hidden_sizes
        obs_dim = math.prod(envs.single_observation_space.shape)
        self.action_dim = math.prod(space.shape)
        self.actor = DeterministicActor(obs_dim, sizes, self.action_dim)
        self.critic = Critic(obs_dim, sizes, self.action_dim)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.exploration_noise = args.exploration_noise
        self.space = space
        self.center, self.half_width = space.low / 2 + space.high / 2, space.high / 2 - space.low / 2
        self.device = device
        self.to(device)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, explore: bool) -> np.ndarray:
        """Actions (N, action_dim) for obs (N, obs_dim): mu(s), with noise to explore."""
        action = self.actor(as_floats(torch.from_numpy(obs)).to(self.device))
        if explore:
            action = (action + self.exploration_noise * torch.randn_like(action)).clamp(-1, 1)
        return action.cpu().numpy()

    def random_action(self, num_envs: int) -> np.ndarray:
        """Uniformly random actions, in the form of those of `act`."""
        return np.random.uniform(-1, 1, (num_envs, self.action_dim)).astype(np.float32)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """The actions of `act` as the environments take them."""
        action = self.center + self.half_width * action.reshape(-1, *self.space.shape)
        action = action.clip(self.space.low, self.space.high)
        return (action.round() if np.issubdtype(self.space.dtype, np.integer) else action).astype(self.space.dtype)


# ----- memory ---------------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """B transitions on the training device."""

    obs: Tensor  # (B, obs_dim) float32, in the buffer uint8 if the environments' are
    action: Tensor  # (B,) int64 or (B, action_dim) float32, as the agent chose them
    reward: Tensor  # (B,) float32
    next_obs: Tensor  # (B, obs_dim) as obs, what the step led to, before any reset
    terminated: Tensor  # (B,) bool


def as_floats(obs: Tensor) -> Tensor:
    """Observations as the networks take them: float32, bytes divided by 255."""
    return obs / 255 if obs.dtype == torch.uint8 else obs.float()


class ReplayBuffer:
    """The most recent transitions: a ring of preallocated tensors on the training device."""

    def __init__(self, envs: gym.vector.VectorEnv, size: int, device: torch.device):
        """A ring of `size` transitions, or of `num_envs` if that is more."""
        self.size, self.added = max(size, envs.num_envs), 0
        obs_space, action_space = envs.single_observation_space, envs.single_action_space
        obs = (math.prod(obs_space.shape),), (torch.uint8 if obs_space.dtype == np.uint8 else torch.float32)
        discrete = isinstance(action_space, gym.spaces.Discrete)
        action = ((), torch.int64) if discrete else ((math.prod(action_space.shape),), torch.float32)
        kinds = Transitions(obs, action, ((), torch.float32), obs, ((), torch.bool))  # the shape and dtype of each
        megabytes = self.size * sum(math.prod(shape) * dtype.itemsize for shape, dtype in kinds) / 1e6
        self.about = f"replay buffer: {self.size:,} transitions, {megabytes:,.1f} MB on {device}"
        free = free_memory(device)
        require(megabytes * 1e6 < free, f"{self.about}, which has {free / 1e6:,.0f} MB; lower --buffer-size")
        self.rows = Transitions(*(torch.empty(self.size, *shape, dtype=dtype, device=device) for shape, dtype in kinds))
        self.arrays = [x.numpy() if x.is_cpu else x for x in self.rows]  # numpy assigns a few numbers faster than torch

    def add(self, *transitions: np.ndarray) -> None:
        """Adds one transition of each environment: arrays (N, ...) in the order of the fields of Transitions."""
        start, count = self.added % self.size, len(transitions[0])
        whole = start + count <= self.size  # then a slice will do, which is faster
        places = slice(start, start + count) if whole else np.arange(start, start + count) % self.size
        for rows, new in zip(self.arrays, transitions):
            rows[places] = new if isinstance(rows, np.ndarray) else torch.from_numpy(new).to(rows)
        self.added += count

    def sample(self, batch_size: int) -> Transitions:
        """Transitions drawn uniformly, with replacement."""
        indices = torch.randint(min(self.added, self.size), (batch_size,), device=self.rows.reward.device)
        batch = Transitions(*(rows.index_select(0, indices) for rows in self.rows))
        return batch._replace(obs=as_floats(batch.obs), next_obs=as_floats(batch.next_obs))

    def state_dict(self) -> dict[str, Tensor | int]:
        """What a checkpoint needs: the part of the ring that is filled."""
        return {"added": self.added} | {name: x[: self.added].clone() for name, x in self.rows._asdict().items()}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Goes on from `state`: all of it must fit, and a ring that has begun to overwrite keep its size."""
        filled = min(state["added"], self.size)
        if filled != len(state["reward"]):
            raise ValueError(f"its replay buffer holds {len(state['reward'])} transitions, not {self.size}")
        self.added = state["added"]
        for name, rows in self.rows._asdict().items():
            rows[:filled] = state[name]


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU, or all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def true_next_obs(next_obs: np.ndarray, done: np.ndarray, infos: dict) -> np.ndarray:
    """The observations (N, obs_dim) that the step led to: the last of an old episode, not the first of a new one."""
    if "final_obs" in infos:
        next_obs = next_obs.copy()
        next_obs[done] = np.stack(infos["final_obs"][done])
    return next_obs


# ----- algorithm ------------------------------------------------------------------------------------------------------


def critic_loss(agent: Agent, args: Args, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
    """L(Q), and the metrics to log."""
    with torch.no_grad():
        next_action = agent.target_actor(batch.next_obs)
        noise = (args.policy_noise * torch.randn_like(next_action)).clamp(-args.noise_clip, args.noise_clip)
        next_action = (next_action + noise).clamp(-1, 1)
        next_value = agent.target_critic(batch.next_obs, next_action).amin(0)
        target = batch.reward + args.gamma * next_value * ~batch.terminated
    q = agent.critic(batch.obs, batch.action)
    loss = (q - target).square().mean(-1).sum()
    return loss, {"losses/qf_loss": loss.detach(), "losses/qf_values": q.detach().mean()}


def actor_loss(agent: Agent, args: Args, batch: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
    """-J(mu), and the metrics to log."""
    loss = -agent.critic(batch.obs, agent.actor(batch.obs), both=False).mean()
    return loss, {"losses/actor_loss": loss.detach()}


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- tau source + (1 - tau) target, for every parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def td3_update(
    agent: Agent,
    critic_optimizer: torch.optim.Optimizer,
    actor_optimizer: torch.optim.Optimizer,
    batch: Transitions,
    args: Args,
    move_actor: bool,  # and the target networks, not the critics alone
) -> dict[str, Tensor]:
    """One step of each optimizer and of the target networks; returns what the losses log."""
    loss, log = critic_loss(agent, args, batch)
    loss.backward()
    critic_optimizer.step()
    critic_optimizer.zero_grad()

    if not move_actor:
        return log

    loss, actor_log = actor_loss(agent, args, batch)
    # For the actor only: a gradient that it left in the critic would join that of the critic's next step.
    loss.backward(inputs=[p for group in actor_optimizer.param_groups for p in group["params"]])
    actor_optimizer.step()
    actor_optimizer.zero_grad()

    polyak(agent.target_critic, agent.critic, args.tau)
    polyak(agent.target_actor, agent.actor, args.tau)
    return log | actor_log


def updates_by(step: int, args: Args) -> int:
    """Updates due by `step`: gradient_steps at each multiple of train_frequency above learning_starts."""
    turns = step // args.train_frequency - args.learning_starts // args.train_frequency
    return args.gradient_steps * max(0, turns)


# ----- training -------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains an agent (Algorithm 1 of the paper); returns the run's folder."""
    args, saved = load_run(args)
    device = check_flags(args)
    require(not dist.is_torchelastic_launched(), "torchrun is for reinforce.py, a2c.py and ppo.py")
    for name in ("buffer_size", "train_frequency", "gradient_steps", "batch_size", "tau", "q_lr"):
        require(0 < getattr(args, name) < math.inf, f"--{name.replace('_', '-')} must be finite and above 0")
    for name in ("learning_starts", "exploration_noise", "policy_noise", "noise_clip"):
        require(0 <= getattr(args, name) < math.inf, f"--{name.replace('_', '-')} must be finite and not below 0")
    require(args.policy_frequency > 0, "--policy-frequency must be above 0")
    require(args.tau <= 1, "--tau must not be above 1")
    envs = make_envs(args, args.num_envs)
    space = envs.single_action_space
    fits = isinstance(space, gym.spaces.Box) and space.is_bounded()
    require(fits, f"{args.env_id}: actions must be a Box with finite bounds, not {space}; dqn.py, ppo.py take others")

    torch.manual_seed(args.seed)
    agent = Agent(envs, args, device)
    critic_optimizer = torch.optim.Adam(agent.critic.parameters(), lr=args.q_lr, fused=True)
    actor_optimizer = torch.optim.Adam(agent.actor.parameters(), lr=args.learning_rate, fused=True)
    iterations = math.ceil(max(0, args.total_timesteps - saved["step"]) / args.num_envs)  # to come
    buffer = ReplayBuffer(envs, min(args.buffer_size, saved["step"] + iterations * args.num_envs), device)
    update = accelerated(td3_update, args, device)
    states = dict(agent=agent, critic_optimizer=critic_optimizer, actor_optimizer=actor_optimizer, buffer=buffer)
    with closing(envs), Run(args, saved, **states) as run:
        say(buffer.about)
        step, row = run.step, {}
        obs = reset(envs, args.seed, step)
        while step < args.total_timesteps:
            # Act and remember.
            if step < args.learning_starts:
                action = agent.random_action(args.num_envs)
            else:
                action = agent.act(obs, explore=True)
            next_obs, reward, terminated, truncated, infos = envs.step(agent.to_env(action))
            done = terminated | truncated
            buffer.add(obs, action, reward, true_next_obs(next_obs, done, infos), terminated)
            run.count_episodes(infos)
            obs = next_obs
            before, step = step, step + args.num_envs

            # Learn from what is remembered.
            for count in range(updates_by(before, args), updates_by(step, args)):
                batch = buffer.sample(args.batch_size)
                row |= update(agent, critic_optimizer, actor_optimizer, batch, args, count % args.policy_frequency == 0)
            if run.advance(step, row):  # a checkpoint
                obs, row = reset(envs, args.seed, step), {}
        return run.finish()


# ----- plumbing, the same text in every script: read it once or never -------------------------------------------------

SCRIPT = Path(globals().get("__file__", "notebook")).stem


def fail(message: str, code: int = 2) -> None:
    """Ends the program with one line on stderr; exit code 2 says that the input was bad."""
    print(f"{SCRIPT}.py: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def say(text: str) -> None:
    """Prints a line above the bar. A reader who has left, or who lacks a letter, is no reason to stop."""
    with suppress(OSError, UnicodeError), tqdm.external_write_mode():
        print(text, flush=True)


def require(condition: bool, message: str) -> None:
    """Refuses bad input."""
    if not condition:
        fail(message)


def check_flags(args: Args) -> torch.device:
    """Refuses values that no script can run with; returns the device to train on."""
    for name in ("total_timesteps", "num_envs", "learning_rate", "num_threads", "log_every"):
        require(0 < getattr(args, name) < math.inf, f"--{name.replace('_', '-')} must be finite and above 0")
    for name in ("seed", "eval_episodes", "eval_every", "checkpoint_every"):
        require(getattr(args, name) >= 0, f"--{name.replace('_', '-')} must not be below 0")
    for name, x in asdict(args).items():
        require(x == x, f"--{name.replace('_', '-')} must not be NaN")
    require(args.seed < 2**64, "--seed must be below 2 ** 64")
    require(args.num_threads <= 1024, "--num-threads must not be above 1024")  # torch crashes far above
    require(0 <= args.gamma <= 1, "--gamma must lie between 0 and 1")
    require(min(args.hidden_sizes) > 0, "--hidden-sizes must be above 0")
    if args.capture_video:
        require(importlib.util.find_spec("moviepy") is not None, "--capture-video needs moviepy: pip install moviepy")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = args.device if args.device != "auto" else next(name for name in there if there[name])
    require(there[device], f"--device {device}: torch finds none here")
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)  # numbers below 1e-38, as Adam keeps for dead units, are slow: take 0 instead
    return torch.device(device)


class FastOptimizer:
    """The steps of a torch.optim.Adam, AdamW or RMSprop on its state: with less Python, and --compile traces them."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.param_groups, self.groups, is_adam = optimizer.param_groups, [], isinstance(optimizer, torch.optim.Adam)
        self.function, names = (fast_adam, ("exp_avg", "exp_avg_sq")) if is_adam else (fast_rmsprop, ("square_avg",))
        own = ("decoupled_weight_decay",) if is_adam else ("alpha",)
        for group in optimizer.param_groups:
            options = {name: group[name] for name in ("eps", "weight_decay", *own)}
            if is_adam:
                options["beta1"], options["beta2"] = group["betas"]
            params = group["params"]
            learning_rate, counts = params[0].new_zeros(()), params[0].new_zeros(len(params))
            for p, count in zip(params, counts):  # each has its own count of steps, in one tensor: one operation counts
                state = {"step": count} | {name: torch.zeros_like(p) for name in names} | optimizer.state[p]
                optimizer.state[p] = {name: x.to(p.device) for name, x in state.items()}
                optimizer.state[p]["step"] = count.copy_(state["step"])
            columns = [[optimizer.state[p][name] for p in params] for name in names]
            for x in sum(columns, [learning_rate, counts]):
                torch._dynamo.mark_static_address(x, guard=False)  # a CUDA graph uses it in place
            self.groups.append((group, params, columns, learning_rate, counts, counts.unbind(), options))

    def up_to_date(self) -> "FastOptimizer":
        """Itself, with the learning rates as they are now: in tensors, for a new number would be compiled anew."""
        for group, _, _, learning_rate, *_ in self.groups:
            learning_rate.fill_(group["lr"])
        return self

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step with each parameter that has a gradient."""
        for group, params, columns, learning_rate, counts, steps, options in self.groups:
            grads = [p.grad for p in params]
            if torch.compiler.is_compiling():  # there a number is a constant, and views must be made inside
                lr, steps = learning_rate, counts.unbind()
            else:
                lr = group["lr"]
            there = [grad is not None for grad in grads]
            counts += 1 if all(there) else counts.new_tensor(there)
            rows = [row for row in zip(params, grads, *columns, steps) if row[1] is not None]
            if rows:
                self.function(*map(list, zip(*rows)), lr=lr, **options)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for _, params, *_ in self.groups:
            for p in params:
                p.grad = None


def fast_adam(params, grads, means, squares, steps, **options) -> None:
    """Adam's step (Kingma and Ba 2015): torch's fused function, or the formula, for that function cannot be traced."""
    lr, beta1, beta2, eps, decay = (options[name] for name in ("lr", "beta1", "beta2", "eps", "weight_decay"))
    decoupled = options.pop("decoupled_weight_decay")
    if not torch.compiler.is_compiling():
        fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
        return fused(params, grads, means, squares, [], steps, amsgrad=False, maximize=False, **options)
    # beta ** step, for all parameters at once and by exp: else compiled code computes it anew for every few weights.
    decay1, decay2 = (torch.exp(torch.stack(steps) * math.log(max(beta, 1e-99))) for beta in (beta1, beta2))
    root = (1 - decay2).sqrt()
    step_size, eps = lr * root / (1 - decay1), eps * root  # both corrections taken out of the moments
    for i, (p, grad, mean, square) in enumerate(zip(params, grads, means, squares)):
        if decoupled:
            p.mul_(1 - lr * decay)
        elif decay:
            grad = grad + decay * p
        mean.lerp_(grad, 1 - beta1)
        square.lerp_(grad.square(), 1 - beta2)
        p.sub_(step_size[i] * mean / (square.sqrt() + eps[i]))


def fast_rmsprop(params, grads, squares, steps, lr, alpha, eps, weight_decay) -> None:
    """RMSprop's step (Hinton's lecture 6e of 2012), the same whatever the number of `steps`."""
    if weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    torch._foreach_mul_(squares, alpha)
    torch._foreach_addcmul_(squares, grads, grads, 1 - alpha)
    root = torch._foreach_sqrt(squares)
    torch._foreach_add_(root, eps)
    torch._foreach_addcdiv_(params, torch._foreach_mul(grads, -lr), root)


def accelerated(update, args: Args, device: torch.device):
    """The update with fast optimizers, with --compile one graph, on CUDA a CUDA graph; --onednn multiplies matrices."""
    function = update
    if args.compile:
        torch._dynamo.config.recompile_limit = 256  # graphs of one function: a process may train many networks
        torch._dynamo.config.trace_autograd_ops = True  # lets backward() into the graph
        inductor = torch._inductor.config
        inductor.triton.cudagraph_skip_dynamic_graphs = True  # no CUDA graph for each length of a batch
        inductor.fallback_random = device.type == "cpu"  # there inductor's own random numbers are slow
        inductor.cpp.use_decompose_tanh = True  # by exp: five times as fast, right to 1e-7
        inductor.size_asserts = inductor.alignment_asserts = False  # each takes as long as a small kernel
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        function = torch.compile(update, fullgraph=True, mode=mode)

    @cache  # made in the first update, when --resume has loaded the state
    def fast(optimizer: torch.optim.Optimizer) -> FastOptimizer | torch.optim.Optimizer:
        """The optimizer's fast form, or itself if it has none."""
        known = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)
        names = ("amsgrad", "maximize", "momentum", "centered")
        rare = any(group.get(name) for group in optimizer.param_groups for name in names)
        return FastOptimizer(optimizer) if known and not rare else optimizer

    def update(*inputs):
        """The update made fast; a CUDA graph's results are copied, for it writes the next ones in the same place."""
        inputs = [fast(x) if isinstance(x, torch.optim.Optimizer) else x for x in inputs]
        if not args.compile:
            return function(*inputs)
        inputs = [x.up_to_date() if isinstance(x, FastOptimizer) else x for x in inputs]
        results = function(*inputs)
        return {name: x.clone() for name, x in results.items()} if device.type == "cuda" else results

    cpu = torch.cpu.get_capabilities()
    faster = cpu.get("avx512_bf16") and cpu.get("cpu_name", "").startswith("AMD")  # on Intel MKL is faster
    exact = not cpu.get("amx_bf16")  # "bf16" rounds where there is AMX; else it stays float32
    if not (args.onednn and faster and exact and device.type == "cpu"):
        return update

    def with_onednn(*inputs):
        """The same, with oneDNN for the time that it takes."""
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # the name of the switch; here it stays float32
        try:
            return update(*inputs)
        finally:  # products of a few rows, as to act, are faster without
            torch.backends.mkldnn.matmul.fp32_precision = "none"

    return with_onednn


def first() -> bool:
    """Whether this process is the one that speaks and writes: the first that torchrun started, or alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def exchange(x) -> list:
    """x of each process that torchrun started, or of this one alone."""
    if not dist.is_initialized():
        return [x]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x)
    return everyone


class Environments(gym.vector.SyncVectorEnv):
    """SyncVectorEnv in half its time. Infos tell only of episodes that ended: keys and shapes of others may clash."""

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """The first observations (N, obs_dim) of new episodes, seeded with seed, seed + 1 and so on."""
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        obs = np.empty(self.observation_space.shape, self.observation_space.dtype)
        for i, env in enumerate(self.envs):
            obs[i], _ = env.reset(seed=None if seed is None else seed + i, options=options)
        return obs, {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """As in SyncVectorEnv with SAME_STEP: where an episode ends, obs is the first of the next one."""
        obs = np.empty(self.observation_space.shape, self.observation_space.dtype)
        reward, infos = np.empty(self.num_envs), {}
        terminated, truncated = np.empty((2, self.num_envs), dtype=bool)
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            obs[i], reward[i], terminated[i], truncated[i], _ = env.step(action)
            self.returns[i] += reward[i]
            self.lengths[i] += 1
            if terminated[i] or truncated[i]:
                episode = {"r": self.returns[i], "l": self.lengths[i]}
                infos = self._add_info(infos, {"final_obs": obs[i].copy(), "final_info": {"episode": episode}}, i)
                self.returns[i] = self.lengths[i] = 0
                obs[i], _ = env.reset()
        return obs, reward, terminated, truncated, infos


def make_envs(args: Args, num_envs: int, video: Path | None = None) -> Environments:
    """Environments in lockstep, each reset in the step that ends its episode; `video` names a film of the first one."""

    def make_env(film: bool) -> gym.Env:
        env = gym.make(args.env_id, **({"render_mode": "rgb_array"} if film else {}))
        space = env.observation_space
        require(isinstance(space, gym.spaces.Box), f"{args.env_id}: observations must be a Box, these are {space}")
        if film:
            with warnings.catch_warnings(action="ignore"):  # that the folder has films already
                env = gym.wrappers.RecordVideo(env, video.parent, lambda episode: episode == 0, name_prefix=video.name)
        return env if len(space.shape) == 1 else gym.wrappers.FlattenObservation(env)

    spec, about = gym.registry.get(args.env_id), f"--env-id {args.env_id}"
    try:
        if spec and "mujoco" in str(spec.entry_point):  # whose compiler warns of its own models, once for each of them
            import mujoco

            mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else print(text, file=sys.stderr))
        fns = [partial(make_env, film=video is not None and index == 0) for index in range(num_envs)]
        envs = Environments(fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
        if args.capture_video and video is None:  # can it be filmed at all? better to know before the training
            about = f"--capture-video: {args.env_id} cannot be rendered to rgb_array here"
            with warnings.catch_warnings(action="ignore"), gym.make(args.env_id, render_mode="rgb_array") as env:
                env.reset()
                require(isinstance(env.render(), np.ndarray), about)
        return envs
    except Exception as error:
        fail(f"{about}: {error}")


def reset(envs: Environments, *numbers: int, rank: int = 0) -> np.ndarray:
    """Resets the environments and seeds every generator: a resumed run goes on as one that was never stopped."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])  # 32 bits, made of all the numbers
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    seed += rank * envs.num_envs
    for index, env in enumerate(envs.envs):  # some environments draw from their own spaces
        env.unwrapped.action_space.seed(seed + index)
        env.unwrapped.observation_space.seed(seed + index)
    return envs.reset(seed=seed)[0]


def evaluate(agent: nn.Module, args: Args, video: Path | None = None) -> dict[str, float]:
    """Plays one episode in each of `eval_episodes` fresh environments without exploration, 100,000 steps at most."""
    returns, alive = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    states = random.getstate(), np.random.get_state()  # what is drawn here changes no training
    gpu = [] if agent.device.type == "cpu" else [agent.device]
    with torch.random.fork_rng(gpu), closing(make_envs(args, args.eval_episodes, video)) as envs:
        obs = reset(envs, args.seed, 0, 1)  # three numbers: no seed of the training
        for _ in range(100_000):
            obs, reward, terminated, truncated, _ = envs.step(agent.to_env(agent.act(obs, explore=False)))
            returns[alive] += reward[alive]
            alive &= ~(terminated | truncated)
            if not alive.any():
                break
    if alive.any():
        tqdm.write(f"{alive.sum()} of {len(alive)} episodes were cut off after 100,000 steps", file=sys.stderr)
    random.setstate(states[0])
    np.random.set_state(states[1])
    mean, std = returns.mean().item(), returns.std().item()
    return {"eval/episodic_return": mean, "eval/episodic_return_std": std, "eval/episodes": args.eval_episodes}


def write_file(path: Path, content: str | dict, code: int = 1) -> None:
    """Writes text, or a dict with torch.save, aside and renames it: `path` never holds half a file."""
    if not first():
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # it must be on the disk before it gets its name
        part.replace(path)
    except (OSError, RuntimeError) as error:  # the second is what torch makes of a full disk
        part.unlink(missing_ok=True)
        fail(f"{path} cannot be written: {error}", code)


def load_run(args: Args) -> tuple[Args, dict]:
    """The flags, and the step and states to start from: those of a new run, or those in the folder of --resume."""
    if not args.resume:
        return args, {"step": 0, "states": {}}
    folder, where = Path(args.resume), f"--resume {args.resume}:"
    name = "checkpoint.pt" if (folder / "checkpoint.pt").exists() else "agent.pt"
    try:
        flags = json.loads((folder / "args.json").read_text())
        flags = {name: tuple(x) if isinstance(x, list) else x for name, x in flags.items()}  # JSON has no tuples
        script = flags.pop("script")
        require(script == SCRIPT, f"{where} that is a run of {script}.py")
        old = Args(**flags | {"resume": args.resume})
        with zipfile.ZipFile(folder / name) as file:
            require(file.testzip() is None, f"{where} {name} is damaged")  # torch.load verifies no checksum
        saved = torch.load(folder / name, map_location="cpu", weights_only=True)
        if name == "agent.pt":  # the training is over; all that is left is to evaluate
            last_row = (folder / "metrics.jsonl").read_text().splitlines()[-1]
            saved = {"step": json.loads(last_row)["global_step"], "states": {"agent": saved}}
        saved["step"], saved["states"]["agent"]  # a file that is something else raises here
    except FileNotFoundError as error:
        fail(f"{where} nothing to go on from, there is no {Path(error.filename).name}")
    except Exception as error:
        fail(f"{where} cannot be read, torn or not a run ({type(error).__name__})")
    if __name__ == "__main__" and any(x.startswith("--resume") for x in sys.argv):
        # Read the command line again: what it does not name is as the run had it.
        args = tyro.cli(Args, default=old)
    else:  # called from Python: what differs from its default was meant
        given = {f.name: getattr(args, f.name) for f in fields(Args) if getattr(args, f.name) != f.default}
        args = replace(old, **given)
    same = (args.env_id, args.seed) == (old.env_id, old.seed)
    require(same, f"{where} that is a run with --env-id {old.env_id} --seed {old.seed}")
    possible = name == "checkpoint.pt" or args.total_timesteps <= saved["step"]  # without, it only evaluates
    require(possible, f"{where} finished, without a checkpoint to go on from")
    return args, saved


class Run:
    """What a run leaves behind: flags, metrics, checkpoints, films, W&B; and an orderly end, whatever the reason."""

    def __init__(self, args: Args, saved: dict, **states):
        """`states` are the modules and optimizers that make a checkpoint; those in `saved` are loaded."""
        self.args, self.states, self.step = args, states, saved["step"]
        name = re.sub(r"[^\w.-]+", "-", f"{args.env_id}__{SCRIPT}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}")
        self.folder = Path(args.resume or Path(args.runs_dir, exchange(name)[0]))
        try:
            for name, state in saved["states"].items():
                if "param_groups" in state:  # an optimizer: the flags of this run, not those of the checkpoint
                    state["param_groups"] = states[name].state_dict()["param_groups"]
                states[name].load_state_dict(state)
        except Exception as error:
            fail(f"--resume {self.folder}: the checkpoint does not fit: {error}")
        saved["states"].clear()  # or a second replay buffer would stay in memory
        self.wandb = self.start_wandb() if args.track and first() else None
        flags = {"script": SCRIPT} | asdict(args) | {"resume": ""}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics = open(self.folder / "metrics.jsonl" if first() else os.devnull, "ab", buffering=0)
            write_file(self.folder / "args.json", json.dumps(flags, indent=2), code=2)
            with open(self.metrics.name, "rb") as file:
                rows = re.finditer(rb'"global_step": (\d+).*\n', file.read(self.metrics.tell()))
            kept = max((row.end() for row in rows if int(row[1]) <= self.step), default=0)
            if kept < self.metrics.tell():  # what came after the checkpoint will be done again
                self.metrics.seek(self.metrics.truncate(kept))
        except OSError as error:
            fail(f"the run's folder cannot be written: {error}")
        start, end = min(self.step, args.total_timesteps), args.total_timesteps
        say(f"{self.folder}: {SCRIPT} on {args.env_id}, from step {start:,} to {end:,}")
        hidden = None if first() and sys.stderr else True  # None: where stderr is no terminal
        self.bar = tqdm(total=end, initial=start, unit=" steps", unit_scale=True, disable=hidden)
        self.returns, self.lengths, self.seen = [], [], {}
        self.row_step, self.row_time = self.step, time.perf_counter()

    def start_wandb(self):
        """The run on Weights & Biases, by the name of the folder; WANDB_MODE says whether online or offline."""
        args, name = self.args, self.folder.resolve().name
        where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "group": args.wandb_group}
        try:
            import wandb

            run = wandb.init(**where, name=name, id=name, resume="allow", config=asdict(args))
        except Exception as error:
            fail(f"--track: {error} (`wandb login` once, or set WANDB_MODE=offline)")
        run.define_metric("global_step")
        run.define_metric("*", step_metric="global_step")
        return run

    def to_wandb(self, function, *inputs, **options) -> None:
        """Calls a function of W&B; where it fails, as when its service was killed, the run goes on without W&B."""
        try:
            function(*inputs, **options)
        except Exception as error:
            self.wandb = None
            tqdm.write(f"--track: {type(error).__name__}: {error}; the run goes on without W&B", file=sys.stderr)

    def __enter__(self):
        self.signal, self.handlers, self.finished = None, {}, False
        with suppress(ValueError):  # only the main thread may do that
            self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def on_signal(self, number: int, frame) -> None:
        """Ctrl-C or SIGTERM ends the run after this iteration; a second one, or one in the last evaluation, at once."""
        self.signal = number
        if self.finished:  # all that is left is an evaluation
            raise SystemExit(128 + number)
        if not dist.is_initialized():  # torchrun passes on a signal that may have come here already
            signal.signal(number, self.handlers[number])

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.handlers.items():  # back to whoever had them before the run
            signal.signal(number, handler)
        self.bar.close()
        self.metrics.close()
        if self.wandb:
            self.to_wandb(self.wandb.finish, exit_code=0 if error is None else 1)
        if isinstance(error, Exception):
            error.add_note(f"It ended the run at step {self.step:,}; {self.rescue()}")
        elif isinstance(error, SystemExit) and error.code == 2:  # no environments for an evaluation
            error.code = 1
            print(f"It ended the run at step {self.step:,}; {self.rescue()}", file=sys.stderr)

    def rescue(self) -> str:
        """What there is to go on from, in words."""
        there = any(self.folder.glob("*.pt"))  # checkpoint.pt, or agent.pt where only an evaluation is left
        return f"--resume {self.folder} goes on from its last checkpoint" if there else "there is no checkpoint"

    def count_episodes(self, infos: dict, counted: np.ndarray | bool = True) -> None:
        """Notes the return and length of each episode that ended in this step, of the environments `counted` only."""
        if "final_info" in infos:
            episode, ended = infos["final_info"]["episode"], infos["final_info"]["_episode"] & counted
            self.returns.extend(episode["r"][ended].tolist())
            self.lengths.extend(episode["l"][ended].tolist())

    def log(self, row: dict) -> None:
        """Writes a row to metrics.jsonl, at once and whole, and to W&B."""
        self.check_finite(row, states={})  # returns may be infinite where losses are not
        line, before = json.dumps(row).encode() + b"\n", self.metrics.tell()
        try:
            if self.metrics.write(line) < len(line):
                self.metrics.truncate(before)
                raise OSError("no space left for a row")
        except OSError as error:
            fail(f"{self.metrics.name} cannot be written at step {self.step:,}: {error}; {self.rescue()}", code=1)
        if self.wandb:
            self.to_wandb(self.wandb.log, row)

    def advance(self, step: int, row: dict[str, float | Tensor]) -> bool:
        """Moves the run on to `step`: writes the row, the evaluation and the checkpoint that are due.

        True if there was a checkpoint: then the environments must be `reset`, as they are when a run goes on from it.
        """
        args, finished = self.args, step >= self.args.total_timesteps
        stopping = any(exchange(self.signal is not None))
        log, evaluation, checkpoint = (
            every > 0 and (finished or step // every > self.step // every)
            for every in (args.log_every, args.eval_every, args.checkpoint_every)
        )
        checkpoint |= stopping or (finished and (self.folder / "checkpoint.pt").exists())
        self.bar.update(min(step, args.total_timesteps) - self.bar.n)
        self.step = step
        wanted = self.states if checkpoint else ["agent"] if finished else []
        states = {name: self.states[name].state_dict() for name in wanted}
        # What has been looked at is left out, and what a GPU computes: to read it is to wait for it.
        new = {k: x for k, x in row.items() if x is not self.seen.get(k) and (not isinstance(x, Tensor) or x.is_cpu)}
        self.check_finite(row if log or checkpoint else new, states)
        self.seen = dict(row)
        if log or checkpoint:
            row = {name: float(x) for name, x in row.items()}
            returns, lengths = (sum(exchange(x), []) for x in (self.returns, self.lengths))
            row |= {"global_step": step, "charts/episodes": len(returns)}
            row["charts/SPS"] = (step - self.row_step) / (time.perf_counter() - self.row_time)
            if returns:
                row["charts/episodic_return"] = sum(returns) / len(returns)
                row["charts/episodic_length"] = sum(lengths) / len(lengths)
                self.bar.set_postfix_str(f"return {row['charts/episodic_return']:.1f}")
            self.log(row)
            self.returns, self.lengths = [], []
        try:
            if evaluation and not finished:
                self.evaluate()
        finally:  # after the evaluation, whose row a run that goes on must find; and even if it broke
            if checkpoint:
                write_file(self.folder / "checkpoint.pt", {"step": step, "states": states})
        if stopping and not finished:
            say(f"Stopped at step {step:,}; {self.rescue()}")
            raise SystemExit(128 + (self.signal or signal.SIGTERM))  # it may have come to another process
        if log or checkpoint or evaluation:
            self.row_step, self.row_time = step, time.perf_counter()
        return checkpoint

    def check_finite(self, row: dict[str, float | Tensor], states: dict[str, dict]) -> None:
        """Ends the run if a loss is NaN or infinite, or the agent or the buffer that is about to be saved."""
        bad = [name for name, x in row.items() if not math.isfinite(x)]
        tensors = [pair for state in states.values() for pair in state.items()]
        bad += [name for name, x in tensors if isinstance(x, Tensor) and not x.isfinite().all()]
        if bad:
            hint = "if the observations and rewards are finite, smaller learning rates may help"
            fail(f"{bad[0]} is not finite at step {self.step:,}; {hint}; {self.rescue()}", code=1)

    def evaluate(self) -> None:
        """Logs an evaluation of the agent as it is now, with --capture-video a film too."""
        if self.args.eval_episodes == 0 or not first():
            return
        video = self.folder / "videos" / f"step-{self.step}" if self.args.capture_video else None
        evaluation = evaluate(self.states["agent"], self.args, video)
        self.log({"global_step": self.step} | evaluation)
        if self.wandb and video:
            import wandb

            film = wandb.Video(f"{video}-episode-0.mp4", format="mp4")
            self.to_wandb(self.wandb.log, {"global_step": self.step, "eval/video": film})
        mean, std, episodes = evaluation.values()
        say(f"Evaluation at step {self.step:,}: return {mean:.1f} ± {std:.1f} over {episodes} episodes")

    def finish(self) -> Path:
        """Saves and evaluates the trained agent; returns the run's folder."""
        write_file(self.folder / "agent.pt", self.states["agent"].state_dict())
        self.finished = True
        self.bar.close()
        self.evaluate()
        return self.folder


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
