"""Do the tests see what they are there for? Plants plausible mistakes, one at a time, and reports which tests fail.

    python tests/mutations.py                        # all of them (hours), and the table tests/mutations.md
    python tests/mutations.py --only gae             # those with `gae` in their name, and no table
    python tests/mutations.py --record FILE          # goes on where a run with the same file was cut off
    python tests/mutations.py --check                # only whether each still applies to the scripts as they are

A mutation replaces a text that occurs exactly once in each of its scripts, in a copy of the repository in a temporary
folder; nothing here is touched. What several scripts share is changed in all of them, as a fix would be. The fast tests
run there, in stages that begin with the quick ones; the later stages only if the earlier ones saw nothing. Not so
test_copies.py: it compares the scripts with each other and would see nearly everything, without knowing what is right.

The exit code is 1 if a mutation survives. Then it changes nothing that anyone could see, and is no mistake, or there is
a test to write.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("test_algorithms.py", "test_value_algorithms.py", "test_loop.py", "test_against_sb3.py")
SECOND = ("test_processes.py",)
LAST = ("test_learning.py",)
NEVER = ("test_copies.py", "test_benchmark.py")
ENOUGH = 5  # failed tests, after which a stage ends


class Mutation(NamedTuple):
    """A mistake: `old` becomes `new` in each of the scripts, "*" for all that contain it."""

    name: str
    scripts: str
    old: str
    new: str


POLICY_GRADIENT = "reinforce.py a2c.py ppo.py"
REPLAY = "dqn.py ddpg.py td3.py sac.py"
CONTINUOUS = "ddpg.py td3.py sac.py"


MUTATIONS = [
    # ----- networks of the policy-gradient scripts
    Mutation("the second hidden layer begins with gain 1", "*", "(self.fc2, math.sqrt(2))", "(self.fc2, 1.0)"),
    Mutation("logits begin with gain 1", "*", "int(space.n), gain=0.01)", "int(space.n), gain=1.0)"),
    Mutation("means begin with gain 1", "*", "math.prod(space.shape), gain=0.01)", "math.prod(space.shape), gain=1.0)"),
    Mutation("critic begins with gain 0.01", "*", "sizes, 1, gain=1.0)", "sizes, 1, gain=0.01)"),
    Mutation(
        "the hidden layers change places",
        "reinforce.py a2c.py ppo.py dqn.py",
        "h1, h2 = hidden_sizes",
        "h2, h1 = hidden_sizes",
    ),
    Mutation(
        "the first hidden layer of Q is as wide as the second",
        CONTINUOUS,
        "action_dim, h1), Linear(h1, h2)",
        "action_dim, h2), Linear(h2, h2)",
    ),
    Mutation("layers without their bias", "*", "(x, weight, bias)", "(x, weight)"),
    Mutation("compiled layers take their bias off", "*", "- -bias", "- bias"),
    Mutation(
        "a hidden layer without ReLU",
        "dqn.py ddpg.py td3.py sac.py",
        "self.fc2(self.fc1(obs).relu_()).relu_()",
        "self.fc2(self.fc1(obs)).relu_()",
    ),
    Mutation(
        "ReLU for tanh",
        "*",
        "self.fc2(self.fc1(obs).tanh_()).tanh_()",
        "self.fc2(self.fc1(obs).relu_()).relu_()",
    ),
    Mutation("biases begin as torch has them", "*", "        nn.init.zeros_(layer.bias)\n", ""),
    Mutation(
        "Gumbel noise with the wrong sign",
        "*",
        "logits - torch.empty_like(logits).exponential_().log_()",
        "logits + torch.empty_like(logits).exponential_().log_()",
    ),
    Mutation(
        "explores where it must not", "*", "if explore:  # -log(exponential)", "if not explore:  # -log(exponential)"
    ),
    Mutation("entropy without its minus", "*", "entropy = -(log_probs.exp()", "entropy = (log_probs.exp()"),
    Mutation("softmax over the wrong axis", "*", "self.net(obs).log_softmax(-1)", "self.net(obs).log_softmax(0)"),
    Mutation("Discrete actions have 64 bits", "*", ".start).astype(self.space.dtype)", ".start)"),
    Mutation("Discrete actions always begin at 0", "*", "(action + self.space.start).astype", "action.astype"),
    Mutation("log_std for std", "*", "mean + self.log_std.exp() * torch", "mean + self.log_std * torch"),
    Mutation(
        "one noise for all dimensions of an action",
        "*",
        "torch.randn_like(mean) if explore",
        "torch.randn_like(mean[..., :1]) if explore",
    ),
    Mutation(
        "variance for std in the density",
        "*",
        "(action - self.net(obs)) / self.log_std.exp()",
        "(action - self.net(obs)) / self.log_std.exp().square()",
    ),
    Mutation("2 pi once, not once a dimension", "*", "len(self.log_std) * math.log(2", "math.log(2"),
    Mutation("density averages the dimensions", "*", "-z.square().sum(-1) / 2", "-z.square().mean(-1) / 2"),
    Mutation("Gaussian entropy of one dimension", "*", "log_scale + len(self.log_std) / 2", "log_scale + 1 / 2"),
    Mutation(
        "actions not cut off at the bounds",
        POLICY_GRADIENT,
        "        action = action.clip(self.space.low, self.space.high)\n",
        "",
    ),
    Mutation(
        "fractions of integer actions are dropped", "*", "action.round() if np.issubdtype", "action if np.issubdtype"
    ),
    Mutation("whole for half the width of the bounds", "*", "high / 2 - low / 2  #", "high - low  #"),
    Mutation(
        "one finite bound taken for two",
        "*",
        "np.isfinite(space.low) & np.isfinite(space.high)",
        "np.isfinite(space.low) | np.isfinite(space.high)",
    ),
    # ----- normalisation
    Mutation("running variance unbiased", "*", "torch.var_mean(x, dim=0, correction=0)", "torch.var_mean(x, dim=0)"),
    Mutation(
        "running variance without the shift of the mean",
        "*",
        "var + (1 - share) * (mean - self.mean).square(), share",
        "var, share",
    ),
    Mutation(
        "running variance around the new mean",
        "*",
        "        self.var.lerp_(var + (1 - share) * (mean - self.mean).square(), share)\n"
        "        self.mean.lerp_(mean, share)\n",
        "        self.mean.lerp_(mean, share)\n"
        "        self.var.lerp_(var + (1 - share) * (mean - self.mean).square(), share)\n",
    ),
    Mutation(
        "running scale stays 1", "*", "self.scale.copy_((self.var + 1e-8).rsqrt())", "self.scale.copy_(self.scale)"
    ),
    Mutation(
        "statistics in no checkpoint",
        "*",
        'self.register_buffer("mean", torch.zeros(size))',
        'self.register_buffer("mean", torch.zeros(size), persistent=False)',
    ),
    Mutation("scaler: no end of an episode", "*", "self.gamma * ~done)", "self.gamma * torch.ones_like(reward))"),
    Mutation("scaler: sum without gamma", "*", "zip(reward, self.gamma * ~done)", "zip(reward, 1.0 * ~done)"),
    Mutation("scaler: deviation of rewards", "*", "torch.stack(returns).reshape", "reward.reshape"),
    Mutation(
        "scaler: rewards centred as well",
        "*",
        "return reward * torch.where",
        "return (reward - self.statistics.mean) * torch.where",
    ),
    Mutation("scaler: equal returns scale by 10,000", "*", "torch.where(var > 0, var + 1e-8, 1.0)", "(var + 1e-8)"),
    Mutation(
        "scaler: episodes end by termination only",
        POLICY_GRADIENT,
        "(rollout.reward, rollout.done)",
        "(rollout.reward, rollout.terminated)",
    ),
    Mutation(
        "scaler: the return goes on over a reset",
        "a2c.py ppo.py",
        "\n                if args.norm_reward:\n                    agent.reward_scaler.running_return = 0.0\n",
        "\n",
    ),
    Mutation(
        "scaler: the return goes on over a reset (reinforce)",
        "reinforce.py",
        "            if args.norm_reward:\n                agent.reward_scaler.running_return = 0.0\n",
        "",
    ),
    Mutation(
        "observations divided by the variance",
        "*",
        "(self.var + 1e-8).rsqrt()",
        "(self.var + 1e-8).reciprocal()",
    ),
    Mutation("normalised observations without limits", "*", "statistics.scale).clamp(-10, 10)", "statistics.scale)"),
    Mutation("the critic sees raw observations", "*", "self.critic(self.normalize(obs))", "self.critic(obs)"),
    Mutation("the policy acts on raw observations", "*", "self.policy(self.normalize(obs)", "self.policy(obs"),
    Mutation(
        "statistics updated whenever the agent acts, in evaluation too",
        "*",
        "        return self.policy(self.normalize(obs), explore)",
        "        if self.obs_statistics is not None:\n"
        "            self.obs_statistics.update(obs)\n"
        "        return self.policy(self.normalize(obs), explore)",
    ),
    Mutation(
        "statistics updated before the policy is",
        "ppo.py",
        "            row = ppo_update(agent, optimizer, rollout, args, take_step)\n"
        "            if args.norm_obs:  # not before the update, which must see what the policy saw\n"
        "                agent.obs_statistics.update(rollout.obs.flatten(0, 1))\n",
        "            if args.norm_obs:\n"
        "                agent.obs_statistics.update(rollout.obs.flatten(0, 1))\n"
        "            row = ppo_update(agent, optimizer, rollout, args, take_step)\n",
    ),
    Mutation("statistics of next_obs", "*", "update(rollout.obs.flatten", "update(rollout.next_obs.flatten"),
    # ----- what the loop hands on
    Mutation(
        "next_obs is the first of the next episode",
        POLICY_GRADIENT,
        "reward, true_next_obs(next_obs, done, infos), terminated",
        "reward, next_obs, terminated",
    ),
    Mutation(
        "next_obs is the first of the next episode (replay)",
        REPLAY,
        "reward, true_next_obs(next_obs, done, infos), terminated)",
        "reward, next_obs, terminated)",
    ),
    Mutation(
        "true next_obs after termination only",
        POLICY_GRADIENT,
        "true_next_obs(next_obs, done, infos)",
        "true_next_obs(next_obs, terminated, infos)",
    ),
    Mutation("next_obs written into the next obs", "*", "        next_obs = next_obs.copy()\n", ""),
    Mutation("truncated episodes do not end", POLICY_GRADIENT, "done = terminated | truncated", "done = terminated"),
    Mutation("done for terminated in the buffer", REPLAY, "infos), terminated)", "infos), terminated | truncated)"),
    Mutation(
        "the rollout holds actions in the units of the environment",
        POLICY_GRADIENT,
        "steps.append((obs, action, reward",
        "steps.append((obs, agent.to_env(action), reward",
    ),
    Mutation(
        "the buffer holds actions in the units of the environment",
        CONTINUOUS,
        "buffer.add(obs, action, reward",
        "buffer.add(obs, agent.to_env(action), reward",
    ),
    Mutation("steps of one environment are counted", "a2c.py ppo.py", "step += batch_size", "step += args.num_steps"),
    Mutation(
        "steps of one environment are counted (reinforce)",
        "reinforce.py",
        "step += args.num_envs * len(steps)",
        "step += len(steps)",
    ),
    Mutation("turns of the loop are counted", REPLAY, "step, step + args.num_envs\n", "step, step + 1\n"),
    # ----- returns and advantages
    Mutation(
        "gae: done for terminated",
        "*",
        "next_value * ~rollout.terminated - value",
        "next_value * ~rollout.done - value",
    ),
    Mutation("gae: terminated for done", "*", "gae_lambda * ~rollout.done)", "gae_lambda * ~rollout.terminated)"),
    Mutation("gae: no lambda", "*", "gamma * gae_lambda * ~rollout.done", "gamma * ~rollout.done"),
    Mutation("gae: no gamma in the sum", "*", "gamma * gae_lambda * ~rollout.done", "gae_lambda * ~rollout.done"),
    Mutation(
        "gae: no gamma in delta", "a2c.py ppo.py", "rollout.reward + gamma * next_value", "rollout.reward + next_value"
    ),
    Mutation("discounted sum: discount of the row before", "*", "discount.unbind()", "discount.roll(1, 0).unbind()"),
    Mutation(
        "the next value is that of the next row",
        POLICY_GRADIENT,
        "[rollout.obs, rollout.next_obs]",
        "[rollout.obs, rollout.obs.roll(-1, 0)]",
    ),
    Mutation(
        "the target of the value is the advantage", "a2c.py ppo.py", "target = advantage + value", "target = advantage"
    ),
    Mutation(
        "the target of the value has a gradient (a2c)",
        "a2c.py",
        "    with torch.no_grad():\n        value, next_value",
        "    value, next_value",
    ),
    # ----- REINFORCE
    Mutation("reward-to-go: truncation is the end of all reward", "*", "+ gamma * next_value * truncated,", ","),
    Mutation("reward-to-go: a value after termination", "*", "rollout.done & ~rollout.terminated", "rollout.done"),
    Mutation(
        "reward-to-go: on into the next episode",
        "*",
        "truncated, gamma * ~rollout.done)",
        "truncated, gamma * ~rollout.terminated)",
    ),
    Mutation(
        "mean baseline: with its own episode",
        "*",
        "(total.sum() - total) / (count.sum() - count)",
        "total.sum() / count.sum()",
    ),
    Mutation(
        "mean baseline: with later episodes",
        "*",
        "total, count = (returns * played).sum(0)",
        "total, count = returns.sum(0)",
    ),
    Mutation(
        "the last step of an episode is lost",
        "*",
        "rollout.done.cumsum(0) == rollout.done",
        "rollout.done.cumsum(0) == 0",
    ),
    Mutation("later episodes count as well", "reinforce.py", "[x[played] for x in (", "[x.flatten(0, 1) for x in ("),
    Mutation("the baseline is added", "reinforce.py", "target - baseline)]", "target + baseline)]"),
    Mutation(
        "REINFORCE averages over steps", "reinforce.py", "* advantage).sum() / args.num_envs", "* advantage).mean()"
    ),
    Mutation("V learns the advantage", "reinforce.py", "(agent.value(obs) - target)", "(agent.value(obs) - advantage)"),
    Mutation(
        "the gradient of the policy's loss goes through the baseline",
        "reinforce.py",
        "        with torch.no_grad():\n            baseline, next_value",
        "        baseline, next_value",
    ),
    Mutation(
        "a batch ends with its first episode",
        "reinforce.py",
        "exchange(unfinished.any())",
        "exchange(unfinished.all())",
    ),
    Mutation(
        "episodes of those who wait are counted",
        "reinforce.py",
        "run.count_episodes(infos, unfinished)",
        "run.count_episodes(infos)",
    ),
    Mutation(
        "no reset between two batches",
        "reinforce.py",
        "if checkpointed else envs.reset()[0]",
        "if checkpointed else obs",
    ),
    Mutation(
        "no seeds at the reset after a checkpoint",
        "reinforce.py",
        "reset(envs, args.seed, step, rank=rank) if checkpointed else envs.reset()[0]",
        "envs.reset()[0]",
    ),
    # ----- A2C and PPO
    Mutation(
        "A2C goes downhill", "a2c.py", "policy_loss = -(log_prob * advantage)", "policy_loss = (log_prob * advantage)"
    ),
    Mutation("entropy with the wrong sign", "a2c.py ppo.py", "- args.ent_coef * entropy", "+ args.ent_coef * entropy"),
    Mutation("no weight of the value loss", "a2c.py ppo.py", "+ args.vf_coef * value_loss", "+ value_loss"),
    Mutation(
        "value loss without its half",
        "a2c.py",
        "value_loss = (agent.value(obs) - target).square().mean() / 2",
        "value_loss = (agent.value(obs) - target).square().mean()",
    ),
    Mutation(
        "PPO: value loss without its half",
        "ppo.py",
        "value_loss = value_error.mean() / 2",
        "value_loss = value_error.mean()",
    ),
    Mutation("short gradients are made longer", "a2c.py ppo.py", "(norm + 1e-6)).clamp(max=1)", "(norm + 1e-6))"),
    Mutation("gradients are not clipped", "a2c.py ppo.py", "(norm + 1e-6)).clamp(max=1)", "(norm + 1e-6)).clamp(1, 1)"),
    Mutation("gradients add up", POLICY_GRADIENT, "    optimizer.zero_grad()\n    return log", "    return log"),
    Mutation(
        "PPO: ratio upside down", "ppo.py", "log_ratio = log_prob - old_log_prob", "log_ratio = old_log_prob - log_prob"
    ),
    Mutation("PPO: max for min", "ppo.py", "-torch.min(ratio * advantage", "-torch.max(ratio * advantage"),
    Mutation(
        "PPO: no min, only the clip",
        "ppo.py",
        "-torch.min(ratio * advantage, clipped_ratio * advantage).mean()",
        "-(clipped_ratio * advantage).mean()",
    ),
    Mutation("PPO: goes downhill", "ppo.py", "policy_loss = -torch.min", "policy_loss = torch.min"),
    Mutation("PPO: clipped above only", "ppo.py", "ratio.clamp(1 - args.clip_coef, 1", "ratio.clamp(0, 1"),
    Mutation("PPO: min for max in the value loss", "ppo.py", "torch.max(value_error", "torch.min(value_error"),
    Mutation(
        "PPO: the value clipped around 0",
        "ppo.py",
        "old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)",
        "value.clamp(-args.clip_coef, args.clip_coef)",
    ),
    Mutation("PPO: advantages by their variance", "ppo.py", "adv.std(1", "adv.var(1"),
    Mutation("PPO: advantages not centred", "ppo.py", "(adv - adv.mean(1, keepdim=True)) /", "adv /"),
    Mutation("PPO: advantages centred over all minibatches", "ppo.py", "adv.mean(1, keepdim=True)", "adv.mean()"),
    Mutation("PPO: approx_kl with a wrong sign", "ppo.py", "(ratio - 1 - log_ratio)", "(ratio - 1 + log_ratio)"),
    Mutation(
        "PPO: one order for all epochs",
        "ppo.py",
        "    for _ in range(args.update_epochs):\n"
        "        order = torch.randperm(target.numel(), device=target.device)\n",
        "    order = torch.randperm(target.numel(), device=target.device)\n    for _ in range(args.update_epochs):\n",
    ),
    Mutation(
        "PPO: steps drawn with replacement",
        "ppo.py",
        "torch.randperm(target.numel(), device",
        "torch.randint(target.numel(), (target.numel(),), device",
    ),
    Mutation(
        "PPO: minibatches of num_minibatches steps",
        "ppo.py",
        "unflatten(0, (args.num_minibatches, -1))",
        "unflatten(0, (-1, args.num_minibatches))",
    ),
    Mutation("PPO: target_kl stops too small a change", "ppo.py", "> args.target_kl", "< args.target_kl"),
    Mutation(
        "gamma and lambda swapped", "a2c.py ppo.py", "args.gamma, args.gae_lambda)", "args.gae_lambda, args.gamma)"
    ),
    # ----- learning rates and optimizers
    Mutation(
        "the learning rate rises",
        f"{POLICY_GRADIENT} dqn.py",
        "= 1 - step / args.total_timesteps if",
        "= step / args.total_timesteps if",
    ),
    Mutation(
        "the learning rate of the step to come",
        "a2c.py ppo.py",
        "remaining = 1 - step / args",
        "remaining = 1 - (step + batch_size) / args",
    ),
    Mutation(
        "the learning rate never reaches the optimizer", POLICY_GRADIENT, '["lr"] = remaining * args', '["lr"] = args'
    ),
    Mutation(
        "the learning rate never reaches the optimizer (dqn)",
        "dqn.py",
        'critic_optimizer.param_groups[0]["lr"] = row[',
        "row[",
    ),
    Mutation("Adam's own epsilon", "reinforce.py ppo.py", ", eps=1e-5, fused=True)", ", fused=True)"),
    Mutation(
        "Adam for RMSprop",
        "a2c.py",
        "torch.optim.RMSprop(agent.parameters(), lr=args.learning_rate, alpha=0.99, eps=1e-5, foreach=True)",
        "torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)",
    ),
    Mutation(
        "the optimizer never moves the critic",
        POLICY_GRADIENT,
        "(agent.parameters(), lr",
        "(agent.policy.parameters(), lr",
    ),
    Mutation(
        "the second critic never learns",
        "td3.py sac.py",
        ".square().mean(-1).sum()",
        ".square().mean(-1)[0]",
    ),
    Mutation(
        "the learning rate of the actor for the critics",
        CONTINUOUS,
        "lr=args.q_lr, fused",
        "lr=args.learning_rate, fused",
    ),
    Mutation(
        "the temperature at the rate of the actor",
        "sac.py",
        '"lr": args.q_lr * args.autotune}',
        '"lr": args.learning_rate * args.autotune}',
    ),
    Mutation("a fixed temperature is tuned", "sac.py", "args.q_lr * args.autotune", "args.q_lr"),
    Mutation(
        "the temperature in no optimizer",
        "sac.py",
        'groups = {"params": agent.actor.parameters()}, {"params": [agent.log_alpha], "lr": args.q_lr * args.autotune}',
        "groups = agent.actor.parameters()",
    ),
    Mutation("gradients of the critic add up", REPLAY, "    critic_optimizer.zero_grad()\n", ""),
    Mutation("gradients of the actor add up", CONTINUOUS, "    actor_optimizer.zero_grad()\n", ""),
    # ----- DQN
    Mutation(
        "DQN: the target of the network itself", "dqn.py", "next_q = agent.target_critic(", "next_q = agent.critic("
    ),
    Mutation(
        "DQN: Double with the roles swapped",
        "dqn.py",
        "        next_action = (agent.critic(batch.next_obs) if args.double else next_q).argmax(-1, keepdim=True)\n",
        "        next_action = next_q.argmax(-1, keepdim=True)\n"
        "        next_q = agent.critic(batch.next_obs) if args.double else next_q\n",
    ),
    Mutation(
        "DQN: value of the best action, not of the one taken",
        "dqn.py",
        ".gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)",
        ".max(-1).values",
    ),
    Mutation("DQN: dueling mean over the batch", "dqn.py", "advantage.mean(-1, keepdim", "advantage.mean(0, keepdim"),
    Mutation("DQN: dueling without the mean", "dqn.py", " - advantage.mean(-1, keepdim=True)", ""),
    Mutation("DQN: Huber loss with the delta of torch", "dqn.py", ", delta=args.huber_delta)", ")"),
    Mutation(
        "DQN: epsilon falls on and on",
        "dqn.py",
        "min(1.0, step / max(1, args.exploration_fraction * args.total_timesteps))",
        "step / max(1, args.exploration_fraction * args.total_timesteps)",
    ),
    Mutation(
        "DQN: epsilon falls over the whole run",
        "dqn.py",
        "step / max(1, args.exploration_fraction * args.total_timesteps)",
        "step / args.total_timesteps",
    ),
    Mutation("DQN: epsilon never falls", "dqn.py", "            agent.epsilon = epsilon_at(step, args)\n", ""),
    Mutation(
        "DQN: one coin for all environments",
        "dqn.py",
        "np.random.rand(len(obs)) < (",
        "np.random.rand() < (",
    ),
    Mutation("DQN: evaluated with epsilon", "dqn.py", "self.epsilon if explore else self.eval_epsilon", "self.epsilon"),
    Mutation("DQN: the last action is never drawn", "dqn.py", "randint(self.space.n,", "randint(self.space.n - 1,"),
    Mutation(
        "DQN: targets updated at multiples of the frequency only",
        "dqn.py",
        "if now % args.target_network_frequency == 0:",
        "if now == step and now % args.target_network_frequency == 0:",
    ),
    Mutation(
        "DQN: targets updated once a turn at most",
        "dqn.py",
        "if now % args.target_network_frequency == 0:",
        "if now == step and step // args.target_network_frequency > before // args.target_network_frequency:",
    ),
    Mutation(
        "DQN: targets updated after all updates of a turn",
        "dqn.py",
        "                if now % args.target_network_frequency == 0:\n    ",
        "            for _ in range(before // args.target_network_frequency, step // args.target_network_frequency):\n",
    ),
    Mutation(
        "DQN: the network follows its target",
        "dqn.py",
        "polyak(agent.target_critic, agent.critic,",
        "polyak(agent.critic, agent.target_critic,",
    ),
    Mutation("DQN: a value after termination", "dqn.py", "next_value * ~batch.terminated", "next_value"),
    # ----- DDPG, TD3 and SAC
    Mutation(
        "the target is the critic itself",
        "dqn.py ddpg.py",
        "copy.deepcopy(self.critic).requires_grad_(False)",
        "self.critic",
    ),
    Mutation(
        "the target begins elsewhere (ddpg)",
        "ddpg.py",
        "copy.deepcopy(self.critic)",
        "Critic(obs_dim, sizes, self.action_dim)",
    ),
    Mutation("a value after termination", CONTINUOUS, "next_value * ~batch.terminated", "next_value"),
    Mutation(
        "the target of the actor as it is",
        "ddpg.py td3.py",
        "next_action = agent.target_actor(",
        "next_action = agent.actor(",
    ),
    Mutation(
        "the target of the critic as it is",
        CONTINUOUS,
        "next_value = agent.target_critic(",
        "next_value = agent.critic(",
    ),
    Mutation("max for min of the targets", "td3.py sac.py", "next_action).amin(0)", "next_action).amax(0)"),
    Mutation("both critics begin alike", "td3.py sac.py", "Linear(h2, 1)] for _ in range(2)]", "Linear(h2, 1)]] * 2"),
    Mutation("the loss of the critics averages them", "td3.py sac.py", ".square().mean(-1).sum()", ".square().mean()"),
    Mutation("the actor goes downhill", "ddpg.py td3.py", "    loss = -agent.critic", "    loss = agent.critic"),
    Mutation("TD3: the actor climbs the second critic", "td3.py", "else x[:1] for", "else x[1:] for"),
    Mutation(
        "TD3: the actor climbs both critics", "td3.py", "agent.actor(batch.obs), both=False)", "agent.actor(batch.obs))"
    ),
    Mutation(
        "the gradient of the actor reaches the critics",
        CONTINUOUS,
        'loss.backward(inputs=[p for group in actor_optimizer.param_groups for p in group["params"]])',
        "loss.backward()",
    ),
    Mutation("actor without tanh", "ddpg.py td3.py", "self.out(hidden).tanh()", "self.out(hidden)"),
    Mutation(
        "noisy actions beyond the bounds",
        "ddpg.py td3.py",
        "torch.randn_like(action)).clamp(-1, 1)",
        "torch.randn_like(action))",
    ),
    Mutation(
        "one noise for all environments", "ddpg.py td3.py", "torch.randn_like(action))", "torch.randn_like(action[:1]))"
    ),
    Mutation(
        "DDPG: the target of the actor stands still",
        "ddpg.py",
        "    polyak(agent.target_actor, agent.actor, args.tau)\n",
        "",
    ),
    Mutation(
        "polyak the wrong way round", "*", "list(source.parameters()), tau)", "list(source.parameters()), 1 - tau)"
    ),
    Mutation("TD3: noise of the target not clipped", "td3.py", ".clamp(-args.noise_clip, args.noise_clip)", ""),
    Mutation(
        "TD3: actions of the target beyond the bounds",
        "td3.py",
        "(next_action + noise).clamp(-1, 1)",
        "next_action + noise",
    ),
    Mutation(
        "TD3: noise of exploration on the target",
        "td3.py",
        "(args.policy_noise * torch",
        "(args.exploration_noise * torch",
    ),
    Mutation(
        "TD3: one noise for the whole batch",
        "td3.py",
        "torch.randn_like(next_action)",
        "torch.randn_like(next_action[:1])",
    ),
    Mutation(
        "TD3: delay off by one",
        "td3.py",
        "count % args.policy_frequency == 0",
        "(count + 1) % args.policy_frequency == 0",
    ),
    Mutation(
        "TD3: targets follow in every update",
        "td3.py",
        "    if not move_actor:\n        return log\n",
        "    if not move_actor:\n        polyak(agent.target_critic, agent.critic, args.tau)\n        return log\n",
    ),
    Mutation(
        "TD3: the delay begins anew in each turn",
        "td3.py",
        "range(updates_by(before, args), updates_by(step, args))",
        "range(updates_by(step, args) - updates_by(before, args))",
    ),
    Mutation("SAC: density without the tanh", "sac.py", "(gaussian - log_slope).sum(-1)", "gaussian.sum(-1)"),
    Mutation("SAC: slope with the wrong sign", "sac.py", "(gaussian - log_slope)", "(gaussian + log_slope)"),
    Mutation(
        "SAC: density without log_std", "sac.py", ".square() / 2 - log_std - math.log", ".square() / 2 - math.log"
    ),
    Mutation("SAC: softplus of u, not of 2 u", "sac.py", "softplus(-2 * u)", "softplus(-u)"),
    Mutation(
        "SAC: slope that is infinite far out",
        "sac.py",
        "2 * (math.log(2) - u - nn.functional.softplus(-2 * u))",
        "(1 - u.tanh().square()).log()",
    ),
    Mutation(
        "SAC: log_std for std in the loss", "sac.py", "u = mean + log_std.exp() * noise", "u = mean + log_std * noise"
    ),
    Mutation("SAC: log_std for std to act", "sac.py", "u = u + log_std.exp() * torch", "u = u + log_std * torch"),
    Mutation("SAC: log_std not limited", "sac.py", "return mean, 3.5 * log_std.tanh() - 1.5", "return mean, log_std"),
    Mutation(
        "SAC: no gradient through the action",
        "sac.py",
        "    return u.tanh(), squashed",
        "    return u.tanh().detach(), squashed",
    ),
    Mutation("SAC: acts on the mean without tanh", "sac.py", "return u.tanh().cpu()", "return u.clamp(-1, 1).cpu()"),
    Mutation(
        "SAC: no entropy in the target", "sac.py", "        next_value -= agent.log_alpha.exp() * next_log_prob\n", ""
    ),
    Mutation("SAC: entropy in the target with the wrong sign", "sac.py", "next_value -= agent", "next_value += agent"),
    Mutation("SAC: log alpha for alpha", "sac.py", "alpha = agent.log_alpha.exp()", "alpha = agent.log_alpha"),
    Mutation(
        "SAC: the target has a gradient",
        "sac.py",
        "    with torch.no_grad():\n        next_action, next_log",
        "    with torch.enable_grad():\n        next_action, next_log",
    ),
    Mutation(
        "SAC: the actor climbs the first critic",
        "sac.py",
        "q = agent.critic(batch.obs, action).amin(0)",
        "q = agent.critic(batch.obs, action)[0]",
    ),
    Mutation(
        "SAC: entropy of the actor with the wrong sign",
        "sac.py",
        "(alpha.detach() * log_prob - q)",
        "(-alpha.detach() * log_prob - q)",
    ),
    Mutation(
        "SAC: the loss of the actor moves alpha", "sac.py", "(alpha.detach() * log_prob - q)", "(alpha * log_prob - q)"
    ),
    Mutation(
        "SAC: the loss of alpha moves the actor",
        "sac.py",
        "(log_prob.detach() + target_entropy)",
        "(log_prob + target_entropy)",
    ),
    Mutation("SAC: alpha goes the wrong way", "sac.py", "alpha_loss = -(alpha", "alpha_loss = (alpha"),
    Mutation(
        "SAC: target entropy with the wrong sign",
        "sac.py",
        "target_entropy = -action.shape[-1]",
        "target_entropy = action.shape[-1]",
    ),
    Mutation(
        "SAC: target entropy of the batch size",
        "sac.py",
        "target_entropy = -action.shape[-1]",
        "target_entropy = -action.shape[0]",
    ),
    Mutation(
        "SAC: a resumed run keeps the temperature it found",
        "sac.py",
        "            agent.log_alpha.detach().fill_(math.log(args.alpha))\n",
        "            pass\n",
    ),
    Mutation("random actions of one sign", CONTINUOUS, "np.random.uniform(-1, 1,", "np.random.uniform(0, 1,"),
    Mutation(
        "actions not moved to the bounds", "*", "self.center + self.half_width * action", "self.half_width * action"
    ),
    # ----- replay
    Mutation(
        "the first update too early", REPLAY, "args.gradient_steps * max(0, turns)", "args.gradient_steps * turns"
    ),
    Mutation(
        "updates counted from learning_starts",
        REPLAY,
        "step // args.train_frequency - args.learning_starts // args.train_frequency",
        "(step - args.learning_starts) // args.train_frequency",
    ),
    Mutation("one update a turn", REPLAY, "return args.gradient_steps * max(0, turns)", "return max(0, turns)"),
    Mutation(
        "updates one turn ahead",
        CONTINUOUS,
        "range(updates_by(before, args), updates_by(step, args))",
        "range(updates_by(step, args), updates_by(step + args.num_envs, args))",
    ),
    Mutation(
        "DQN: updates one step ahead",
        "dqn.py",
        "range(updates_by(now - 1, args), updates_by(now, args))",
        "range(updates_by(now, args), updates_by(now + 1, args))",
    ),
    Mutation(
        "one batch for all updates of a turn",
        "ddpg.py sac.py",
        "            for count in range(updates_by(before, args), updates_by(step, args)):\n"
        "                batch = buffer.sample(args.batch_size)\n",
        "            batch = buffer.sample(args.batch_size)\n"
        "            for count in range(updates_by(before, args), updates_by(step, args)):\n",
    ),
    Mutation(
        "random actions for a turn too long",
        REPLAY,
        "if step < args.learning_starts",
        "if step <= args.learning_starts",
    ),
    Mutation(
        "the ring does not wrap around",
        "*",
        "np.arange(start, start + count) % self.size",
        "np.arange(start, start + count).clip(max=self.size - 1)",
    ),
    Mutation(
        "samples from places not yet filled",
        "*",
        "torch.randint(min(self.added, self.size),",
        "torch.randint(self.size,",
    ),
    Mutation(
        "the newest transition is never drawn",
        "*",
        "torch.randint(min(self.added, self.size),",
        "torch.randint(max(1, min(self.added, self.size) - 1),",
    ),
    Mutation(
        "next_obs of another transition",
        "*",
        "return batch._replace(obs=as_floats(batch.obs), next_obs=as_floats(batch.next_obs))",
        "return batch._replace(obs=as_floats(batch.obs), next_obs=as_floats(batch.next_obs.roll(1, 0)))",
    ),
    Mutation(
        "bytes not scaled", "*", "return obs / 255 if obs.dtype == torch.uint8 else obs.float()", "return obs.float()"
    ),
    Mutation(
        "bytes of next_obs not scaled", "*", "next_obs=as_floats(batch.next_obs)", "next_obs=batch.next_obs.float()"
    ),
    Mutation("a resumed ring begins at its first place", "*", 'self.added = state["added"]', "self.added = filled"),
    Mutation("a checkpoint holds the whole ring", "*", "x[: self.added].clone()", "x[: self.added]"),
    # ----- plumbing
    Mutation("no seed for torch at a reset", "*", "    torch.manual_seed(seed)\n", ""),
    Mutation("no seed for numpy at a reset", "*", "    np.random.seed(seed)\n", ""),
    Mutation(
        "no seed for the environments",
        "*",
        "return envs.reset(seed=seed)[0]",
        "return envs.reset()[0]",
    ),
    Mutation(
        "no seed for the environments' own spaces",
        "*",
        "        env.unwrapped.action_space.seed(seed + index)\n"
        "        env.unwrapped.observation_space.seed(seed + index)\n",
        "        pass\n",
    ),
    Mutation(
        "seed and step added up",
        "*",
        "seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])",
        "seed = sum(numbers)",
    ),
    Mutation("the first weights have no seed", "*", "    torch.manual_seed(args.seed)\n", ""),
    Mutation("no new episode at a truncation", "*", "if terminated[i] or truncated[i]:", "if terminated[i]:"),
    Mutation(
        "an episode goes on after its end",
        "*",
        "                obs[i], _ = env.reset()\n        return obs, reward",
        "        return obs, reward",
    ),
    Mutation(
        "the last observation is the first of the next episode",
        "*",
        '"final_obs": obs[i].copy()',
        '"final_obs": obs[i]',
    ),
    Mutation(
        "the return of an episode has those before in it",
        "*",
        "self.returns[i] = self.lengths[i] = 0",
        "self.lengths[i] = 0",
    ),
    Mutation(
        "a reset forgets no return",
        "*",
        "        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)\n",
        "        new = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)\n"
        "        self.returns, self.lengths = getattr(self, 'returns', new[0]), getattr(self, 'lengths', new[1])\n",
    ),
    Mutation(
        "rewards are rounded to float32",
        "*",
        "reward, infos = np.empty(self.num_envs), {}",
        "reward, infos = np.empty(self.num_envs, np.float32), {}",
    ),
    Mutation("all environments have one seed", "*", "None if seed is None else seed + i", "seed"),
    Mutation(
        "steps are counted where there is no gradient",
        "*",
        "counts += 1 if all(there) else counts.new_tensor(there)",
        "counts += 1",
    ),
    Mutation("a resumed optimizer counts from 0", "*", 'count.copy_(state["step"])', "count"),
    Mutation("RMSprop: eps in the square", "*", "torch._foreach_add_(root, eps)", "torch._foreach_add_(squares, eps)"),
    Mutation(
        "AdamW decays like Adam",
        "*",
        "fused = torch._fused_adamw_ if decoupled else torch._fused_adam_",
        "fused = torch._fused_adam_",
    ),
    Mutation("tiny numbers stay", "*", "    torch.set_flush_denormal(True)", "    torch.set_flush_denormal(False)"),
    Mutation(
        "a module that was replaced is still found",
        "*",
        "        if name in self._modules:\n",
        "        if name in self._modules and name not in self.__dict__:\n",
    ),
    Mutation("a loss is looked at once", "*", "if x is not self.seen.get(k) and", "if k not in self.seen and"),
    Mutation("evaluation explores", "*", "agent.act(obs, explore=False)", "agent.act(obs, explore=True)"),
    Mutation(
        "evaluation on the seed of the training",
        "*",
        "reset(envs, args.seed, 0, 1)",
        "reset(envs, args.seed, 0)",
    ),
    Mutation("evaluation takes random numbers of the training", "*", "    np.random.set_state(states[1])\n", ""),
    Mutation(
        "evaluation draws what the training left",
        "*",
        "reset(envs, args.seed, 0, 1)",
        "envs.reset(seed=int(np.random.SeedSequence((args.seed, 0, 1)).generate_state(1)[0]))[0]",
    ),
    Mutation("evaluation rewinds the generator of the GPU", "*", "fork_rng(gpu)", "fork_rng([])"),
    Mutation("the buffer is copied at the end", "*", 'else ["agent"] if finished', "else self.states if finished"),
    Mutation(
        "a batch is cut as if by death", "reinforce.py", "            done[unfinished] = True", "            pass"
    ),
    Mutation(
        "the buffer is as long as the training, not as its turns",
        REPLAY,
        'saved["step"] + iterations * args.num_envs',
        "args.total_timesteps",
    ),
    Mutation("evaluation without a seed", "*", "obs = reset(envs, args.seed, 0, 1)", "obs, _ = envs.reset()"),
    Mutation("evaluation counts later episodes", "*", "returns[alive] += reward[alive]", "returns += reward"),
    Mutation(
        "evaluation does not end at truncation", "*", "alive &= ~(terminated | truncated)", "alive &= ~terminated"
    ),
    Mutation(
        "evaluation loses the last reward",
        "*",
        "            returns[alive] += reward[alive]\n            alive &= ~(terminated | truncated)\n",
        "            alive &= ~(terminated | truncated)\n            returns[alive] += reward[alive]\n",
    ),
    Mutation(
        "evaluated twice at the end",
        "*",
        "if evaluation and not finished",
        "if evaluation",
    ),
    Mutation(
        "no evaluation at a signal",
        "*",
        "if evaluation and not finished",
        "if evaluation and not finished and not stopping",
    ),
    Mutation(
        "rows of the checkpoint's own step are dropped",
        "*",
        "if int(row[1]) <= self.step",
        "if int(row[1]) < self.step",
    ),
    Mutation("files written in their place", "*", 'path.with_name(path.name + ".part")', "path"),
    Mutation(
        "checkpoints may run code", "*", "weights_only=True)\n        if name", "weights_only=False)\n        if name"
    ),
    Mutation(
        "another seed may go on with a run",
        "*",
        "(args.env_id, args.seed) == (old.env_id, old.seed)",
        "args.env_id == old.env_id",
    ),
    Mutation(
        "optimizers are not restored",
        "*",
        "                states[name].load_state_dict(state)\n",
        '                if name in ("agent", "buffer"):\n                    states[name].load_state_dict(state)\n',
    ),
    Mutation("the flags of the checkpoint win", "*", 'if "param_groups" in state:  # an', "if False:  # an"),
    Mutation("rows after the checkpoint stay", "*", "self.metrics.truncate(kept)", "self.metrics.tell()"),
    Mutation(
        "a checkpoint without the optimizer",
        POLICY_GRADIENT,
        "Run(args, saved, agent=agent, optimizer=optimizer)",
        "Run(args, saved, agent=agent)",
    ),
    Mutation("a checkpoint without the buffer", REPLAY, ", buffer=buffer)", ")"),
    Mutation("a checkpoint without the actor's optimizer", CONTINUOUS, ", actor_optimizer=actor_optimizer,", ","),
    Mutation("a resumed run counts from 0", POLICY_GRADIENT, "step = run.step\n", "step = 0\n"),
    Mutation("a resumed run counts from 0 (replay)", REPLAY, "step, row = run.step, {}", "step, row = 0, {}"),
    Mutation(
        "no reset after a checkpoint",
        "a2c.py ppo.py",
        "                obs = reset(envs, args.seed, step, rank=rank)\n                if args",
        "                if args",
    ),
    Mutation("no reset after a checkpoint (replay)", REPLAY, "obs, row = reset(envs, args.seed, step), {}", "row = {}"),
    Mutation("a checkpoint without its row", "*", "        if log or checkpoint:\n", "        if log:\n"),
    Mutation(
        "the last checkpoint is not of the end", "*", " or (finished and (self.folder", " or (False and (self.folder"
    ),
    Mutation(
        "an agent alone is nothing to go on from",
        "*",
        'any(self.folder.glob("*.pt"))',
        '(self.folder / "checkpoint.pt").exists()',
    ),
    Mutation("no checkpoint at a signal", "*", "checkpoint |= stopping or (", "checkpoint |= ("),
    Mutation(
        "a stopped run ends with exit code 0",
        "*",
        "raise SystemExit(128 + (self.signal or signal.SIGTERM))",
        "raise SystemExit(0)",
    ),
    Mutation(
        "a second signal waits as well",
        "*",
        "            signal.signal(number, self.handlers[number])\n",
        "            pass\n",
    ),
    Mutation("rows at multiples of log_every only", "*", "step // every > self.step // every", "step % every == 0"),
    Mutation(
        "no last row", "*", "(finished or step // every > self.step // every)", "(step // every > self.step // every)"
    ),
    Mutation(
        "episodes counted again in each row",
        "*",
        "            self.log(row)\n            self.returns, self.lengths = [], []\n",
        "            self.log(row)\n",
    ),
    Mutation(
        "of episodes that end together one counts",
        "*",
        'self.returns.extend(episode["r"][ended].tolist())',
        'self.returns.append(episode["r"][ended][0].item())',
    ),
    Mutation(
        "steps since the start over the time since the last row", "*", "(step - self.row_step) / (time", "step / (time"
    ),
    Mutation("no search for NaN in the losses", "*", "if not math.isfinite(x)]", "if False]"),
    Mutation("infinite returns pass", "*", "        self.check_finite(row, states={})  # returns", "        # returns"),
    Mutation("infinite losses pass", "*", "if not math.isfinite(x)]", "if math.isnan(x)]"),
    Mutation("no search for NaN in what a checkpoint holds", "*", "else new, states)\n", "else new, {})\n"),
    Mutation("each step waits for the losses of the GPU", "*", "row if log or checkpoint else new", "row"),
    Mutation(
        "--compile compiles nothing", "*", "    if args.compile:\n", "    if args.compile and dist.is_initialized():\n"
    ),
    Mutation(
        "compiled code draws random numbers of its own",
        "*",
        'fallback_random = device.type == "cpu"',
        "fallback_random = False",
    ),
    Mutation("--compile keeps the first learning rate", "*", 'learning_rate.fill_(group["lr"])', "pass"),
    Mutation("--compile begins a new optimizer in each update", "*", "    @cache  # made in", "    # made in"),
    Mutation(
        "a fast form for optimizers that have none",
        "*",
        "if known and not rare else",
        "if known else",
    ),
    Mutation(
        "the results of a CUDA graph are not copied",
        "*",
        'if device.type == "cuda" else results',
        "if False else results",
    ),
    Mutation("--compile: Adam's squares are not corrected", "*", "root = (1 - decay2).sqrt()", "root = 1 + 0 * decay2"),
    Mutation("--compile: Adam's eps grows with the correction", "*", ", eps * root  #", ", eps / root  #"),
    Mutation(
        "--compile forgets a resumed optimizer", "*", " for name in names} | optimizer.state[p]", " for name in names}"
    ),
    Mutation(
        "--compile has a beta of its own", "*", 'options["beta2"] = group["betas"]', 'options["beta2"] = 0.9, 0.999'
    ),
    Mutation(
        "--compile knows no weight decay",
        "*",
        '("eps", "weight_decay", *own)}',
        '("eps", *own)} | {"weight_decay": 0}',
    ),
    Mutation(
        "--compile steps without gradients",
        "*",
        "if row[1] is not None]",
        "if True]",
    ),
    Mutation("oneDNN multiplies on Intel too", "*", '.startswith("AMD")', '.startswith("")'),
    Mutation("oneDNN multiplies where it rounds", "*", 'exact = not cpu.get("amx_bf16")', "exact = True"),
    Mutation(
        "a buffer may be half as large again as the memory",
        "dqn.py ddpg.py td3.py sac.py",
        "megabytes * 1e6 < free",
        "megabytes * 1e6 < 1.5 * free",
    ),
    Mutation(
        "no return in a row with a single episode",
        "*",
        "            if returns:\n",
        "            if len(returns) > 1:\n",
    ),
    # ----- what environments and evaluations may do
    Mutation(
        "a signal waits for the last evaluation", "*", "            raise SystemExit(128 + number)", "            pass"
    ),
    Mutation(
        "a broken evaluation costs the checkpoint",
        "*",
        "        finally:  # after",
        "        except ():\n            pass\n        else:  # after",
    ),
    Mutation("nobody hears of episodes that were cut off", "*", "    if alive.any():\n", "    if False:\n"),
    # ----- several processes
    Mutation(
        "gradients of the processes summed",
        POLICY_GRADIENT,
        "for x in own]).cpu() / dist.get_world_size()",
        "for x in own]).cpu()",
    ),
    Mutation("all processes have the same share", POLICY_GRADIENT, "x[rank::processes]", "x[::processes]"),
    Mutation("all processes draw the same noise", POLICY_GRADIENT, "processes)[rank]", "processes)[0]"),
    Mutation("all processes have the same environments", "*", "    seed += rank * envs.num_envs\n", ""),
    Mutation("gradients are not exchanged", POLICY_GRADIENT, "    dist.all_reduce(mean)\n", ""),
    Mutation("rollouts are not exchanged", POLICY_GRADIENT, "dist.all_gather(x, own.cpu())", "x[:] = [own] * len(x)"),
    Mutation("each process stops by itself", "*", "any(exchange(self.signal is not None))", "self.signal is not None"),
    Mutation("episodes of one process are counted", "*", "(sum(exchange(x), [])", "(x"),
]


# ----- applying them --------------------------------------------------------------------------------------------------


def scripts_of(mutation: Mutation, root: Path) -> list[str]:
    """The names of the scripts that it changes."""
    if mutation.scripts != "*":
        return mutation.scripts.split()
    return sorted(path.name for path in root.glob("*.py") if mutation.old in path.read_text())


def mutated(mutation: Mutation, root: Path) -> dict[str, str]:
    """{script: its text with the mistake}; raises ValueError where the mutation does not apply."""
    texts = {}
    for name in scripts_of(mutation, root):
        text = (root / name).read_text() if (root / name).exists() else ""
        if text.count(mutation.old) != 1:
            raise ValueError(f"its text occurs {text.count(mutation.old)} times in {name}")
        texts[name] = text.replace(mutation.old, mutation.new)
        compile(texts[name], name, "exec")
    if not texts:
        raise ValueError("its text occurs in no script")
    return texts


def check(root: Path) -> None:
    """Exits with a list of the mutations that do not apply to the scripts, or not clearly."""
    names = [mutation.name for mutation in MUTATIONS]
    bad = [f"{name}: there are two of this name" for name in sorted({n for n in names if names.count(n) > 1})]
    for mutation in MUTATIONS:
        try:
            mutated(mutation, root)
        except (ValueError, SyntaxError) as error:
            bad.append(f"{mutation.name}: {error}")
    if bad:
        sys.exit("\n".join(["These mutations do not apply:", *bad]))


# ----- running the tests ----------------------------------------------------------------------------------------------


def copy_repository(root: Path, target: Path) -> None:
    """What the tests need."""
    shutil.copytree(root / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*root.glob("*.py"), root / "pyproject.toml", root / "README.md"]:
        shutil.copy(path, target)


def stages(root: Path) -> list[list[str]]:
    """The test files in the order in which they are asked."""
    there = [f"tests/{path.name}" for path in sorted((root / "tests").glob("test_*.py")) if path.name not in NEVER]
    groups = [[path for path in there if Path(path).name in names] for names in (FIRST, SECOND, LAST)]
    groups.insert(2, [path for path in there if path not in sum(groups, [])])
    return [stage for stage in groups if stage]


class Outcome(NamedTuple):
    failed: list[str]  # the names of the failed tests
    stage: int  # the last one that was run, from 1
    seconds: float


def pytest(folder: Path, files: list[str], *options: str, limit: float = math.inf) -> tuple[list[str], str]:
    """Runs these test files in the folder; returns what failed, and the output."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *options, *files]
    clean = {name: x for name, x in os.environ.items() if name not in ("PYTHONPATH", "PYTEST_ADDOPTS")}
    job = subprocess.Popen(
        command,
        cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what the tests started can be ended with them
    )
    output, waited = None, 0
    while output is None:
        try:
            output, _ = job.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            waited += 1  # and not by the clock: it may be that all of this was stopped for a while, and goes on
        if waited > limit:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
            return [f"timeout after {limit:.0f} s"], ""
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", output, re.MULTILINE)
    if job.returncode != 0 and not failed:
        failed = [f"pytest ended with {job.returncode}"]
    return failed, output


class Tests:
    """The stages over the scripts as they are: each must pass there, or what it says of a mutation means nothing."""

    def __init__(self, root: Path):
        self.root, self.stages = root, stages(root)
        self.locks = [threading.Lock() for _ in self.stages]

    @cache
    def unmutated(self, stage: int) -> float:
        """Runs a stage without a mutation; returns how long it may take with one."""
        start = time.monotonic()
        failed, output = pytest(self.root, self.stages[stage])
        if failed:
            raise SystemExit(f"{output}\nThese tests fail without any mutation.")
        return 5 * (time.monotonic() - start) + 60

    @cache
    def of_others(self, stage: int, scripts: frozenset[str]) -> list[str]:
        """Options that leave out the tests of other scripts: those with a script, but none of these, as a parameter."""
        _, output = pytest(self.root, self.stages[stage], "--collect-only")
        every = {path.stem for path in self.root.glob("*.py")}
        options = []
        for line in output.splitlines():
            if match := re.fullmatch(r"(tests/\S+?)\[(.*)\]", line):
                named = every.intersection(match[2].split("-"))
                if named and not named & scripts:
                    options.append(f"--deselect={line}")
        return options

    def run(self, mutation: Mutation) -> Outcome:
        """The tests that see it, of the first stage in which one does."""
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
            copy_repository(self.root, Path(folder))
            texts = mutated(mutation, self.root)
            for name, text in texts.items():
                (Path(folder) / name).write_text(text)
            for stage, files in enumerate(self.stages):
                with self.locks[stage]:
                    limit = self.unmutated(stage)
                    scripts = frozenset(name.removesuffix(".py") for name in texts)
                    others = self.of_others(stage, scripts)
                failed, _ = pytest(Path(folder), files, f"--maxfail={ENOUGH}", *others, limit=limit)
                if failed:
                    break
        return Outcome(failed, stage + 1, time.monotonic() - start)


# ----- the report -----------------------------------------------------------------------------------------------------


def caught_by(outcome: Outcome) -> str:
    """The number of tests that failed and the names of three."""
    if not outcome.failed:
        return "**nothing**"
    count = f"{len(outcome.failed)}{' or more' if len(outcome.failed) >= ENOUGH else ''}"
    return "<br>".join([f"{count}:", *(f"`{name}`" for name in outcome.failed[:3])]).replace("|", "\\|")


def table(outcomes: dict[Mutation, Outcome], root: Path) -> str:
    """The report in Markdown."""
    caught = sum(bool(outcome.failed) for outcome in outcomes.values())
    lines = [
        "# Planted mistakes, and the tests that see them",
        "",
        f"Written by `python tests/mutations.py`: {len(outcomes)} mistakes, planted one at a time, in all the scripts",
        f"of their row at once. The fast tests, without `{NEVER[0]}` and `{NEVER[1]}`, catch {caught}.",
        f"A stage of the tests ends with its {ENOUGH}th failure; the later stages, which take longer, are asked only",
        "about what the earlier ones let pass. Three of the tests that failed are named.",
        "",
        "| mistake | scripts | stage | caught by |",
        "| --- | --- | --- | --- |",
    ]
    for mutation, outcome in outcomes.items():
        scripts = ", ".join(name.removesuffix(".py") for name in scripts_of(mutation, root))
        lines.append(f"| {mutation.name} | {scripts} | {outcome.stage} | {caught_by(outcome)} |")
    return "\n".join(lines) + "\n"


def recorded(path: Path | None, chosen: list[Mutation]) -> dict[Mutation, Outcome]:
    """The outcomes that an earlier run kept in the file, of those mutations that are as they were."""
    lines = path.read_text().splitlines() if path and path.exists() else []
    outcomes = {Mutation(*mutation): Outcome(*outcome) for mutation, outcome in map(json.loads, lines)}
    return {mutation: outcome for mutation, outcome in outcomes.items() if mutation in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only the mutations with this text in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations tested at once")
    parser.add_argument("--table", type=Path, help="where the table goes; without --only to tests/mutations.md")
    parser.add_argument("--record", type=Path, help="a file to keep what was caught in; a later run leaves that out")
    parser.add_argument("--check", action="store_true", help="only check that each mutation applies")
    args = parser.parse_args()
    check(ROOT)
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation.name]
    print(f"{len(chosen)} mutations", flush=True)
    if args.check or not chosen:
        return
    outcomes = recorded(args.record, chosen)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        copy_repository(ROOT, Path(folder))  # once: the repository may change while this goes on
        tests = Tests(Path(folder))
        jobs = {pool.submit(tests.run, mutation): mutation for mutation in chosen if mutation not in outcomes}
        try:
            for job in as_completed(jobs):
                mutation, outcome = jobs[job], job.result()
                outcomes[mutation] = outcome
                verdict = f"caught in stage {outcome.stage} by {len(outcome.failed)}" if outcome.failed else "SURVIVED"
                count = f"[{len(outcomes):3}/{len(chosen)}]"
                print(f"{count} {outcome.seconds:5.0f} s  {verdict}: {mutation.name}", flush=True)
                if args.record and outcome.failed:
                    with args.record.open("a") as file:
                        file.write(json.dumps([mutation, outcome]) + "\n")
        finally:
            pool.shutdown(cancel_futures=True)
        outcomes = {mutation: outcomes[mutation] for mutation in chosen}
        path = args.table or (None if args.only else ROOT / "tests" / "mutations.md")
        if path:
            path.write_text(table(outcomes, Path(folder)))
    survivors = [mutation.name for mutation, outcome in outcomes.items() if not outcome.failed]
    if survivors:
        sys.exit("\n".join(["These mutations survive:", *survivors]))
    print("All are caught.")


if __name__ == "__main__":
    main()
