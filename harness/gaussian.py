"""A Gaussian process over tunables: what a few hundred trials say of thousands of configs, and how sure that is.

The kernel adds what single parameters do, what pairs do, and what all do together (Duvenaud, Nickisch and Rasmussen 2011), each
from exp(-|x - x'| / length): times jump from one tile size to the next, so nothing smoother is assumed.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Lengths in units of a parameter's whole range, weights against that of the product, noise against the variance of what was
# learned: medians of log-normal priors, all as wide as a factor of e ** 1.5 either way. Data decide within a few trials.
_LENGTH, _WEIGHT, _NOISE, _WIDTH = 0.5, 1.0, 1e-2, 1.5
_SHORTEST, _LONGEST = 0.01, 50.0
_QUIETEST, _LOUDEST = 1e-5, 0.5
# Random steps from the last settings, each time something was learned; a step moves some of them by a factor or two.
_STEPS = 16
_STEP = 0.6
_MOVED = 0.3


@dataclass(frozen=True, slots=True)
class _Fitted:
    """One setting, with what follows from it: `loss` is minus the log of likelihood times prior, `factor` that of Cholesky."""

    setting: Floats
    loss: float
    factor: Floats
    whitened: Floats
    variance: float


class GaussianProcess:
    """Learns targets (N,) at points (N, d), coordinates from 0 to 1. It keeps its settings from one `learn` to the next, and
    searches on from there, so each call is cheap."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        middle = [math.log(_LENGTH)] * dimensions + [math.log(_WEIGHT)] * 2 + [math.log(_NOISE)]
        self._middle = np.array(middle)
        self._setting = self._middle
        self._points: Floats = np.empty((0, dimensions))
        self._scale = (0.0, 1.0)
        self._fitted: _Fitted | None = None
        self._weights: Floats = np.empty(0)

    def learn(self, points: Floats, targets: Floats, rng: np.random.Generator) -> None:
        """Learn all of it anew. N must be at least 2."""
        self._points = points
        self._scale = (float(targets.mean()), float(targets.std()) + 1e-9)
        scaled = (targets - self._scale[0]) / self._scale[1]
        apart = np.abs(points[:, None] - points[None])
        best = self._fit(apart, scaled, self._setting)
        for _ in range(_STEPS):
            step = rng.normal(0, _STEP, len(self._middle))
            moved = rng.random(len(step)) < _MOVED
            moved[rng.integers(len(step))] = True
            tried = self._fit(apart, scaled, self._within(best.setting + np.where(moved, step, 0)))
            if tried.loss < best.loss:
                best = tried
        self._fitted, self._setting = best, best.setting
        self._weights = np.asarray(np.linalg.solve(best.factor.T, best.whitened), dtype=np.float64)

    def predict(self, points: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation at each row of `points` (M, d), of what a trial without noise would give."""
        fitted = self._fitted
        if fitted is None:
            raise ValueError("nothing was learned yet")
        kernel = self._kernel(np.abs(points[:, None] - self._points[None]), fitted.setting)
        known = np.linalg.solve(fitted.factor, kernel.T)
        left = np.maximum(1 - (known**2).sum(0), 1e-9) * fitted.variance
        mean, scale = self._scale
        return kernel @ self._weights * scale + mean, np.sqrt(left) * scale

    def _within(self, setting: Floats) -> Floats:
        ends = self._dimensions
        setting[:ends] = setting[:ends].clip(math.log(_SHORTEST), math.log(_LONGEST))
        setting[-1] = setting[-1].clip(math.log(_QUIETEST), math.log(_LOUDEST))
        return setting

    def _kernel(self, apart: Floats, setting: Floats) -> Floats:
        """Correlations from distances (M, N, d); the weights add up to 1."""
        count = self._dimensions
        alike = np.exp(-apart * np.exp(-setting[:count]))
        summed = alike.sum(-1)
        single, pair, joint = (
            np.exp([*setting[count : count + 2], 0.0]) / np.exp([*setting[count : count + 2], 0.0]).sum()
        )
        kernel = single * summed / count + joint * alike.prod(-1)
        if count > 1:
            kernel += pair * (summed**2 - (alike**2).sum(-1)) / (count * (count - 1))
        else:
            kernel += pair * summed
        return np.asarray(kernel)

    def _fit(self, apart: Floats, targets: Floats, setting: Floats) -> _Fitted:
        kernel = self._kernel(apart, setting)
        kernel[np.diag_indices(len(targets))] += math.exp(setting[-1])
        factor: Floats = np.asarray(np.linalg.cholesky(kernel), dtype=np.float64)
        whitened: Floats = np.asarray(np.linalg.solve(factor, targets), dtype=np.float64)
        # The variance of all is integrated out, with a prior worth one trial at 1.
        variance = float(whitened @ whitened + 1) / (len(targets) + 2)
        likelihood = 0.5 * (len(targets) + 1) * math.log(variance) + float(np.log(np.diag(factor)).sum())
        prior = 0.5 * float((((setting - self._middle) / _WIDTH) ** 2).sum())
        return _Fitted(setting, likelihood + prior, factor, whitened, variance)
