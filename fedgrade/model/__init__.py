"""What turns a photo into grade probabilities: a public network, and the parts of it that learn.

- :mod:`fedgrade.model.spec` — which backbone, input and pooling, what is trained; a value that a sealed job carries.
- :mod:`fedgrade.model.preprocessing` — from any photo to the backbone's input, with numpy and Pillow.
- :mod:`fedgrade.model.views` — flips and a half turn of that input, for training.
- :mod:`fedgrade.model.backbones` — the public network; the only file that knows timm, and where torch and ONNX meet.
- :mod:`fedgrade.model.compute` — devices, precision, and how many photos a device holds at once.
- :mod:`fedgrade.model.starting` — public starting points, computed from a hash.
- :mod:`fedgrade.model.networks` — what learns, as torch modules.
- :mod:`fedgrade.model.adapter` — the bottleneck on frozen features, in numpy.
- :mod:`fedgrade.model.portable` — a whole model as one ONNX file; the only file that knows the package onnx.
- :mod:`fedgrade.model.weights` — weights as strict safetensors bytes, never pickle.
- :mod:`fedgrade.model.head` — the cumulative ordinal head, in numpy.

Knows nothing of manifests, caches or privacy. Only ``backbones``, ``compute``, ``networks`` and ``pooling`` need torch.
"""
