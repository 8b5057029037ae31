"""What a partner holds: photos, the manifest that says what they are, and the features taken from them.

- :mod:`fedgrade.data.manifest` — the list of photos, items, grades and splits; strict, because everything rests on it.
- :mod:`fedgrade.data.splits` — which physical source is for training and which for testing, by keyed hash.
- :mod:`fedgrade.data.photos` — from photo files to pixels, safely.
- :mod:`fedgrade.data.assets` — from pixels to features, kept on disk.
- :mod:`fedgrade.data.elpv` — the demo's real photos, as five recyclers.

Knows nothing of heads, budgets or Flower; what extracts features is given in.
"""
