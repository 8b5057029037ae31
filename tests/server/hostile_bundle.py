"""A coordinator's app bundle that would leave a mark on any machine that imports it."""

from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest

from server import control


def start_request(mark):
    """A run whose ClientApp touches ``mark`` when it is imported."""
    code = f"import pathlib\n\npathlib.Path({str(mark)!r}).touch()\napp = None\n"
    bundle = control._build({**control._BUNDLE, "site_of_fedgrade.py": code.encode()})
    return StartRunRequest(fab=fab_to_proto(bundle), federation="")
