"""Items of a few photos each, as a site hands them to training, and their gradients by the oracle in closed form."""

import numpy as np

from fedgrade.items import ItemBatch
from fedgrade.model.head import head_inputs, item_mean, ordinal_gradient

GRADES = 4


def padded(photos, grades):
    """Items from lists of their photos [photos, features], as a site pads them."""
    most = max((len(rows) for rows in photos), default=1)
    features = len(photos[0][0]) if photos else 1
    inputs, weights = np.zeros((len(photos), most, features)), np.zeros((len(photos), most))
    for item, rows in enumerate(photos):
        inputs[item, : len(rows)], weights[item, : len(rows)] = rows, 1 / len(rows)
    return ItemBatch(inputs=inputs, photo_weights=weights, grades=np.array(grades, dtype=np.int64))


def problem(items, *, seed=0, features=6, most=4):
    """Thresholds, and items of 1 to ``most`` photos each as lists and as a batch."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=features) * 0.1
    photos = [head_inputs(rng.normal(size=(rng.integers(1, most + 1), features)), centre) for _ in range(items)]
    grades = rng.integers(0, GRADES, items)
    return rng.normal(size=(GRADES - 1, features + 1)), photos, padded(photos, grades)


def closed_form_rows(thresholds, photos, grades):
    """Gradients [items, ...] of items' mean losses."""
    inputs, item_index = np.concatenate(photos), np.repeat(np.arange(len(photos)), [len(rows) for rows in photos])
    per_photo = ordinal_gradient(thresholds, inputs, grades[item_index])
    return item_mean(per_photo, item_index, len(photos)).reshape(len(photos), -1)


def clipped_by_hand(row, max_grad_norm):
    """A gradient [...] no longer than the clip."""
    return row * min(1.0, max_grad_norm / np.linalg.norm(row))
