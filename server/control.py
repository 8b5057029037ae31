"""The coordinator's hand on a SuperLink: enrol nodes, submit a run, follow it. The one file to know flwr's Control API.

Private API of flwr, pinned ``>=1.41,<1.42``; tests/server/test_flwr_contract.py fails when a name used here moves.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from fedgrade.errors import DocumentRefused, FedgradeError

# The bundle names code that is installed and carries none: what runs is what the coordinator's operator installed.
_BUNDLE: Final = {
    "pyproject.toml": b"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedgrade-run"
version = "1.0.0"
description = "One run of fedgrade; names the installed ServerApp and carries no code of its own"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.42"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fedgrade"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "run_of_fedgrade:app"
clientapp = "site_of_fedgrade:app"

[tool.flwr.app.config]
run-directory = ""
""",
    "LICENSE": b"SPDX-License-Identifier: Apache-2.0\n",
    # Two modules: the process of a run need not load the door of a site.
    "run_of_fedgrade.py": b"from server.app import app\n\n__all__ = ['app']\n",
    "site_of_fedgrade.py": b"from clients.app import app\n\n__all__ = ['app']\n",
}


class ControlRefused(FedgradeError):
    """The SuperLink's admin listener cannot be reached, or said no."""


class NoAnswer(ControlRefused):
    """The SuperLink's admin listener does not answer in time."""


@dataclass(frozen=True, kw_only=True)
class ListedNode:
    """A node as the SuperLink has it: its id there, its public key in OpenSSH form, whether its heartbeat is fresh."""

    node: int
    public_key: str
    online: bool


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Where a run stands, in Flower's words.

    Attributes:
        phase: ``pending``, ``starting``, ``running`` or ``finished``.
        outcome: ``completed``, ``failed`` or ``stopped`` once finished, empty before.
        details: one line that says why it failed.
    """

    phase: str
    outcome: str
    details: str

    @property
    def finished(self) -> bool:
        """Whether the run is over, well or badly."""
        return self.phase == "finished"


class Control:
    """A connection to the admin listener; a context manager."""

    def __init__(self, address: str, *, authority: Path, token: bytes) -> None:
        self._address = address
        self._client = ControlHttpClient.from_server_address(
            address,
            insecure=False,
            root_certificates=authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedgrade"), _Bearer(token)],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._client.close()

    def register(self, public_key: Path, name: str) -> int:
        """Enrol the OpenSSH public key in the file ``public_key`` as ``name``; the node's id.

        Raises:
            DocumentRefused: the file holds no elliptic-curve key in OpenSSH form.
            ControlRefused: the key is enrolled already, or the SuperLink said no.
        """
        try:
            text = public_key.read_bytes().decode("ascii", errors="replace")
        except OSError as error:
            raise DocumentRefused(f"node key {public_key}: not an OpenSSH public key ({error})") from error
        return self.register_key(text, name, what=f"node key {public_key}")

    def register_key(self, public_key: str, name: str, *, what: str = "node key") -> int:
        """Like :meth:`register`, for a key at hand; ``what`` names it in a refusal."""
        request = RegisterNodeRequest(public_key=public_key_to_bytes(_node_key(public_key, what=what)), name=name)
        return int(self._call(self._client.RegisterNode, request).node_id)

    def unregister(self, node_id: int) -> None:
        """Strike ``node_id`` off; its requests are refused from now on.

        Raises:
            ControlRefused: it is not enrolled.
        """
        self._call(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))

    def online(self) -> frozenset[int]:
        """Ids of the nodes whose heartbeat is fresh.

        Raises:
            ControlRefused: no answer.
        """
        return frozenset(listed.node for listed in self.nodes() if listed.online)

    def nodes(self) -> tuple[ListedNode, ...]:
        """Every node that is enrolled.

        Raises:
            ControlRefused: no answer.
        """
        nodes = self._call(self._client.ListNodes, ListNodesRequest()).nodes_info
        return tuple(
            ListedNode(node=node.node_id, public_key=_openssh(node.public_key), online=node.status == "online")
            for node in nodes
            if node.status != "unregistered"
        )

    def unfinished(self) -> tuple[int, ...]:
        """Runs that are not over, newest first.

        Raises:
            ControlRefused: no answer.
        """
        runs = self._call(self._client.ListRuns, ListRunsRequest()).run_dict
        return tuple(sorted((run for run, found in runs.items() if found.status.status != "finished"), reverse=True))

    def submit(self, run_config: Mapping[str, str]) -> int:
        """Start a run of the installed ``server.app`` with ``run_config``; its id.

        Raises:
            ControlRefused: the SuperLink did not take it.
        """
        request = StartRunRequest(
            fab=fab_to_proto(_build(_BUNDLE)), override_config=user_config_to_proto(dict(run_config)), federation=""
        )
        return int(self._call(self._client.StartRun, request).run_id)

    def status(self, run_id: int) -> RunStatus:
        """Where the run stands.

        Raises:
            ControlRefused: no such run, or no answer.
        """
        runs = self._call(self._client.ListRuns, ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in runs:
            raise ControlRefused(f"SuperLink {self._address}: no run {run_id}")
        status = runs[run_id].status
        return RunStatus(phase=status.status, outcome=status.sub_status, details=status.details)

    def stop(self, run_id: int) -> None:
        """End the run.

        Raises:
            ControlRefused: it is over already, or no answer.
        """
        self._call(self._client.StopRun, StopRunRequest(run_id=run_id))

    def logs(self, run_id: int) -> Iterator[str]:
        """What the run's ServerApp logs, as it comes, until the run is over.

        Raises:
            ControlRefused: the SuperLink ended first, or does not answer.
        """
        try:
            for part in self._client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=0.0)):
                yield part.log_output
        except httpx.HTTPError as error:
            raise ControlRefused(f"SuperLink {self._address}: {error or type(error).__name__}") from error

    def _call(self, method: Any, request: object) -> Any:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            reason = FlowerError.from_json(error.response.text)
            text = reason.message if reason else f"HTTP {error.response.status_code} for {error.request.url.path}"
            raise ControlRefused(f"SuperLink {self._address}: {text}") from error
        except httpx.TransportError as error:
            refused = NoAnswer if isinstance(error, httpx.TimeoutException) else ControlRefused
            raise refused(f"SuperLink {self._address}: {error or type(error).__name__}") from error


def _node_key(text: str, *, what: str) -> ec.EllipticCurvePublicKey:
    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise DocumentRefused(f"{what}: not an OpenSSH public key ({error})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DocumentRefused(f"{what}: Flower takes NIST elliptic curves only")
    return key


def _openssh(public_key: bytes) -> str:
    """A public key as the SuperLink keeps it, in the form in which partners write it."""
    key: ec.EllipticCurvePublicKey = bytes_to_public_key(public_key)
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _build(files: Mapping[str, bytes]) -> Fab:
    """``files`` as Flower's app bundle."""
    with warnings.catch_warnings():
        # flwr 1.41 calls pathspec by a name that pathspec 1.0 deprecates; nobody here can act on it.
        warnings.filterwarnings("ignore", message="GitWildMatchPattern", category=DeprecationWarning)
        content, _ = build_fab_from_files(files)
    return Fab(hashlib.sha256(content).hexdigest(), content, {})


class _Bearer:
    """Adds the admin token to each request."""

    def __init__(self, token: bytes) -> None:
        self._value = "Bearer " + token.decode("ascii")

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers["authorization"] = self._value
        return call_next(context)
