"""Measures of what a model generates."""
import numpy as np


def classifier_accuracy(generated, labels, real, real_labels):
    """Fraction of generated images that a classifier trained on real ones takes for the class that was asked for.

    The classifier is scikit-learn's support vector machine with its default RBF kernel, on pixels: fit for small images such as digits.

    Args:
        generated: (n, H, W, C) uint8. labels: (n,) the classes asked for. real: (m, H, W, C) uint8. real_labels: (m,).
    Returns: a number in [0, 1].
    Raises: ValueError if the image shapes differ.
    """
    from sklearn.svm import SVC

    generated, real = np.asarray(generated), np.asarray(real)
    if generated.shape[1:] != real.shape[1:]:
        raise ValueError(f"generated: got images of shape {generated.shape[1:]}, expected {real.shape[1:]}, as the real ones")
    classifier = SVC().fit(real.reshape(len(real), -1) / 255.0, np.asarray(real_labels))
    return float((classifier.predict(generated.reshape(len(generated), -1) / 255.0) == np.asarray(labels)).mean())
