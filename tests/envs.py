"""Tiny environments for the tests, registered on import: `--env-id tests.envs:BoxTiny-v0`.

Where the kind of action does not matter there are two, NAME-v0 with Discrete and NAMEBox-v0 with Box actions.
"""

import os
import random
import signal

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv, PendulumEnv
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete


class Tiny(gym.Env):
    """Random observations, a reward of 1 a step, episodes of 5 steps that are truncated."""

    observation_space = Box(-1, 1, (2, 3))
    length = 5

    def __init__(self, action_space=Discrete(2)):
        self.action_space = action_space
        self.steps, self.all_steps = 0, 0  # in this episode, in all episodes

    def observe(self):
        return self.np_random.uniform(-1, 1, (2, 3)).astype(np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.steps += 1
        self.all_steps += 1
        return self.observe(), 1.0, False, self.steps >= self.length, {}


class Raises(Tiny):
    """Each one breaks after 300 steps in total."""

    def step(self, action):
        if self.all_steps == 300:
            raise RuntimeError("the environment broke")
        return super().step(action)


class NaN(Tiny):
    """Observations turn NaN after 300 steps in total."""

    def observe(self):
        return super().observe() if self.all_steps < 300 else np.full((2, 3), np.nan, np.float32)


class Ledger(Tiny):
    """Episodes of random lengths and rewards with both kinds of end; each one's return goes into the file $LEDGER."""

    def reset(self, seed=None, options=None):
        self.total = 0.0
        return super().reset(seed=seed, options=options)

    def step(self, action):
        obs, _, _, _, infos = super().step(action)
        reward = float(self.np_random.normal())
        self.total += reward
        end = int(self.np_random.integers(20))
        if end < 3 and "LEDGER" in os.environ:
            with open(os.environ["LEDGER"], "a") as file:
                file.write(f"{self.total} {self.steps}\n")
        return obs, reward, end in (0, 1), end in (1, 2), infos


class Forever(Tiny):
    """Never ends."""

    length = np.inf


class OneNumber(Tiny):
    """The observation is a single number."""

    observation_space = Box(-1, 1, (1,))

    def observe(self):
        return self.observation_space.sample()


class Large(OneNumber):
    """Thousands of numbers."""

    observation_space = Box(-1, 1, (3, 40, 50))


class Doubles(OneNumber):
    """Observations and rewards are float64, and beyond the numbers that float32 tells apart."""

    observation_space = Box(-1e9, 1e9, (3,), np.float64)

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, np.float64(2**24 + 1), *rest


class Halves(Tiny):
    """Rewards are float16, in which five of them are another sum."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, np.float16(0.1), *rest


class AllIntegers(OneNumber):
    """Observations and rewards are integers."""

    observation_space = Box(-5, 5, (4,), np.int64)

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 2, *rest


class OneStep(Tiny):
    """Episodes are over after one step."""

    length = 1


class BothEnds(Tiny):
    """Episodes end by termination and truncation in the same step."""

    def step(self, action):
        obs, reward, _, truncated, infos = super().step(action)
        return obs, reward, truncated, truncated, infos


class Millions(Tiny):
    """Rewards of a million, and of minus a million."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1e6 * (-1) ** self.steps, *rest


class Infos(Tiny):
    """Infos whose shapes and kinds change, by a name that Gymnasium gives to its statistics; one dict for all steps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.info = {}

    def change_info(self):
        number = int(self.np_random.integers(4))
        self.info |= {"path": np.zeros(number), "goal": ("left", 1, None, [2])[number], "episode": {"won": True}}

    def reset(self, seed=None, options=None):
        obs, _ = super().reset(seed=seed, options=options)
        self.change_info()
        return obs, self.info

    def step(self, action):
        *step, _ = super().step(action)
        self.change_info()
        return *step, self.info


class OneArray(Tiny):
    """Observes the number of the step, in the same array every time."""

    observation_space = Box(-10, 10, (6,))

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.array = np.zeros(6, np.float32)

    def observe(self):
        self.array[:] = self.steps
        return self.array


class Limited(Tiny):
    """There can be $LIMIT of them."""

    made = 0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        if Limited.made == int(os.environ["LIMIT"]):
            raise RuntimeError("no license for another one")
        Limited.made += 1


class DictObs(Tiny):
    observation_space = Dict({"position": Box(-1, 1, (2,)), "velocity": Box(-1, 1, (2,))})

    def observe(self):
        return self.observation_space.sample()


class Signals:
    """Sends the signal $SIGNAL to this process before step $SIGNAL_AT, counted over all environments.

    With $SIGNAL_RANK only in that process of torchrun.

    The rewards have a noise from the global generators, which a resumed run must find as they were.
    """

    all_steps = 0

    def step(self, action):
        here = os.environ.get("SIGNAL_RANK") in (None, os.environ.get("RANK"))
        if here and str(Signals.all_steps) == os.environ.get("SIGNAL_AT"):
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        Signals.all_steps += 1
        obs, reward, terminated, truncated, infos = super().step(action)
        return obs, float(reward) + random.random() + np.random.random(), terminated, truncated, infos


class SignalsCartPole(Signals, CartPoleEnv):
    pass


class SignalsPendulum(Signals, PendulumEnv):
    pass


# Unequal, asymmetric bounds, and a shape that must be flattened for the networks and given back to the environment.
UNEVEN = Box(np.array([[-1], [0]], np.float32), np.array([[3], [0.5]], np.float32))

AWKWARD = (OneNumber, Large, Doubles, Halves, AllIntegers, OneStep, BothEnds, Millions, Infos, OneArray)
for kind in (Raises, NaN, Ledger, Forever, Limited, DictObs, *AWKWARD):
    gym.register(f"{kind.__name__}-v0", kind)
    gym.register(f"{kind.__name__}Box-v0", kind, kwargs={"action_space": UNEVEN})
gym.register("OneAction-v0", Tiny, kwargs={"action_space": Discrete(1)})
gym.register("OneActionBox-v0", Tiny, kwargs={"action_space": Box(0, 1e-3, (1,))})
gym.register("BoxTiny-v0", Tiny, kwargs={"action_space": UNEVEN})
gym.register("Unbounded-v0", Tiny, kwargs={"action_space": Box(np.float32([-1, -np.inf]), np.float32([1, 1]))})
gym.register("MultiDiscrete-v0", Tiny, kwargs={"action_space": MultiDiscrete([2, 3])})
gym.register("DiscreteFrom3-v0", Tiny, kwargs={"action_space": Discrete(2, start=3)})
gym.register("SignalsCartPole-v0", SignalsCartPole, max_episode_steps=500)
gym.register("SignalsPendulum-v0", SignalsPendulum, max_episode_steps=200)
