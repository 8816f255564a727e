"""The law of loss over model size and tokens, fitted to finished runs: its parameters, predictions and their intervals.

L(N, D) = E + ((A/N^α)^(1/γ) + (B/D^β)^(1/γ))^γ: E is what no model can know, the other terms are what a finite model
and finite text leave. With γ = 1 they add up (Hoffmann et al. 2022, arXiv:2203.15556, approach 3). With γ < 1 the
larger of them hides the other, so that larger models gain more from the same text; with γ = β and E = 0 it is the law
of Kaplan et al. (2020, arXiv:2001.08361, equation 1.5). That a sum is not enough is what Li et al. (2025,
arXiv:2506.10972) found in a thousand runs.

N are FLOPs of a token / 6, so that a run takes exactly 6 N D model FLOPs: the parameters that a token is multiplied
with, the unembedding included, and attention's products as if they were parameters. Leaving out the last layer, as
Kaplan et al. do, makes small models look smaller than their cost and the best sizes too large (Porian et al. 2024,
arXiv:2406.19146; Pearce and Song 2024, arXiv:2406.12907); the lookup in the embedding costs nothing, and is not
counted. Bi et al. (2024, arXiv:2401.02954) count attention alike.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls
from scipy.special import entr, logsumexp, ndtri, stdtrit

from data.errors import InputError

# The threshold of the Huber loss on residuals of log L. It is ten times that of Hoffmann et al., who had 400 runs: with
# a threshold below the noise the loss is nearly absolute, which makes less of few points.
HUBER = 1e-2
# The bounds of α and β.
EXPONENTS = (0.02, 3.0)
# The bounds of γ. A smaller one would be nearly the larger of the two terms alone.
JOINT = (0.2, 2.0)
# What is known of α, β and γ before any run, and the deviations of their logs. Of published fits α is 0.34 (Hoffmann et
# al.), 0.35 (Besiroglu et al.) and 0.29 (Hu et al. 2024, arXiv:2404.06395), β 0.28, 0.37 and 0.23: the mean and the
# deviation are those of these six. A few rungs of small models hardly tell a large exponent with a large E from a small
# one with a small E, and the first says that larger models gain nothing. γ is 1 there; Kaplan's form, γ = β, is two
# deviations away.
PRIOR = np.array([0.31, 0.31, 1.0])
PRIOR_DEVIATION = np.array([0.18, 0.18, 0.5])
STARTS = (0.25, 0.5)
MOST_EVALUATIONS = 300
RESAMPLES = 200
CONFIDENCE = 0.95
# Weights of a wild bootstrap: it keeps all sizes, and draws by what each residual is multiplied. These six have mean 0
# and variance 1, and are for few clusters (Webb 2023, Canadian Journal of Economics 56).
WEBB = np.array([-math.sqrt(1.5), -1, -math.sqrt(0.5), math.sqrt(0.5), 1, math.sqrt(1.5)])
# The fewest points, different sizes and different numbers of tokens that determine the law with some to spare, and the
# least range of sizes and of tokens.
LEAST_POINTS, LEAST_SIZES, LEAST_TOKENS, LEAST_RANGE = 10, 4, 3, 2.0


class Law(NamedTuple):
    """L(N, D) = E + ((A/N^alpha)^(1/gamma) + (B/D^beta)^(1/gamma))^gamma, in bits a byte."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float = 1.0

    def loss(self, N: float, D: float) -> float:
        """Returns the loss of a model of size N after D tokens."""
        terms = self.A * N**-self.alpha, self.B * D**-self.beta
        return float(self.E + sum(term ** (1 / self.gamma) for term in terms) ** self.gamma)

    def best(self, flops: float) -> tuple[float, float]:
        """Returns the N and D of least loss with 6 N D = `flops` (as by Hoffmann et al., equation 4)."""
        ratio = self.alpha / self.beta * (self.A / self.B) ** (1 / self.gamma)
        ratio **= self.gamma / (self.alpha + self.beta)
        N = ratio * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return N, flops / 6 / N


class Interval(NamedTuple):
    """A value, and the ends of its interval of confidence."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A law with its uncertainty.

    Attributes:
        residuals: log of measured over fitted loss of each point.
        resamples: laws of bootstrap samples of the residuals, by rung and by point.
        noise: by what a run is above the law, in log of the loss, drawn for each of the resamples.
    """

    law: Law
    residuals: np.ndarray
    resamples: tuple[Law, ...]
    noise: np.ndarray

    def interval(self, function: Callable[[Law], float]) -> Interval:
        """Returns a function of the law with its interval over the resamples."""
        return _interval(function(self.law), np.array([function(law) for law in self.resamples]))

    def predict(self, N: float, D: float) -> Interval:
        """Returns the loss that one run will have: the interval holds the spread of runs about the law, too."""
        drawn = np.array([law.loss(N, D) for law in self.resamples]) * np.exp(self.noise)
        return _interval(self.law.loss(N, D), drawn)


def fit_law(N: np.ndarray, D: np.ndarray, L: np.ndarray, resamples: int = RESAMPLES) -> Fit:
    """Returns the law of points: losses L of models of sizes N after D tokens, [points] each. A rung is all of one N.

    Raises InputError where a loss is not finite, or the points do not determine the law.
    """
    N, D, L = (np.asarray(x, float) for x in (N, D, L))
    if not np.isfinite(L).all() or (L <= 0).any():
        raise InputError("a loss is not finite and above 0, so no law is fitted; leave its run out")
    if problem := too_few(N, D):
        raise InputError(f"the points determine no law: {problem}")
    free = _best_fit(N, D, L, 0.0)
    noise = _noise(np.log(L) - _log_loss(free, np.log(N), np.log(D)), len(np.unique(N)))
    theta = _best_fit(N, D, L, noise)
    fitted = _log_loss(theta, np.log(N), np.log(D))
    residuals = np.log(L) - fitted
    _, rung_of = np.unique(N, return_inverse=True)
    shared, own = _parts(residuals, rung_of)
    random = np.random.default_rng(0)
    K, n, S = len(shared), len(own), resamples
    by_rung, by_point = random.choice(WEBB, (S, K)) * shared, random.choice(WEBB, (S, n)) * own
    thetas = _refined(np.tile(theta, (S, 1)), N, D, np.exp(fitted + by_rung[:, rung_of] + by_point), noise)
    drawn = random.choice(WEBB, S) * random.choice(shared, S) + random.choice(WEBB, S) * random.choice(own, S)
    return Fit(_law(theta), residuals, tuple(map(_law, thetas)), drawn)


def _noise(residuals: np.ndarray, rungs: int) -> float:
    """Returns the deviation of residuals that the six parameters leave, as if all points of a rung were one.

    No residual counts for more than three deviations, so that one bad point does not make the prior stronger.
    """
    n = len(residuals)
    most = 3 * np.median(abs(residuals)) / ndtri(0.75)
    return float(np.sqrt((np.minimum(abs(residuals), most) ** 2).sum() / max(n - 6, 1) * n / rungs))


def _parts(residuals: np.ndarray, rung_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean residual of each rung, and what each point has in addition, as large as they may be in truth.

    Runs of a rung share weights and batches up to their branches, so their residuals are no independent draws. Three of
    the law's parameters are along N and absorb differences between rungs, three are not. What is left has few degrees
    of freedom, for which Student's t is wider than the normal distribution.
    """
    K, n = int(rung_of.max()) + 1, len(residuals)
    shared = np.bincount(rung_of, residuals) / np.bincount(rung_of)
    own = residuals - shared[rung_of]
    between, within = K - 3, max(n - K - 3, 1)
    return shared * math.sqrt(K / between) * _wider(between), own * math.sqrt(n / within) * _wider(within)


def _wider(freedom: int) -> float:
    """Returns the ratio of the quantiles of Student's t and of the normal distribution."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2) / ndtri((1 + CONFIDENCE) / 2))


def too_few(N: np.ndarray, D: np.ndarray) -> str:
    """Returns why points of these sizes and tokens do not determine a law, or an empty text where they do."""
    if len(N) < LEAST_POINTS:
        return f"there are {len(N)}, and {LEAST_POINTS} are the fewest"
    for name, values, least in (("sizes", N, LEAST_SIZES), ("numbers of tokens", D, LEAST_TOKENS)):
        if (number := len(np.unique(values))) < least:
            return f"they have {number} different {name}, and {least} are the fewest"
        if (ratio := values.max() / values.min()) < LEAST_RANGE:
            return f"their {name} differ by a factor of {ratio:.2f}, and {LEAST_RANGE:.0f} is the least"
    return ""


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(value), min(float(low), float(value)), max(float(high), float(value)))


# theta is (log E, log A, log B, alpha, beta, gamma), along the last axis; other axes are of several fits.
def _law(theta: np.ndarray) -> Law:
    return Law(*np.exp(theta[:3]).tolist(), *theta[3:].tolist())


def _log_terms(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logs of E and of the joint term, [2, ..., points], and those of what is summed in it, likewise."""
    e, a, b, alpha, beta, gamma = np.moveaxis(theta, -1, 0)[..., None]
    summed = np.stack([a - alpha * n, b - beta * d]) / gamma
    return np.stack([e + 0 * n, gamma * logsumexp(summed, axis=0)]), summed


def _log_loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.asarray(logsumexp(_log_terms(theta, n, d)[0], axis=0))


def _huber(residuals: np.ndarray) -> np.ndarray:
    """Returns the summed Huber loss of residuals, over the last axis."""
    distance = np.abs(residuals)
    return np.asarray(np.where(distance <= HUBER, distance**2 / 2, HUBER * (distance - HUBER / 2)).sum(-1))


def _from_prior(theta: np.ndarray, noise: float) -> np.ndarray:
    """Returns the residuals of the exponents, [..., 3]: their deviations from the prior, in units of the noise."""
    return np.asarray(noise * np.log(theta[..., 3:] / PRIOR) / PRIOR_DEVIATION)


def _best_fit(N: np.ndarray, D: np.ndarray, L: np.ndarray, noise: float) -> np.ndarray:
    """Returns the best parameters from several starts. The noise is that of the points next to the prior's.

    For given exponents and gamma = 1 the law is linear, and relative errors are nearly those of logs.
    """
    starts = []
    for alpha, beta in itertools.product(STARTS, STARTS):
        n, d = (N / N.min()) ** -alpha, (D / D.min()) ** -beta
        terms, _ = nnls(np.stack([np.ones_like(L), n, d], axis=1) / L[:, None], np.ones_like(L))
        E, A, B = np.log(np.maximum(terms, 1e-6 * L.min()))
        starts.append([E, A + alpha * np.log(N.min()), B + beta * np.log(D.min()), alpha, beta, 1.0])
    thetas = _refined(np.array(starts), N, D, np.tile(L, (len(starts), 1)), noise)
    residuals = _log_loss(thetas, np.log(N), np.log(D)) - np.log(L)
    return np.array(thetas[np.argmin(_huber(np.concatenate([residuals, _from_prior(thetas, noise)], axis=-1)))])


def _refined(starts: np.ndarray, N: np.ndarray, D: np.ndarray, L: np.ndarray, noise: float) -> np.ndarray:
    """Returns the parameters of least Huber loss near each start, [fits, 6], for losses [fits, points].

    The tolerances are small: ending early was what made the intervals of Hoffmann et al. too narrow (Besiroglu et al.
    2024, arXiv:2404.10102).
    """
    if not len(starts):
        return starts
    n, d, logs = np.log(N), np.log(D), np.log(L)
    # Centred, so that a change of an exponent does not have to be balanced by its factor.
    centre = np.array([n.mean(), d.mean()])
    n, d = n - centre[0], d - centre[1]
    least, most = logs.min() - 12, logs.max() + 3
    bounds = np.transpose([(least, most)] * 3 + [EXPONENTS] * 2 + [JOINT])

    def jacobian(theta: np.ndarray, _: np.ndarray) -> np.ndarray:
        terms, summed = _log_terms(theta, n, d)
        of_E, of_joint = np.exp(terms - logsumexp(terms, axis=0))
        shares = np.exp(summed - logsumexp(summed, axis=0))
        of_A, of_B = of_joint * shares
        of_gamma = of_joint * entr(shares).sum(0)
        of_prior = np.diag(noise / PRIOR_DEVIATION / theta[3:])
        of_points = np.stack([of_E, of_A, of_B, -of_A * n, -of_B * d, of_gamma], axis=-1)
        return np.concatenate([of_points, np.pad(of_prior, ((0, 0), (3, 0)))])

    def refined(start: np.ndarray, of: np.ndarray) -> np.ndarray:
        residuals = lambda theta, of: np.concatenate([_log_loss(theta, n, d) - of, _from_prior(theta, noise)])
        options = {"loss": "huber", "f_scale": HUBER, "xtol": 1e-8, "ftol": 1e-10, "gtol": 1e-10}
        return least_squares(residuals, start, jacobian, bounds, args=(of,), max_nfev=MOST_EVALUATIONS, **options).x

    centred = starts.copy()
    centred[:, 1:3] -= centred[:, 3:5] * centre
    centred = np.clip(centred, bounds[0] + 1e-9, bounds[1] - 1e-9)
    thetas = np.array([refined(start, of) for start, of in zip(centred, logs, strict=True)])
    thetas[:, 1:3] += thetas[:, 3:5] * centre
    return thetas
