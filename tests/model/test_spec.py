from dataclasses import replace

import pytest

from fedgrade.errors import FedgradeError, JobRefused
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, POOLINGS, ModelSpec
from fedgrade.trust.canonical import decode, encode

WHOLE = ModelSpec(
    backbone="tf_efficientnet_lite0", input_size=224, pooling=POOLINGS, weights_digest=LITE0_WEIGHTS_DIGEST
)


def test_a_spec_survives_the_wire():
    spec = replace(WHOLE, input_size=300, pooling=("maximum",))
    assert decode(ModelSpec, encode(spec)) == spec


@pytest.mark.parametrize("poolings", [1, 2, 3])
def test_every_pooling_adds_the_maps_channels(poolings):
    pooling = ("average", "maximum", "standard_deviation")[:poolings]
    assert replace(WHOLE, pooling=pooling).feature_dimensions == 1280 * poolings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet50"}, "model.backbone"),
        ({"input_size": 0}, "choose 64 to 1024"),
        ({"input_size": 10**9}, "choose 64 to 1024"),
        ({"pooling": ()}, "at least one"),
        ({"pooling": ("average", "average")}, "each once"),
        ({"pooling": ("median",)}, "'median' is not one of"),
        ({"weights_digest": "../weights"}, "hexadecimal"),
        ({"weights_digest": "A" * 64}, "hexadecimal"),
    ],
)
def test_an_impossible_spec_is_refused(changes, message):
    with pytest.raises(JobRefused, match=message):
        replace(WHOLE, **changes)


def test_a_spec_from_the_wire_cannot_name_another_backbone():
    with pytest.raises(FedgradeError, match="backbone"):
        decode(ModelSpec, b'{"backbone":"resnet50"}')
