"""What turns a photo into grade probabilities: a frozen public backbone, and the small head that learns.

- :mod:`fedgrade.model.spec` — which backbone, input and pooling; a value that a sealed job carries.
- :mod:`fedgrade.model.preprocessing` — from any photo to the backbone's input, with numpy and Pillow.
- :mod:`fedgrade.model.backbones` — the frozen backbone; the only file that knows timm, and where torch and ONNX meet.
- :mod:`fedgrade.model.weights` — weights as strict safetensors bytes, never pickle.
- :mod:`fedgrade.model.head` — the cumulative ordinal head, in numpy.

Knows nothing of manifests, caches or privacy. Only ``backbones`` needs torch.
"""
