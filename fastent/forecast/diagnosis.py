"""The paper's diagnostic guide (Appendix D.2, Table 5) as a function of a run's history.

The table reads five signals off the normalised entropy H, its threshold H*, the parameter norm and the test
accuracy. The numbers in its signals were lost from the paper's text, all but "1,000 steps": the others here
are ours, each an argument of `diagnose` with its reason. Levels of H are medians of three usable evaluations, so
that a single wild one decides nothing; with fewer than three among the last five there is no diagnosis.

A collapse is a fall by at least `fall` from the highest level. A run that starts below H* has not collapsed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypedDict

import numpy as np

from fastent.display import Shown, Table, digits
from fastent.forecast.history import History, recent_change
from fastent.records import MEDIAN, PATIENCE, WINDOW, Course


class Phase(StrEnum):
    """Where a run stands: the rows of Table 5 in their order, and two that the table lacks."""

    NORM_EXPANSION = "norm_expansion"
    COLLAPSE_ONSET = "collapse_onset"
    NEAR_THRESHOLD = "near_threshold"
    COLLAPSED_WITHOUT_GENERALISING = "collapsed_without_generalising"
    NO_COLLAPSE = "no_collapse"
    GENERALISED = "generalised"
    NOT_ENOUGH_HISTORY = "not_enough_history"


class Evidence(TypedDict):
    """The numbers that a diagnosis rests on; None where one is not known.

    `entropy` is the level now, `peak` the highest so far, `drop` the fall from the highest of the last `patience`
    steps, `gap` the level less the threshold, `steps_below` the time since the level last went below the
    threshold (0 above it), `steps_observed` the length of the history. `entropy_change` and the relative
    `norm_change` are over the last 5 evaluations, of which `unusable` are so.
    """

    entropy: float | None
    peak: float | None
    drop: float | None
    gap: float | None
    steps_below: float | None
    steps_observed: float
    entropy_change: float | None
    norm_change: float | None
    test_accuracy: float | None
    unusable: int


@dataclass(frozen=True)
class Diagnosis(Shown):
    """A phase, what it means, what to do (Table 5's, in a sentence each), and the numbers behind it."""

    phase: Phase
    meaning: str
    action: str
    evidence: Evidence

    def __repr__(self) -> str:
        return f"Diagnosis(phase={self.phase.value!r}, entropy={digits(self.evidence['entropy'])}: {self.meaning})"

    def _table(self) -> Table:
        known = {name: value for name, value in self.evidence.items() if value is not None}
        rows = [(name.replace("_", " "), digits(value)) for name, value in known.items()]
        return Table(self.phase.value.replace("_", " "), rows, remark=f"{self.meaning} {self.action}")


class Tolerances(NamedTuple):
    """What counts as what; `diagnose` says what each means and where its value is from."""

    fall: float = 0.05
    near: float = 0.02
    imminent: float = 1_000
    low_accuracy: float = 0.5
    criterion: float = 0.99


_DEFAULT = Tolerances()


def diagnose(
    history: History,
    *,
    threshold: float | None = None,
    test_accuracy: float | None = None,
    patience: float = PATIENCE,
    fall: float = _DEFAULT.fall,
    near: float = _DEFAULT.near,
    imminent: float = _DEFAULT.imminent,
    low_accuracy: float = _DEFAULT.low_accuracy,
    criterion: float = _DEFAULT.criterion,
) -> Diagnosis:
    """Find a run's row in Table 5.

    Parameters
    ----------
    history : History
        The run so far; with its `norm`, Phase I is told from a plateau. Nothing is said of one that nobody measured.
    threshold : float, optional
        H*, as `calibrate_threshold` or a law gives it. Without it no run is near or below it.
    test_accuracy : float, optional
        The latest, in [0, 1]. Without it a collapse cannot be told from grokking.
    patience : float
        Steps without a fall after which none is expected. Ours: the paper's slowest task waits 21,560 - 1,020
        steps on average for its collapse. Scale it with the task.
    fall : float
        Least fall of H that counts, the tau of the collapse criterion. Ours.
    near : float
        Gap to H* that counts as near. Ours: the width of the spread between the paper's tasks, 0.016, rounded.
    imminent : float
        Steps below H* within which grokking is still expected. The paper's: "within 1,000 steps".
    low_accuracy : float
        Test accuracy that counts as low. Ours: in the middle of the jump it is neither low nor high.
    criterion : float
        Test accuracy that counts as grokking. Ours: 0.99.

    Returns
    -------
    Diagnosis

    Raises
    ------
    ValueError
        If a threshold or an accuracy lies outside [0, 1], or one of the tolerances is not positive.

    References
    ----------
    arXiv 2604.13123, Appendix D, Table 5.

    Examples
    --------
    >>> run = History(range(0, 2000, 200), [0.9, 0.9, 0.9, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6])
    >>> diagnose(run).phase
    <Phase.COLLAPSE_ONSET: 'collapse_onset'>
    >>> diagnose(run, threshold=0.64).phase
    <Phase.NEAR_THRESHOLD: 'near_threshold'>
    """
    for name, share in (
        ("threshold", threshold),
        ("low_accuracy", low_accuracy),
        ("criterion", criterion),
    ):
        if share is not None:
            _check_share(name, share)
    for name, value in (("patience", patience), ("fall", fall), ("near", near), ("imminent", imminent)):
        if not value > 0:
            raise ValueError(f"{name} must be positive; got {value}")
    course = Course(threshold, patience)
    for step, entropy in zip(history.step.tolist(), history.entropy.tolist(), strict=True):
        course.add(step, entropy)
    tolerances = Tolerances(fall, near, imminent, low_accuracy, criterion)
    return diagnosis_of(course, test_accuracy, _norm_change(history), tolerances)


def diagnosis_of(
    course: Course,
    test_accuracy: float | None,
    norm_change: float | None = None,
    tolerances: Tolerances = _DEFAULT,
) -> Diagnosis:
    """Diagnosis of a run that was followed evaluation by evaluation; the rest as `diagnose` has it."""
    if test_accuracy is not None:
        _check_share("test_accuracy", test_accuracy)
    evidence = _evidence(course, test_accuracy, norm_change)
    now, peak, drop = evidence["entropy"], evidence["peak"], evidence["drop"]
    gap, waited = evidence["gap"], evidence["steps_below"]
    fall, near, imminent, low_accuracy, criterion = tolerances
    if test_accuracy is not None and test_accuracy >= criterion:
        phase = Phase.GENERALISED
    elif now is None or peak is None or drop is None:
        phase = Phase.NOT_ENOUGH_HISTORY
    elif gap is not None and gap < 0 and peak - now >= fall:
        low = test_accuracy is not None and test_accuracy < low_accuracy
        late = waited is not None and waited >= imminent
        phase = Phase.COLLAPSED_WITHOUT_GENERALISING if low and late else Phase.NEAR_THRESHOLD
    elif drop >= fall:
        phase = Phase.NEAR_THRESHOLD if gap is not None and gap <= near else Phase.COLLAPSE_ONSET
    elif evidence["steps_observed"] >= course.patience:
        phase = Phase.NO_COLLAPSE
    else:
        phase = Phase.NORM_EXPANSION
    meaning, action = _TABLE[phase]
    if phase is Phase.NORM_EXPANSION and norm_change is not None:
        if norm_change > 0:
            meaning += " The norm grows while the network memorises."
        else:
            meaning += " Unlike the paper's Phase I, the norm is not growing."
    return Diagnosis(phase, meaning, action, evidence)


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1]; got {share}")


def _evidence(course: Course, test_accuracy: float | None, norm_change: float | None) -> Evidence:
    first, last, recent = course.first, course.last, np.array(course.recent).reshape(-1, 2)
    now = peak = drop = gap = waited = None
    unusable = int(np.isnan(recent[:, 1]).sum())
    level, highest = course.level, course.recent_peak
    # An old level is none: the latest evaluations must hold enough for a median.
    enough = len(recent) == WINDOW and WINDOW - unusable >= MEDIAN
    if enough and level is not None and highest is not None and last is not None:
        now, peak, drop = level, course.peak, highest - level
        if course.threshold is not None:
            gap = now - course.threshold
            waited = 0.0 if course.below_since is None else float(last - course.below_since)
    return Evidence(
        entropy=now,
        peak=peak,
        drop=drop,
        gap=gap,
        steps_below=waited,
        steps_observed=0.0 if first is None or last is None else float(last - first),
        entropy_change=recent_change(recent[:, 0], recent[:, 1], WINDOW),
        norm_change=norm_change,
        test_accuracy=test_accuracy,
        unusable=unusable,
    )


def _norm_change(history: History) -> float | None:
    """Relative change of the norm over the latest evaluations; None where it was not measured."""
    if history.norm is None:
        return None
    change = recent_change(history.step, history.norm, WINDOW)
    return None if change is None else change / float(np.nanmean(history.norm[-WINDOW:]))


# Interpretation and action. Table 5's, in our words; the action near the threshold was lost, and the last two rows
# are ours.
_TABLE = {
    Phase.NORM_EXPANSION: (  # of the norm, only what was measured
        "Phase I: the entropy has not begun to fall.",
        "Continue training.",
    ),
    Phase.COLLAPSE_ONSET: (
        "Phase II: the entropy is collapsing.",
        "Forecast at every evaluation: predict_grok_time.",
    ),
    Phase.NEAR_THRESHOLD: (
        "The entropy is at its threshold: the paper sees grokking within 1,000 steps.",
        "Measure the test accuracy at every evaluation; stop early when the forecast is stable.",
    ),
    Phase.COLLAPSED_WITHOUT_GENERALISING: (
        "The entropy collapsed and nothing was generalised: collapse is not sufficient.",
        "Doubt the architecture's inductive bias, or the threshold if it is another model's.",
    ),
    Phase.NO_COLLAPSE: (
        "The entropy has stopped falling, or never began: this configuration is unlikely to grok.",
        "Increase the weight decay, reduce the learning rate, verify that the task can be grokked.",
    ),
    Phase.GENERALISED: (
        "The test accuracy has reached the criterion.",
        "Stop, or go on to see whether it lasts.",
    ),
    Phase.NOT_ENOUGH_HISTORY: (
        "Too few usable evaluations to tell.",
        "Continue training; look at the statuses if evaluations are unusable.",
    ),
}
