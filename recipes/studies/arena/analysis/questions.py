"""The questions of `recipes/studies/arena/PLAN.md`, and what the rows of `planned.csv` say to them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from recipes.studies.arena.analysis.comparisons import ALPHA, Comparison, compare
from recipes.studies.arena.analysis.runs import Group, Run, paired_differences
from recipes.studies.shared.paired_statistics import bootstrap_interval, holm

MATTERS = ("running_sum", "slippery_chain")
IDLE = ("idle_filler", "knights_and_knaves", "checked_sum")
MARGIN = 0.01  # of "not lower than", in parts of 1
WINDOW = 5  # generation batches, of the curve that has to reach a level
RESAMPLES = 2000
Groups = dict[tuple[str, str], Group]


@dataclass(frozen=True)
class Claim:
    """
    One comparison of the plan.

    Args:
        question (`str`): as the plan names it.
        study, task, arm, baseline, metric (`str`): what is compared.
        not_lower (`bool`): it is "not lower by the margin", else "higher".
        in_family (`bool`): it is part of the question's Holm correction.
    """

    question: str
    study: str
    task: str
    arm: str
    baseline: str
    metric: str = "auc"
    not_lower: bool = False
    in_family: bool = True


@dataclass(frozen=True)
class Answer:
    """A claim, its comparison, and the ends of the two-sided 90 % interval; empty without two common seeds."""

    claim: Claim
    comparison: Comparison | None = None
    low90: float | None = None
    high90: float | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the claim holds as the plan says; None while there are not two pairs."""
        found = self.comparison
        if found is None or self.low90 is None:
            return None
        if self.claim.not_lower:
            return self.low90 > -MARGIN
        if not self.claim.in_family:  # one-sided 5 %
            return self.low90 > 0
        return found.p_holm is not None and found.p_holm < ALPHA and found.difference > 0


def _claims() -> list[Claim]:
    each = {"study": "planned"}
    claims = [Claim("H1a", **each, task=t, arm="positive3", baseline="dapo") for t in MATTERS]
    claims += [Claim("H1b", **each, task=t, arm="positive3", baseline="positive_weight_3") for t in MATTERS]
    others = ("positive3_x3", "positive3_held", "positive_weight_1.8", "positive")
    others += ("grpo", "softmax", "balanced")
    claims += [Claim("beside H1", **each, task=t, arm=arm, baseline="dapo") for arm in others for t in MATTERS]
    claims += [Claim("beside H1", **each, task=t, arm="positive3_x3", baseline="positive_weight_3") for t in MATTERS]
    claims += _no_harm_and_lasting("positive3", "H2", "H3")
    for arm in ("positive", "positive3"):
        for baseline in ("dapo", "positive_weight_3"):
            claims += [Claim("H3b", "planned_one_step", t, arm, baseline) for t in MATTERS]
    for arm, alone in (("positive3_tr", "tr"), ("positive3_ar", "ar_0.6")):
        for baseline in ("positive3", alone):
            claims += [Claim("H4", **each, task=t, arm=arm, baseline=baseline) for t in MATTERS]
    return claims + _no_harm_and_lasting("positive3_x3", "H2 again", "H3 again")


def _no_harm_and_lasting(arm: str, no_harm: str, lasting: str) -> list[Claim]:
    """What H2 and H3 ask, of an arm; the latter's accuracies first."""
    claims = [Claim(no_harm, "planned", task, arm, "dapo", not_lower=True, in_family=False) for task in IDLE]
    for metric in ("accuracy_sampled", "accuracy_greedy"):
        claims += [
            Claim(lasting, "planned_long", t, arm, "dapo", metric, not_lower=True, in_family=False) for t in MATTERS
        ]
    return claims + [Claim(lasting, "planned_long", t, arm, "dapo", in_family=False) for t in MATTERS]


CLAIMS = _claims()
# Claims that share one Holm correction.
FAMILY = {"H1a": "H1", "H1b": "H1", "beside H1": "beside H1", "H3b": "H3b", "H4": "H4"}


def answer(groups: Groups, claims: Iterable[Claim] = CLAIMS) -> list[Answer]:
    """
    Answer every claim from the rows that are there.

    Args:
        groups (`dict`): from `read_runs`.
        claims (`Iterable[Claim]`): the plan's.

    Returns:
        `list[Answer]`: in the same order, with Holm's correction within each family.
    """
    answers = []
    for claim in claims:
        group = groups.get((claim.study, claim.task), {})
        values = paired_differences(group.get(claim.arm, {}), group.get(claim.baseline, {}), claim.metric)
        if len(values) < 2:
            answers.append(Answer(claim))
            continue
        low, high = bootstrap_interval(values, confidence=0.9)
        answers.append(Answer(claim, compare(claim.arm, claim.baseline, values), low, high))
    for family in dict.fromkeys(FAMILY.values()):
        places = [
            i for i, a in enumerate(answers)
            if a.claim.in_family and FAMILY.get(a.claim.question) == family and a.comparison is not None
        ]  # fmt: skip
        p_values = [c.p for i in places if (c := answers[i].comparison) is not None and c.p is not None]
        for i, adjusted in zip(places, holm(p_values), strict=True) if places else ():
            found = answers[i].comparison
            assert found is not None
            answers[i] = replace(answers[i], comparison=replace(found, p_holm=adjusted))
    return answers


def verdict(answers: Sequence[Answer], question: str) -> bool | None:
    """Whether all claims of a question hold; None while one of them has no answer."""
    own = [a.holds for a in answers if a.claim.question == question]
    return None if None in own or not own else all(own)


@dataclass(frozen=True)
class Budget:
    """
    What an arm needs to reach the level at which `dapo` ends, over what `dapo` needs.

    Args:
        steps, tokens (`tuple[float, float, float]`): ratio of optimizer steps, of generated tokens; with the ends of
            its 95 % interval.
        reached (`bool`): the mean curve reaches the level within the run.
        seeds (`int`): pairs.
    """

    steps: tuple[float, float, float]
    tokens: tuple[float, float, float]
    reached: bool
    seeds: int


@dataclass
class _Curves:
    rewards: np.ndarray  # (seeds, batches)
    lengths: np.ndarray  # (seeds, batches), tokens
    smoothed: np.ndarray = field(init=False)  # trailing mean over WINDOW batches, (seeds, batches - WINDOW + 1)

    def __post_init__(self) -> None:
        windows = np.lib.stride_tricks.sliding_window_view(self.rewards, WINDOW, axis=1)
        self.smoothed = windows.mean(axis=-1)

    def until(self, level: float, seeds: np.ndarray) -> tuple[float, float, bool]:
        """Generation batches and tokens per completion until the mean curve reaches `level`, or all; if it does."""
        curve = self.smoothed[seeds].mean(axis=0)
        cumulative = np.concatenate([[0.0], self.lengths[seeds].mean(axis=0).cumsum()])
        reached = np.flatnonzero(curve >= level)
        if not len(reached):
            return float(self.rewards.shape[1]), float(cumulative[-1]), False
        at = int(reached[0])
        part = 1.0 if at == 0 else (level - curve[at - 1]) / (curve[at] - curve[at - 1])
        batches = WINDOW + at - 1 + part if at else float(WINDOW)
        return batches, float(np.interp(batches, np.arange(len(cumulative)), cumulative)), True


def budget(arm: dict[int, Run], baseline: dict[int, Run], *, seed: int = 0) -> Budget | None:
    """
    Compare what two arms need to reach the level at which the mean curve of `baseline` ends.

    Args:
        arm, baseline (`dict`): runs by seed; those that both have are used.
        seed (`int`): of the bootstrap over seeds, in which the level is recomputed.

    Returns:
        [`Budget`], *optional*: None without two common seeds.
    """
    common = [s for s in sorted(arm) if s in baseline]
    if len(common) < 2:
        return None
    own, other = (
        _Curves(*(np.stack([runs[s].curves[name] for s in common]) for name in ("reward_curve", "length_curve")))
        for runs in (arm, baseline)
    )

    def ratios(seeds: np.ndarray) -> tuple[float, float, bool]:
        level = float(other.smoothed[seeds].mean(axis=0)[-1])
        batches, tokens, reached = own.until(level, seeds)
        batches_of_baseline, tokens_of_baseline, _ = other.until(level, seeds)
        return batches / batches_of_baseline, tokens / tokens_of_baseline, reached

    everyone = np.arange(len(common))
    generator = np.random.default_rng(seed)
    drawn = np.array([ratios(generator.choice(everyone, len(everyone)))[:2] for _ in range(RESAMPLES)])
    (steps_low, tokens_low), (steps_high, tokens_high) = np.percentile(drawn, [2.5, 97.5], axis=0)
    steps, tokens, reached = ratios(everyone)
    return Budget(
        (steps, float(steps_low), float(steps_high)),
        (tokens, float(tokens_low), float(tokens_high)),
        reached,
        len(common),
    )
