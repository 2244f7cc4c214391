"""Slow float64 references, written from the equations with loops; they share no code with the package."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def real_tokens(values: Array, mask: Array) -> list[Array]:
    """The vectors of `(batch, seq, features)` where the mask is 1."""
    return [
        values[example, position].astype(np.float64)
        for example in range(mask.shape[0])
        for position in range(mask.shape[1])
        if mask[example, position]
    ]


def masked_mse(student: list[Array], teacher: list[Array]) -> float:
    return sum(
        sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s) for s, t in zip(student, teacher, strict=True)
    ) / len(student)


def cosine(a: Array, b: Array) -> float:
    return float(sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b)))


def cosine_loss(student: list[Array], teacher: list[Array]) -> float:
    return sum(1 - cosine(s, t) for s, t in zip(student, teacher, strict=True)) / len(student)


def normalised_mse(student: list[Array], teacher: list[Array]) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += sum((s / math.sqrt(sum(s * s)) - t / math.sqrt(sum(t * t))) ** 2)
    return total / len(student)


def layer_norm_mse(student: list[Array], teacher: list[Array]) -> float:
    """Yu et al.'s T5 code without padding: one mean and one variance for a whole layer, eps 1e-5, then masked MSE."""
    sides = []
    for rows in (student, teacher):
        entries = [float(entry) for row in rows for entry in row]
        mean = sum(entries) / len(entries)
        variance = sum((entry - mean) ** 2 for entry in entries) / len(entries)
        sides.append([(row - mean) / math.sqrt(variance + 1e-5) for row in rows])
    return masked_mse(*sides)


def softmax(logits: Array, temperature: float) -> Array:
    weights = np.array([math.exp((z - logits.max()) / temperature) for z in logits])
    return weights / weights.sum()


def kl(p: Array, q: Array) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def forward_kl(student: list[Array], teacher: list[Array], temperature: float) -> float:
    rows = [kl(softmax(t, temperature), softmax(s, temperature)) for s, t in zip(student, teacher, strict=True)]
    return temperature**2 * sum(rows) / len(rows)


def reverse_kl(student: list[Array], teacher: list[Array], temperature: float) -> float:
    return forward_kl(teacher, student, temperature)


def js_divergence(student: list[Array], teacher: list[Array], temperature: float) -> float:
    rows = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(s, temperature), softmax(t, temperature)
        middle = (p + q) / 2
        rows.append((kl(p, middle) + kl(q, middle)) / 2)
    return temperature**2 * sum(rows) / len(rows)


def soft_cross_entropy(student: list[Array], teacher: list[Array], temperature: float) -> float:
    rows = [
        -sum(p * math.log(q) for p, q in zip(softmax(t, temperature), softmax(s, temperature), strict=True))
        for s, t in zip(student, teacher, strict=True)
    ]
    return temperature**2 * sum(rows) / len(rows)


def binary_kl(student: list[Array], teacher: list[Array], temperature: float) -> float:
    rows = []
    for s, t in zip(student, teacher, strict=True):
        row = 0.0
        for z_s, z_t in zip(s, t, strict=True):
            p, q = 1 / (1 + math.exp(-z_t / temperature)), 1 / (1 + math.exp(-z_s / temperature))
            row += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        rows.append(row)
    return temperature**2 * sum(rows) / len(rows)


def linear_cka(x: Array, y: Array) -> float:
    """Kornblith et al. 2019, on n x n kernels."""
    x, y = x - x.mean(0), y - y.mean(0)
    k, l_ = x @ x.T, y @ y.T
    return float((k * l_).sum() / math.sqrt((k * k).sum() * (l_ * l_).sum()))


def hsic_1(k: Array, l_: Array) -> float:
    """Song et al. 2012, equation of the unbiased estimator, on kernels that need not be centred."""
    n = len(k)
    k, l_ = k.copy(), l_.copy()
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l_, 0)
    ones = np.ones(n)
    inner = np.trace(k @ l_)
    inner += (ones @ k @ ones) * (ones @ l_ @ ones) / ((n - 1) * (n - 2))
    inner -= 2 / (n - 2) * (ones @ k @ l_ @ ones)
    return float(inner / (n * (n - 3)))


def debiased_cka(x: Array, y: Array) -> float:
    """Nguyen et al. 2021, with one batch."""
    k, l_ = x @ x.T, y @ y.T
    return hsic_1(k, l_) / math.sqrt(hsic_1(k, k) * hsic_1(l_, l_))


def released_cka_loss(student: Array, teacher: Array, eps: float = 1e-8) -> float:
    """What the released code of Dasgupta & Cohn (2025) computes: 1 - |S'T| / sqrt((|S'S| + eps) (|T'T| + eps))."""
    s, t = student - student.mean(0), teacher - teacher.mean(0)
    norm = np.linalg.norm
    return float(1 - norm(s.T @ t) / math.sqrt((norm(s.T @ s) + eps) * (norm(t.T @ t) + eps)))


def mean_angle(first: list[Array], second: list[Array], student: list[Array]) -> float:
    """Mean over tokens of the angle at S between T_i and T_k, in degrees."""
    angles = []
    for a, b, s in zip(first, second, student, strict=True):
        angles.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine(a - s, b - s))))))
    return sum(angles) / len(angles)
