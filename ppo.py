# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.13", "gymnasium[classic-control,mujoco]>=1.4", "tyro>=1.0", "wandb", "numpy", "tqdm"]
# ///
"""Proximal Policy Optimization: many small steps on each rollout, none rewarded for moving far from its policy.

Maximises, by Adam on minibatches of the last rollout (PPO paper, equations 7, 9, 11, 12; the 1/2 as in OpenAI's ppo2):

    L(theta) = E[ min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) - c1 (V(s) - R)^2 / 2 + c2 H(pi(.|s)) ]
    ratio    = pi(a|s) / pi_old(a|s)
    delta_t  = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)      the TD error, s_{t+1} before any reset
    A_t      = delta_t + gamma lambda (1 - done_t) A_{t+1}             the advantage, GAE(lambda), 0 after the rollout
    R_t      = A_t + V(s_t)                                            the target of the value

E is the mean over the steps of a minibatch, theta the parameters of the policy pi and the critic V, pi_old the policy
that collected the rollout, H the entropy. r_t is scaled (--norm-reward). pi_old, A and R are computed once per rollout,
constants in L, where A (not in R) has mean 0 and standard deviation 1 in each minibatch (--norm-adv, as in ppo2).

Where A > 0 the objective stops growing at ratio 1 + eps, where A < 0 at 1 - eps: going further earns nothing. The min
keeps the unclipped term where the ratio went the wrong way, so that such a step can be undone. The clip takes away an
incentive to leave pi_old; it does not bound the ratio.

After termination there is no further reward. A time limit (truncation) or the rollout's end only breaks an episode off:
V of the state reached stands for the rewards to come. `done`, terminated or truncated, keeps A_t within its episode.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv 1707.06347. GAE: theirs of 2016, 1506.02438.

    python ppo.py                                                    # CartPole-v1
    python ppo.py --env-id HalfCheetah-v5                            # the README has better flags for MuJoCo
    python ppo.py --resume runs/FOLDER --capture-video               # film a finished run

The diff from a2c.py is the ratio and its clip: with them a rollout is good for several passes in minibatches, where A2C
takes one step. Adam, a lambda below 1, normalised advantages and, if asked for, --clip-vloss and --target-kl are new.
"""

import atexit
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
    env_id: str = "CartPole-v1"  # Gymnasium's id of the environment; `module:Id` imports the module first
    seed: int = 1  # seed of every random generator
    total_timesteps: int = 500_000  # steps, each a transition of one environment; rounded up to whole iterations
    num_envs: int = 4  # environments that step together
    learning_rate: float = 2.5e-4  # step size of the optimizer (Baselines', for Atari)
    gamma: float = 0.99  # discount factor (that of most papers)
    device: Literal["auto", "cpu", "cuda", "mps"] = "cpu"  # where to train; auto takes a GPU if there is one
    num_threads: int = 1  # CPU threads of torch; one is fastest for small networks, or if every core has a run
    onednn: bool = False  # multiply with oneDNN where that stays float32: faster for wide layers on AMD with AVX-512
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

    hidden_sizes: tuple[int, int] = (64, 64)  # units of the two hidden layers of each network (PPO's paper)
    num_steps: int = 128  # steps of each environment in a rollout (the paper, for Atari)
    gae_lambda: float = 0.95  # lambda of GAE: 1 for n-step returns minus V; 0 for the TD error, less noisy, more biased
    ent_coef: float = 0.0  # weight of the entropy, c2 (PPO's paper: 0 on MuJoCo)
    vf_coef: float = 0.5  # weight of the value loss, c1; the optimizer's scaling cancels it, except in the clipped norm
    max_grad_norm: float = 0.5  # largest norm of the gradient; a longer one is scaled down (Baselines')
    anneal_lr: bool = True  # lower the learning rate linearly, to zero at total_timesteps
    update_epochs: int = 4  # passes over a rollout (Baselines')
    num_minibatches: int = 4  # minibatches in a pass (Baselines')
    clip_coef: float = 0.2  # eps (the paper's): flat at ratios above 1 + eps if A > 0, below 1 - eps if A < 0
    clip_vloss: bool = False  # clip the change of the value by eps too (in ppo2, not in the paper)
    norm_adv: bool = True  # normalise the advantages of a minibatch to mean 0 and standard deviation 1
    target_kl: float | None = None  # no further pass if the last minibatch of one estimates KL(pi_old || pi) above this
    norm_obs: bool = True  # normalise observations by their running mean and standard deviation
    norm_reward: bool = True  # divide rewards by the running standard deviation of the return
    init_log_std: float = -0.5  # initial log standard deviation of a Gaussian policy where bounds are +-1 (Tianshou's)


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


class MLP(Module):
    """Two tanh layers and a linear one: orthogonal weights, with `gain` in the last layer, biases of 0."""

    def __init__(self, inputs: int, hidden_sizes: tuple[int, int], outputs: int, gain: float):
        super().__init__()
        h1, h2 = hidden_sizes
        self.fc1, self.fc2, self.out = Linear(inputs, h1), Linear(h1, h2), Linear(h2, outputs)
        for layer, layer_gain in ((self.fc1, math.sqrt(2)), (self.fc2, math.sqrt(2)), (self.out, gain)):
            nn.init.orthogonal_(layer.weight, layer_gain)
            nn.init.zeros_(layer.bias)

    def forward(self, obs: Tensor) -> Tensor:
        """The outputs (..., outputs) for obs (..., inputs)."""
        return self.out(self.fc2(self.fc1(obs).tanh_()).tanh_())


class CategoricalPolicy(Module):
    """pi(a|s) over a Discrete space: the softmax of the logits that the network gives to the actions."""

    def __init__(self, obs_dim: int, hidden_sizes: tuple[int, int], space: gym.spaces.Discrete):
        super().__init__()
        self.net = MLP(obs_dim, hidden_sizes, int(space.n), gain=0.01)
        self.space = space

    def forward(self, obs: Tensor, explore: bool) -> Tensor:
        """Actions (B,) for obs (B, obs_dim): drawn from pi, or the most likely ones."""
        logits = self.net(obs)
        if explore:  # -log(exponential) is Gumbel noise, the argmax with it a draw from the softmax
            logits = logits - torch.empty_like(logits).exponential_().log_()
        return logits.argmax(-1)

    def log_prob(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) and the entropy H(pi(.|s)), both (...), for obs (..., obs_dim) and action (...)."""
        log_probs = self.net(obs).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """The actions (N,) as the environments number them."""
        return (action + self.space.start).astype(self.space.dtype)


class GaussianPolicy(Module):
    """pi(a|s) over a Box: independent Gaussians, whose standard deviations are parameters, the same in every state.

    Actions are in units where the bounds of each dimension are -1 and 1; one that lacks a bound is left as it is.
    What lies beyond a bound is cut off on the way to the environment only: pi is the density before that.
    """

    def __init__(self, obs_dim: int, hidden_sizes: tuple[int, int], space: gym.spaces.Box, init_log_std: float):
        super().__init__()
        self.net = MLP(obs_dim, hidden_sizes, math.prod(space.shape), gain=0.01)
        self.log_std = nn.Parameter(torch.full((math.prod(space.shape),), init_log_std))
        self.space = space
        bounded = np.isfinite(space.low) & np.isfinite(space.high)
        low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
        self.center, self.half_width = low / 2 + high / 2, high / 2 - low / 2  # halves first: sums may overflow

    def forward(self, obs: Tensor, explore: bool) -> Tensor:
        """Actions (B, action_dim) for obs (B, obs_dim): drawn from pi, or the most likely ones."""
        mean = self.net(obs)
        return mean + self.log_std.exp() * torch.randn_like(mean) if explore else mean

    def log_prob(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) and the entropy H(pi(.|s)), both (...), for obs (..., obs_dim) and action (..., action_dim)."""
        z = (action - self.net(obs)) / self.log_std.exp()
        log_scale = self.log_std.sum() + len(self.log_std) * math.log(2 * math.pi) / 2
        log_prob = -z.square().sum(-1) / 2 - log_scale
        entropy = log_scale + len(self.log_std) / 2
        return log_prob, entropy.expand_as(log_prob)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """The actions (N, *shape) in the units of the environments, cut off at their bounds; integers are rounded."""
        action = self.center + self.half_width * action.reshape(-1, *self.space.shape)
        action = action.clip(self.space.low, self.space.high)
        return (action.round() if np.issubdtype(self.space.dtype, np.integer) else action).astype(self.space.dtype)


class RunningStatistics(Module):
    """Mean and variance (size,) of everything seen so far; 0 and 1 before there is anything."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("scale", torch.ones(size))  # (var + 1e-8) ** -0.5
        self.register_buffer("count", torch.zeros(()))

    def update(self, x: Tensor) -> None:
        """Adds x (B, size): the moments of two joined samples (Chan, Golub and LeVeque 1979)."""
        var, mean = torch.var_mean(x, dim=0, correction=0)
        self.count += len(x)
        share = len(x) / self.count
        self.var.lerp_(var + (1 - share) * (mean - self.mean).square(), share)
        self.mean.lerp_(mean, share)
        self.scale.copy_((self.var + 1e-8).rsqrt())


class RewardScaler(Module):
    """Divides rewards by the standard deviation of the discounted return (after Engstrom et al. 2020, 2005.12729)."""

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.statistics = RunningStatistics(1)
        self.running_return = 0.0  # gamma times the return so far of each episode, (N,); 0 after a reset

    def forward(self, reward: Tensor, done: Tensor) -> Tensor:
        """Rewards (T, N) in and out; a return here is the discounted sum of rewards so far, anew in each episode."""
        returns = []
        for reward_t, discount_t in zip(reward, self.gamma * ~done):
            returns.append(reward_t + self.running_return)
            self.running_return = discount_t * returns[-1]
        self.statistics.update(torch.stack(returns).reshape(-1, 1))
        var = self.statistics.var
        return reward * torch.where(var > 0, var + 1e-8, 1.0).rsqrt()  # if all were equal, by 1


class Agent(Module):
    """The policy, the value network and the normalisation that they were trained with."""

    def __init__(self, envs: gym.vector.VectorEnv, args: Args, device: torch.device):
        super().__init__()
        space, sizes = envs.single_action_space, args.hidden_sizes
        obs_dim = math.prod(envs.single_observation_space.shape)
        if isinstance(space, gym.spaces.Discrete):
            self.policy = CategoricalPolicy(obs_dim, sizes, space)
        else:
            self.policy = GaussianPolicy(obs_dim, sizes, space, args.init_log_std)
        self.to_env = self.policy.to_env
        self.critic = MLP(obs_dim, sizes, 1, gain=1.0)
        self.obs_statistics = RunningStatistics(obs_dim) if args.norm_obs else None
        self.reward_scaler = RewardScaler(args.gamma) if args.norm_reward else None
        self.device = device
        self.to(device)

    def normalize(self, obs: Tensor) -> Tensor:
        """Observations (..., obs_dim) as the networks take them; with --norm-obs cut off at 10 standard deviations."""
        statistics = self.obs_statistics
        return obs if statistics is None else ((obs - statistics.mean) * statistics.scale).clamp(-10, 10)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, explore: bool) -> np.ndarray:
        """Actions (N,) or (N, action_dim) for obs (N, obs_dim); `to_env` converts them for the environments."""
        obs = torch.from_numpy(obs.astype(np.float32)).to(self.device)
        return self.policy(self.normalize(obs), explore).cpu().numpy()

    def log_prob(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) and the entropy H(pi(.|s)), both (...), for obs (..., obs_dim) and their actions."""
        return self.policy.log_prob(self.normalize(obs), action)

    def value(self, obs: Tensor) -> Tensor:
        """V(s) (...) for obs (..., obs_dim)."""
        return self.critic(self.normalize(obs)).squeeze(-1)


# ----- memory ---------------------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """T consecutive steps of N environments, on the training device."""

    obs: Tensor  # (T, N, obs_dim) float32
    action: Tensor  # (T, N) int64 or (T, N, action_dim) float32, as the policy drew them
    reward: Tensor  # (T, N) float32
    next_obs: Tensor  # (T, N, obs_dim) float32, what the step led to, before any reset
    terminated: Tensor  # (T, N) bool
    done: Tensor  # (T, N) bool, terminated or truncated


def stack(steps: list[tuple[np.ndarray, ...]], device: torch.device) -> Rollout:
    """T steps, each a tuple of arrays in the order of Rollout's fields, as one Rollout."""
    obs, action, reward, next_obs, terminated, done = (np.stack(column) for column in zip(*steps))
    obs, reward, next_obs = (x.astype(np.float32) for x in (obs, reward, next_obs))
    return Rollout(*(torch.from_numpy(x).to(device) for x in (obs, action, reward, next_obs, terminated, done)))


def true_next_obs(next_obs: np.ndarray, done: np.ndarray, infos: dict) -> np.ndarray:
    """The observations (N, obs_dim) that the step led to: the last of an old episode, not the first of a new one."""
    if "final_obs" in infos:
        next_obs = next_obs.copy()
        next_obs[done] = np.stack(infos["final_obs"][done])
    return next_obs


# ----- algorithm ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def discounted_sum(x: Tensor, discount: Tensor) -> Tensor:
    """y_t = x_t + discount_t y_{t+1}, from the last row to the first, with 0 after the last; all (T, N)."""
    y = [torch.zeros_like(x[0])]
    for x_t, discount_t in zip(reversed(x.unbind()), reversed(discount.unbind())):
        y.append(torch.addcmul(x_t, discount_t, y[-1]))
    return torch.stack(y[:0:-1])  # in the order of time, without the 0


@torch.no_grad()
def gae(rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Advantages A_t (T, N) from the values of obs and next_obs, both (T, N) (GAE paper, equation 16)."""
    delta = rollout.reward + gamma * next_value * ~rollout.terminated - value
    return discounted_sum(delta, gamma * gae_lambda * ~rollout.done)


def ppo_loss(agent: Agent, args: Args, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """-L(theta), and the metrics to log, for B steps: tensors (B, ...) in the order of `ppo_update`."""
    obs, action, old_log_prob, old_value, target, advantage = batch
    log_prob, entropy = agent.log_prob(obs, action)
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantage, clipped_ratio * advantage).mean()

    value = agent.value(obs)
    value_error = (value - target).square()
    if args.clip_vloss:
        clipped_value = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
        value_error = torch.max(value_error, (clipped_value - target).square())
    value_loss = value_error.mean() / 2
    entropy = entropy.mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    log = {
        "losses/policy_loss": policy_loss,
        "losses/value_loss": value_loss,
        "losses/entropy": entropy,
        "losses/old_approx_kl": -log_ratio.mean(),
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),  # both estimate KL(pi_old || pi), this is never < 0
        "losses/clipfrac": (ratio != clipped_ratio).float().mean(),
    }
    return loss, {name: x.detach() for name, x in log.items()}


def ppo_step(agent: Agent, optimizer, batch: list[Tensor], args: Args) -> dict[str, Tensor]:
    """One step down the gradient of `ppo_loss`; returns what that logs. This is what --compile compiles."""
    loss, log = ppo_loss(agent, args, batch)
    loss.backward()
    average(agent, log)  # does nothing, except under torchrun
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.cat([x.flatten() for x in grads]).norm()
    torch._foreach_mul_(grads, (args.max_grad_norm / (norm + 1e-6)).clamp(max=1))
    optimizer.step()
    optimizer.zero_grad()
    return log


def ppo_update(agent, optimizer, rollout: Rollout, args: Args, take_step=ppo_step) -> dict[str, float]:
    """Maximises L(theta) in `update_epochs` passes over the rollout; returns means of what `ppo_loss` logs."""
    with torch.no_grad():
        old_log_prob, _ = agent.log_prob(rollout.obs, rollout.action)  # theta is still as it was in the rollout
        value, next_value = agent.value(torch.stack([rollout.obs, rollout.next_obs]))  # at once: fewer calls
    advantage = gae(rollout, value, next_value, args.gamma, args.gae_lambda)
    target = advantage + value
    batch = [x.flatten(0, 1) for x in (rollout.obs, rollout.action, old_log_prob, value, target, advantage)]
    logs = []
    for _ in range(args.update_epochs):
        order = torch.randperm(target.numel(), device=target.device)
        *others, adv = (x[order].unflatten(0, (args.num_minibatches, -1)) for x in batch)
        if args.norm_adv:  # here and not in the loss, which sees only a share of the minibatch under torchrun
            adv = (adv - adv.mean(1, keepdim=True)) / (adv.std(1, keepdim=True) + 1e-8)
        for minibatch in zip(*others, adv):
            log = take_step(agent, optimizer, minibatch, args)
            logs.append(torch.stack(list(log.values())))
        if args.target_kl is not None and log["losses/approx_kl"] > args.target_kl:
            break
    means = torch.stack(logs).mean(0).tolist()
    explained_variance = 1 - advantage.var(correction=0) / target.var(correction=0).clamp(min=1e-8)
    return dict(zip(log, means)) | {"losses/explained_variance": explained_variance.item()}


# ----- training -------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains an agent with PPO (Algorithm 1 of the paper); returns the run's folder."""
    args, saved = load_run(args)
    device = check_flags(args)
    for name in ("num_steps", "update_epochs", "num_minibatches", "clip_coef", "max_grad_norm"):
        require(getattr(args, name) > 0, f"--{name.replace('_', '-')} must be above 0")
    require(0 <= args.gae_lambda <= 1, "--gae-lambda must lie between 0 and 1")
    require(math.isfinite(args.vf_coef) and math.isfinite(args.ent_coef), "--vf-coef and --ent-coef must be finite")
    batch_size = args.num_envs * args.num_steps
    require(batch_size % args.num_minibatches == 0, f"--num-minibatches must divide {batch_size} steps")
    require(batch_size > args.num_minibatches, "--num-minibatches must leave at least 2 steps to a minibatch")
    device, rank, processes = join_processes(args, device)
    require(batch_size // args.num_minibatches % processes == 0, f"{processes} processes cannot share a minibatch")
    envs = make_envs(args, args.num_envs // processes)
    fits = isinstance(envs.single_action_space, (gym.spaces.Discrete, gym.spaces.Box))
    require(fits, f"{args.env_id}: actions must be Discrete or a Box, these are {envs.single_action_space}")

    torch.manual_seed(args.seed)
    agent = Agent(envs, args, device)
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    take_step = in_parallel(accelerated(ppo_step, args, device), args)
    with closing(envs), Run(args, saved, agent=agent, optimizer=optimizer) as run:
        step = run.step
        obs = reset(envs, args.seed, step, rank=rank)
        while step < args.total_timesteps:
            remaining = 1 - step / args.total_timesteps if args.anneal_lr else 1.0
            optimizer.param_groups[0]["lr"] = remaining * args.learning_rate

            # Run the policy as it is for T steps in N environments.
            steps = []
            for _ in range(args.num_steps):
                action = act_alike(agent, obs, rank, processes)  # agent.act, except under torchrun
                next_obs, reward, terminated, truncated, infos = envs.step(agent.to_env(action))
                done = terminated | truncated
                steps.append((obs, action, reward, true_next_obs(next_obs, done, infos), terminated, done))
                run.count_episodes(infos)
                obs = next_obs
            step += batch_size

            # Learn from these steps. Their rewards are in the statistics that scale them: a small bias, which fades.
            rollout = gather(stack(steps, device))
            if args.norm_reward:
                rollout = rollout._replace(reward=agent.reward_scaler(rollout.reward, rollout.done))
            row = ppo_update(agent, optimizer, rollout, args, take_step)
            if args.norm_obs:  # not before the update, which must see what the policy saw
                agent.obs_statistics.update(rollout.obs.flatten(0, 1))
            if run.advance(step, row | {"charts/learning_rate": optimizer.param_groups[0]["lr"]}):  # a checkpoint
                obs = reset(envs, args.seed, step, rank=rank)
                if args.norm_reward:
                    agent.reward_scaler.running_return = 0.0
        return run.finish()


# ----- several processes, the same text in reinforce.py, a2c.py and ppo.py: read it for torchrun or never -------------


def join_processes(args: Args, device: torch.device) -> tuple[torch.device, int, int]:
    """The device and the number of this process, from 0, and how many torchrun started; without it 0 and 1.

    All have the same networks and learn from the same rollouts, but each steps only its share of the environments, and
    computes only its share of each gradient. The first one writes the run. They talk by gloo from CPU to CPU,
    whatever the device: one way for all, and a gradient is small.
    """
    if dist.is_torchelastic_launched() and not dist.is_initialized():
        importlib.import_module("torch.distributed.nn")  # imported later, by an optimizer, it keeps the group alive
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)  # a thread of it that outlives Python aborts the process
    if not dist.is_initialized():
        return device, 0, 1
    rank, processes = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        require(device.index < torch.cuda.device_count(), f"there are only {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)
    require(args.num_envs % processes == 0, f"--num-envs {args.num_envs} cannot be split over {processes} processes")
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device, rank, processes


def act_alike(agent: Agent, obs: np.ndarray, rank: int, processes: int) -> np.ndarray:
    """Actions for obs (N, obs_dim) of this process, with the noise that one process would draw for all environments.

    Every process draws all of that noise. So their generators stay in step, and their minibatches are the same.
    """
    if processes == 1:
        return agent.act(obs, explore=True)
    return np.split(agent.act(np.tile(obs, (processes, 1)), explore=True), processes)[rank]


def gather(rollout: Rollout) -> Rollout:
    """The rollouts (T, N, ...) of all processes side by side."""
    if not dist.is_initialized():
        return rollout
    parts = [[torch.empty_like(x, device="cpu") for _ in range(dist.get_world_size())] for x in rollout]
    for x, own in zip(parts, rollout):
        dist.all_gather(x, own.cpu())
    return Rollout(*(torch.cat(x, dim=1).to(rollout.obs.device) for x in parts))


def in_parallel(take_step, args: Args):
    """`take_step` by all processes, each with a share of the batch; `average` makes it the same step."""
    if not dist.is_initialized():
        return take_step
    rank, processes = dist.get_rank(), dist.get_world_size()
    share = replace(args, num_envs=args.num_envs // processes)  # by which REINFORCE divides
    return lambda agent, optimizer, batch, _: take_step(agent, optimizer, [x[rank::processes] for x in batch], share)


def average(agent: Agent, log: dict[str, Tensor]) -> None:
    """Makes gradients and log the means over all processes: those of the whole batch, if the shares are equal."""
    if not dist.is_initialized():
        return
    own = [*(p.grad for p in agent.parameters() if p.grad is not None), *log.values()]
    mean = torch.cat([x.flatten() for x in own]).cpu() / dist.get_world_size()
    dist.all_reduce(mean)
    for x, part in zip(own, mean.split([x.numel() for x in own])):
        x.copy_(part.view_as(x))


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
