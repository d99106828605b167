"""The checks of lesson.ipynb's exercises: is a solution right, and if not, what is wrong with it?

Each calls the student's function on a few cases, compares with the package's own functions and
prints one line. Whatever the function does, nothing is raised: the class goes on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from deepresearcher_min.grpo import group_advantages, token_losses
from deepresearcher_min.trajectory import Trajectory

CLOSE = 1e-4
GROUPS = ([1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, -1.0])
# Log-probabilities of one token, (new, old), whose ratio is a little above 1 and below, far above
# and below, and 1. (Not first: there, new - old is 0, and half of all mistakes look alike.)
MOVES = ((-0.9, -1.0), (-1.1, -1.0), (-0.5, -1.0), (-2.0, -1.0), (-1.0, -1.0))
EPSILON = 0.2


def check_advantages(solution: Callable) -> None:
    """Exercise 1: solution(rewards) -> the advantages of a group."""
    say("Exercise 1", advantage_mistakes(solution))


def check_mask(solution: Callable, trajectories: Sequence[Trajectory]) -> None:
    """Exercise 2: solution(trajectory) -> 1 for each token that the model chose, else 0."""
    say("Exercise 2", mask_mistakes(solution, trajectories))


def check_loss(solution: Callable) -> None:
    """Exercise 3: solution(new, old, advantage, epsilon) -> the loss of one token, without KL."""
    say("Exercise 3", loss_mistakes(solution))


class NothingReturned(Exception):
    """The function has no return statement yet, or forgets it in some cases."""


def say(name: str, mistakes: Iterator[str]) -> None:
    """Print the first mistake, or that there is none."""
    try:
        mistake = next(mistakes, "")
    except NothingReturned:
        print(f"{name}: not yet (the function returns nothing).")
    except Exception as error:
        print(f"{name}: wrong. The function raised {type(error).__name__}: {error}")
    else:
        print(f"{name}: wrong. {mistake}" if mistake else f"{name}: right!")


def numbers(value: Any) -> np.ndarray:
    """What a solution returned (number, list, array or tensor) as an array."""
    if value is None or value is ...:
        raise NothingReturned
    return np.array(value, dtype=float)


def same(found: np.ndarray, expected: Any) -> bool:
    return found.shape == np.shape(expected) and np.allclose(found, expected, atol=CLOSE)


def advantage_mistakes(solution: Callable) -> Iterator[str]:
    for rewards in GROUPS:
        found = numbers(solution(list(rewards)))
        expected = group_advantages(rewards).numpy()
        if same(found, expected):
            continue
        case = f"For the rewards {rewards}"
        if found.shape != expected.shape:
            yield f"{case} there must be {len(rewards)} advantages, not an array of {found.shape}."
        if not expected.any():
            yield (
                f"{case} all advantages must be 0, not {shown(found)}: where all trajectories did "
                f"equally well, there is nothing to prefer (and the deviation is 0: do not divide)."
            )
        centred = np.array(rewards) - np.mean(rewards)
        if same(found, centred / np.std(rewards)):
            yield (
                f"{case} you divide by {np.std(rewards):.4f}, the deviation with G under the root; "
                f"the package divides by {np.std(rewards, ddof=1):.4f}, with G - 1."
            )
        if same(found, centred):
            yield f"{case} the mean is taken off, but the result is not divided by the deviation."
        if same(found, rewards):
            yield f"{case} you return the rewards themselves."
        yield f"{case} the advantages are {shown(expected)}, not {shown(found)}."


def mask_mistakes(solution: Callable, trajectories: Sequence[Trajectory]) -> Iterator[str]:
    for number, trajectory in enumerate(trajectories):
        found = numbers(solution(trajectory))
        expected = trajectory.sampled_mask
        case = f"In trajectory {number}"
        if found.shape != expected.shape:
            yield f"{case} there are {len(expected)} tokens; your mask has the shape {found.shape}."
        if not np.isin(found, (0, 1)).all():
            yield f"{case} your mask holds other values than 0 and 1."
        different = np.flatnonzero(found != expected)
        if len(different):
            yield f"{case} token {different[0]} {why(trajectory, different[0])}."


def why(trajectory: Trajectory, token: int) -> str:
    """What stands at a token that a mask has wrong, in words."""
    first = trajectory.turns[0].sampled[0]
    if token < first:
        return "is part of the prompt: the model did not choose it, so its mask is 0"
    if not trajectory.sampled_mask[token]:
        return "was observed (a tool or the template wrote it), so its mask is 0"
    ends = [turn.sampled[1] - 1 for turn in trajectory.turns]
    if token in ends:
        return "ends a turn (<|end|>), which the model chose, too, so its mask is 1"
    return "was chosen by the model, so its mask is 1"


def loss_mistakes(solution: Callable) -> Iterator[str]:
    for advantage in (1.5, -1.5):
        for new, old in MOVES:
            given = (torch.tensor(number).double() for number in (new, old, advantage))
            found = numbers(solution(*given, EPSILON))
            expected = package_loss(new, old, advantage)
            if same(found, expected):
                continue
            ratio = np.exp(new - old)
            clipped = np.clip(ratio, 1 - EPSILON, 1 + EPSILON)
            case = f"For new = {new}, old = {old} (ratio {ratio:.4f}), A = {advantage}"
            if found.shape != ():
                yield f"{case} the loss must be one number, not an array of {found.shape}."
            if same(found, -expected):
                yield f"{case} the sign is wrong: the objective is maximised, the loss minimised."
            if same(found, -(new - old) * advantage):
                yield f"{case} the ratio of probabilities is exp(new - old), not new - old."
            if same(found, -ratio * advantage):
                yield f"{case} the ratio must be clipped: {clipped:.4f} is all that counts."
            if same(found, -clipped * advantage):
                yield (
                    f"{case} you always clip. Take the smaller one of ratio * A and clipped * A: "
                    f"a move that made things worse keeps its gradient."
                )
            yield f"{case} the loss is {expected:.4f}, not {found:.4f}."


def package_loss(new: float, old: float, advantage: float) -> float:
    new_S, old_S, advantages_S = (torch.tensor([x]).double() for x in (new, old, advantage))
    nothing_S = torch.zeros_like(new_S)
    tensors = (new_S, old_S, old_S, None, advantages_S, nothing_S)
    losses_S, _ = token_losses(*tensors, clip_low=EPSILON, clip_high=EPSILON)
    return losses_S.item()


def shown(values: np.ndarray) -> str:
    return str([round(float(value), 4) for value in np.ravel(values)])
