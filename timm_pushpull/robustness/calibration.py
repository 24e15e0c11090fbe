"""Metrics of calibration: whether the probabilities of a model can be trusted."""

import numpy as np

__all__ = [
    'BINS',
    'CALIBRATION',
    'brier_scores',
    'expected_calibration_error',
    'negative_log_likelihoods',
    'reliability_bins',
]

BINS = 15
CALIBRATION = {
    'ECE': 'expected calibration error on clean images, points: mean distance between confidence and accuracy, over 15 '
    'bins of equal width',
    'NLL': 'negative log-likelihood of the right class on clean images, nats',
    'Brier': 'Brier score on clean images: squared distance between the probabilities and the right answer, 0 to 2',
    'mean_ECE': 'mean of the ECE over 15 corruptions and their severities, points',
    'mean_NLL': 'mean of the NLL over 15 corruptions and their severities, nats',
    'mean_Brier': 'mean of the Brier score over 15 corruptions and their severities',
}


def negative_log_likelihoods(log_probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the negative log-likelihood of each image: ``-log p_y``.

    Args:
        log_probabilities: Natural logarithm of the probability of each class, (N, C).
        targets: Right class y of each image, (N,).

    Returns:
        Nats (N,): 0 for certainty of the right class, log C for equal probabilities.
    """
    return -log_probabilities[np.arange(len(targets)), targets]


def brier_scores(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the Brier score of each image: ``sum_k (p_k - [k = y])^2`` over the classes k.

    Args:
        probabilities: Probability of each class, (N, C).
        targets: Right class y of each image, (N,).

    Returns:
        Scores (N,): 0 for certainty of the right class, 2 for certainty of a wrong one.
    """
    right = np.arange(probabilities.shape[1]) == np.asarray(targets)[:, None]
    return np.square(probabilities - right).sum(1)


def reliability_bins(confidences: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Sort predictions into 15 bins by their confidence; bin b holds those in ``(b / 15, (b + 1) / 15]``.

    Args:
        confidences: Probability of the predicted class of each image, (N,).
        correct: Whether each prediction is right, (N,).

    Returns:
        Array (15, 3): number of predictions, their mean confidence and their accuracy; NaN for an empty bin.
    """
    places = np.clip(np.ceil(np.asarray(confidences, float) * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(places, minlength=BINS)
    with np.errstate(invalid='ignore'):
        means = (np.bincount(places, values, BINS) / count for values in (confidences, correct))
        return np.stack([count, *means], 1)


def expected_calibration_error(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Compute the ECE over the 15 bins of :func:`reliability_bins`.

    ``sum_b |B_b| / N * |accuracy(B_b) - confidence(B_b)|``, see https://arxiv.org/abs/1706.04599.

    Args:
        confidences: Probability of the predicted class of each image, (N,).
        correct: Whether each prediction is right, (N,).

    Returns:
        Error, in [0, 1]; NaN without predictions.
    """
    count, confidence, accuracy = reliability_bins(confidences, correct).T
    return float(np.nansum(count * np.abs(accuracy - confidence)) / count.sum()) if count.sum() else float('nan')
