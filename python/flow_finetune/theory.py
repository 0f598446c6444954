"""The linear model of the FLOW paper (arXiv 2502.02797, section 7): why easy samples first forgets less, in closed form.

A model `<theta, x>` that was pre-trained to theta* meets a new task with optimum theta~*. With e = theta* - theta~*,
e^ = e / ||e||, a unit vector e_ orthogonal to e^, and inputs of the new task

    x ~ N(0, Sigma),   Sigma = I + rho (e^ e_' + e_ e^'),   0 <= rho < 1,

FLOW weights a sample by w(x) = exp(-<e, x>^2 / tau): the squared loss of the pre-trained model over tau. Population
gradient descent on the weighted squared loss from theta* gives theta_K = theta~* + (I - 2 eta Sigma')^K e with

    Sigma' = E[w x x'] = mu (I - Q),   mu = sqrt(tau / (tau + 2 ||e||^2)),
    Q = (1 - mu^2) (e^ e^' + rho^2 e_ e_') - rho mu^2 (e^ e_' + e_ e^'),

so with eta = 1 / (2 mu) it is theta~* + Q^K e. Plain gradient descent has Sigma in the place of Sigma'. With beta in
the place of tau, tau = 2 beta (1 - rho^2) ||e||^2 / (1 - beta^2 rho^2), the non-zero eigenvalues of Q are

    lambda_1 = (1 + beta rho^2) / (1 + beta),   of e^ - beta rho e_,
    lambda_2 = rho^2 (1 - beta) / (1 - beta rho^2),   of beta rho e^ + e_.

The paper has beta in (0, 1]; the formulas hold for 0 < beta < 1 / rho, whose ends are tau = 0 (nothing is learned) and
an infinite tau (plain gradient descent). Everything happens in the plane of e^ and e_, so vectors here are pairs of coordinates along them, fp64; `embed` makes
them vectors of d dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinearModel:
    """A new task at a distance from the old one.

    Args:
        rho: correlation of the inputs along e^ and e_, in [0, 1).
        distance: ||e||, positive.
        old_covariance: `[2, 2]`, Sigma_0 of the old task in the plane, at least I; I when not given.

    Raises:
        ValueError: an argument out of range.
    """

    rho: float
    distance: float
    old_covariance: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.rho < 1.0:
            raise ValueError(f"rho must be in [0, 1), got {self.rho}")
        if not 0.0 < self.distance < math.inf:
            raise ValueError(f"distance must be positive, got {self.distance}")
        if self.old_covariance is not None:
            given = np.asarray(self.old_covariance, np.float64)
            if given.shape != (2, 2) or not np.allclose(given, given.T) or np.linalg.eigvalsh(given)[0] < 1 - 1e-12:
                raise ValueError(f"old_covariance must be a symmetric [2, 2] matrix that is at least I, got {given}")

    @property
    def error_vector(self) -> np.ndarray:
        """`[2]`: e, where descent starts as seen from the new optimum."""
        return np.array([self.distance, 0.0])

    @property
    def covariance(self) -> np.ndarray:
        """`[2, 2]`: Sigma of the new task's inputs in the plane."""
        return np.array([[1.0, self.rho], [self.rho, 1.0]])

    def mu(self, tau: float) -> float:
        """`sqrt(tau / (tau + 2 ||e||^2))`: the mean weight E[w]; 1 for an infinite tau."""
        if not tau > 0.0:
            raise ValueError(f"tau must be positive, got {tau}")
        return 1.0 / math.sqrt(1.0 + 2.0 * self.distance**2 / tau)

    def contraction(self, tau: float) -> np.ndarray:
        """`[2, 2]`: Q, which every step with eta = 1 / (2 mu) multiplies `theta - theta~*` by."""
        kept = self.mu(tau) ** 2
        return np.array([[1.0 - kept, -self.rho * kept], [-self.rho * kept, self.rho**2 * (1.0 - kept)]])

    def weighted_covariance(self, tau: float) -> np.ndarray:
        """`[2, 2]`: Sigma' = E[w x x'] = mu (I - Q)."""
        return self.mu(tau) * (np.eye(2) - self.contraction(tau))

    def tau_of(self, beta: float) -> float:
        """The temperature that a beta stands for: up to 2 ||e||^2 in (0, 1], and without bound towards 1 / rho."""
        if not (beta > 0.0 and beta * self.rho < 1.0):
            raise ValueError(f"beta must be positive and below 1 / rho, got {beta} with rho {self.rho}")
        return 2.0 * beta * (1.0 - self.rho**2) * self.distance**2 / (1.0 - (beta * self.rho) ** 2)

    def beta_of(self, tau: float) -> float:
        """The beta of a temperature: the positive root of `tau rho^2 beta^2 + 2 (1 - rho^2) ||e||^2 beta = tau`."""
        if not 0.0 < tau < math.inf:
            raise ValueError(f"tau must be positive and finite, got {tau}")
        half = (1.0 - self.rho**2) * self.distance**2
        # The stable form of the root: no difference of nearly equal numbers for a small rho.
        return tau / (half + math.hypot(half, tau * self.rho))

    def eigenvalues(self, beta: float) -> tuple[float, float]:
        """lambda_1 and lambda_2 of Q."""
        square = self.rho**2
        return (1.0 + beta * square) / (1.0 + beta), square * (1.0 - beta) / (1.0 - beta * square)

    def top_eigenvector(self, beta: float) -> np.ndarray:
        """`[2]`: `e^ - beta rho e_`, not normalised, the direction in which FLOW learns slowest."""
        return np.array([1.0, -beta * self.rho])

    def flow_iterate(self, beta: float, num_steps: int | np.ndarray) -> np.ndarray:
        """`[..., 2]`: `theta_K - theta~*` after K = `num_steps` steps with eta = 1 / (2 mu), in closed form."""
        first, second = (np.power(value, num_steps) for value in self.eigenvalues(beta))
        slope = beta * self.rho
        along = (first + second * slope**2) / (1.0 + slope**2)
        across = -slope * (first - second) / (1.0 + slope**2)
        return self.distance * np.stack([along, across], axis=-1)

    def plain_iterate(self, num_steps: int) -> np.ndarray:
        """`[2]`: `theta_K - theta~*` of plain gradient descent with eta = 1/2: `(I - Sigma)^K e`."""
        # I - Sigma swaps the two coordinates and scales by -rho.
        size = self.distance * (-self.rho) ** num_steps
        return np.array([size, 0.0]) if num_steps % 2 == 0 else np.array([0.0, size])

    def descend(self, covariance: np.ndarray, learning_rate: float, num_steps: int) -> np.ndarray:
        """`[num_steps + 1, 2]`: `theta_k - theta~*` of gradient descent with any covariance and step size."""
        step = np.eye(2) - 2.0 * learning_rate * np.asarray(covariance, np.float64)
        iterates = [self.error_vector]
        for _ in range(num_steps):
            iterates.append(step @ iterates[-1])
        return np.stack(iterates)

    def old_error(self, offset: np.ndarray) -> np.ndarray:
        """`[...]`: `(theta - theta*)' Sigma_0 (theta - theta*)` for `[..., 2]` offsets `theta - theta~*`."""
        return _quadratic(np.asarray(offset) - self.error_vector, self._old_covariance)

    def new_error(self, offset: np.ndarray) -> np.ndarray:
        """`[...]`: `(theta - theta~*)' Sigma (theta - theta~*)` for `[..., 2]` offsets `theta - theta~*`."""
        return _quadratic(np.asarray(offset), self.covariance)

    def total_error(self, offset: np.ndarray) -> np.ndarray:
        """`[...]`: the sum of both errors; at least ||e||^2 at either optimum."""
        return self.old_error(offset) + self.new_error(offset)

    def average(self, share: float | np.ndarray) -> np.ndarray:
        """`[..., 2]`: offset of `share * theta* + (1 - share) * theta~*`, as WiSE-FT averages (alpha = 1 - share)."""
        return np.asarray(share, np.float64)[..., None] * self.error_vector

    def best_average(self) -> tuple[float, float]:
        """The share of theta* of the best average, and its total error `||e||^2 c / (1 + c)`, c = e^' Sigma_0 e^."""
        c = float(self._old_covariance[0, 0])
        return c / (1.0 + c), self.distance**2 * c / (1.0 + c)

    def best_flow(self, betas: np.ndarray, num_steps: int) -> tuple[float, int, float]:
        """The beta, the number of steps (0 to `num_steps`) and the total error of the best of FLOW's iterates."""
        steps = np.arange(num_steps + 1)
        errors = np.stack([self.total_error(self.flow_iterate(beta, steps)) for beta in betas])
        row, step = np.unravel_index(errors.argmin(), errors.shape)
        return float(betas[row]), int(step), float(errors[row, step])

    @property
    def _old_covariance(self) -> np.ndarray:
        return np.eye(2) if self.old_covariance is None else np.asarray(self.old_covariance, np.float64)


def _quadratic(vector: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("...i,ij,...j->...", vector, matrix, vector)


def embed(plane: np.ndarray, basis: np.ndarray, *, outside: float | None = None) -> np.ndarray:
    """Coordinates in the plane of e^ and e_ as vectors, or a matrix, of d dimensions.

        basis.T @ plane                                                # [2] -> [d]
        basis.T @ plane @ basis + outside * (I - basis.T @ basis)      # [2, 2] -> [d, d]

    Args:
        plane: `[2]`, or `[2, 2]` with `outside`.
        basis: `[2, d]` with the orthonormal rows e^ and e_.
        outside: what the matrix multiplies vectors orthogonal to the plane by: 1 for Sigma, mu for Sigma', 0 for Q.
    """
    if outside is None:
        return basis.T @ plane
    return basis.T @ plane @ basis + outside * (np.eye(basis.shape[1]) - basis.T @ basis)
