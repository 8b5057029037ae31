"""The coordinator's SuperLink, hardened: one application behind two TLS listeners.

Public: ``/health`` and ``/v1/fleet/*`` (each request signed by an enrolled node key); everything else is 404. Admin, on
loopback: the Runtime API, which asks for the superexec secret and task tokens by itself, and with a bearer token
everything else. Stock Flower serves all of it on one port, its Control API without any authentication.

``python -m server.superlink --help``. Secrets come from files of mode 0600 and never from the command line, which any
user of the machine can read. flwr's modules used here are private API: tests/server/test_flwr_contract.py holds them.
"""

import argparse
import asyncio
import copy
import hmac
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NodeStatus
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.main import create_app
from flwr.superlink.routers.control.middlewares import (
    ControlAuthenticationMiddleware,
    ControlEventLogMiddleware,
    ControlLicenseMiddleware,
    ControlSensitiveResponseMiddleware,
)
from flwr.superlink.routers.fleet.middlewares import FleetEventLogMiddleware
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from starlette.middleware import Middleware

from fedgrade.logs import configure_logs
from fedgrade.memory import keep_large_buffers
from server.certificates import ServerCertificates
from server.connections import Watch
from server.enrolled_keys import EnrolledKeys
from server.flower_state import LeafLifespan
from server.held_polls import HeldPolls
from server.listener import GuardedServer, require_free
from server.live_certificate import follow_certificates
from server.metrics import Application, Metrics, Receive, Scope, Send
from server.node_identity import KeyOwnsNode
from server.private_files import read_private
from server.signed_requests import SignedRequests, declared_length
from server.slices import in_slices

# Nothing leaves the machine unless its operator asks: no telemetry, no update check, no package index.
QUIET: Final = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
PUBLIC_PATHS: Final = ("/health", "/v1/fleet/")
# These authenticate themselves: node signatures are not needed here, superexec secret and task tokens are.
ADMIN_PATHS_WITHOUT_TOKEN: Final = ("/health", "/v1/runtime/")
_SHUTDOWN_SECONDS: Final = 2
_TOO_LARGE: Final = 413
# More than half of a small request's time went through layers that look at its path and pass it on. Each of these
# acts on the other API's paths only, or on plugins that do not exist here.
_IDLE_LAYERS: Final = (
    ControlSensitiveResponseMiddleware,
    ControlLicenseMiddleware,
    ControlEventLogMiddleware,
    FleetEventLogMiddleware,
)
_IDLE_FOR_NODES: Final = (*_IDLE_LAYERS, ControlAuthenticationMiddleware)
_OURS_FOR_NODES: Final = {NodeAuthMiddleware: KeyOwnsNode}
_IDLE_FOR_RUNS: Final = (*_IDLE_LAYERS, ControlAuthenticationMiddleware, NodeAuthMiddleware)


@dataclass(frozen=True, kw_only=True)
class SuperLinkSettings:
    """What one SuperLink process needs.

    Attributes:
        public_host: interface on which partners reach it.
        public_port: port for partners.
        admin_port: port on 127.0.0.1 for the coordinator's own tools.
        certificates: TLS files of the public listener.
        admin_certificates: of the one on loopback, whose authority is its own: partners' may be replaced meanwhile.
        token_file: bearer token of the admin listener.
        superexec_secret_file: shared with ``flower-superexec``.
        progress: a line a finished stage of the run that is on, for the metrics.
    """

    public_host: str
    public_port: int
    admin_port: int
    certificates: ServerCertificates
    admin_certificates: ServerCertificates
    token_file: Path
    superexec_secret_file: Path
    progress: Path


def public_door(application: Application) -> Application:
    """``application`` as partners see it: two prefixes, bodies of bounded and declared size, the rest 404."""

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _below(scope["path"], PUBLIC_PATHS):
            await _refuse(scope, send, 404)
        elif scope["method"] not in {"GET", "HEAD"} and not _bounded(scope):
            await _refuse(scope, send, _TOO_LARGE)
        else:
            await application(scope, receive, send)

    return door


def admin_door(application: Application, token: bytes) -> Application:
    """``application`` behind ``Authorization: Bearer <token>``, apart from what authenticates itself."""
    expected = b"Bearer " + token

    async def door(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _below(scope["path"], ADMIN_PATHS_WITHOUT_TOKEN):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, expected):
                await _refuse(scope, send, 401)
                return
        elif scope["type"] == "websocket":
            await _refuse(scope, send, 404)
            return
        await application(scope, receive, send)

    return door


def run(settings: SuperLinkSettings) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        DocumentRefused: token or secret are missing or readable by others.
    """
    token = read_private(settings.token_file).strip()
    application = create_app(_lifespan_config(settings), LeafLifespan)
    runs, everything = _without(application, _IDLE_FOR_RUNS), application

    async def by_path(scope: Scope, receive: Receive, send: Send) -> None:
        chosen = runs if scope["type"] == "http" and scope["path"].startswith("/v1/runtime/") else everything
        await chosen(scope, receive, send)

    watch, polls = Watch(), HeldPolls()
    nodes = SignedRequests(
        polls.holding(_without(application, _IDLE_FOR_NODES, instead=_OURS_FOR_NODES)),
        EnrolledKeys(lambda: _enrolled(application)),
        on_known=watch.know,
    )
    metrics = Metrics(settings.progress)
    admin = uvicorn.Server(
        _listening(
            settings.admin_certificates,
            metrics.counted(admin_door(metrics.served(polls.noting(by_path)), token), listener="admin"),
            host="127.0.0.1",
            port=settings.admin_port,
        )
    )
    public = GuardedServer(
        _listening(
            settings.certificates,
            metrics.counted(public_door(nodes), listener="public"),
            host=settings.public_host,
            port=settings.public_port,
            # One lifespan owns the state that both listeners share.
            lifespan="off",
        ),
        watch,
    )

    # uvicorn's own choice, uvloop where it is installed: plain asyncio is several times slower at TLS.
    with asyncio.Runner(loop_factory=admin.config.get_loop_factory()) as runner:
        runner.run(_serve((settings.admin_certificates, admin), (settings.certificates, public)))


async def _serve(*listeners: tuple[ServerCertificates, uvicorn.Server]) -> None:
    """Both listeners, with certificates that may change, until a signal ends them."""
    for _, server in listeners:
        server.config.load()
    configs = [(files, server.config.ssl) for files, server in listeners]
    following = asyncio.create_task(follow_certificates([(files, ssl) for files, ssl in configs if ssl is not None]))
    await asyncio.gather(*(server.serve() for _, server in listeners))
    following.cancel()


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse ``arguments`` (the command line if None) and serve."""
    parser = argparse.ArgumentParser(prog="python -m server.superlink", description="fedgrade's SuperLink")
    parser.add_argument("--public-host", default="127.0.0.1", help="interface for partners")
    parser.add_argument("--public-port", type=int, required=True, help="port for partners")
    parser.add_argument("--admin-port", type=int, required=True, help="port on loopback for the coordinator")
    for name, meaning in (
        ("authority", "certificate of the private authority, PEM"),
        ("certificate", "the SuperLink's certificate, PEM"),
        ("key", "the SuperLink's private key, PEM, mode 0600"),
        ("admin-authority", "certificate of the admin listener's own authority, PEM"),
        ("admin-certificate", "the admin listener's certificate, PEM"),
        ("admin-key", "the admin listener's private key, PEM, mode 0600"),
        ("token-file", "bearer token of the admin listener, mode 0600"),
        ("superexec-secret-file", "secret shared with flower-superexec, mode 0600"),
        ("progress", "file with a line a finished stage of the run that is on, for /metrics"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, help=meaning)
    given = parser.parse_args(arguments)
    os.environ.update(QUIET)
    keep_large_buffers()
    # Flower says at INFO who came and what was begun; of all others, warnings are enough.
    configure_logs(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    # It has a handler of its own: coloured text, whatever format the environment asks for.
    logging.getLogger("flwr").handlers.clear()
    require_free(given.public_host, given.public_port)
    require_free("127.0.0.1", given.admin_port)
    run(
        SuperLinkSettings(
            public_host=given.public_host,
            public_port=given.public_port,
            admin_port=given.admin_port,
            certificates=ServerCertificates(authority=given.authority, certificate=given.certificate, key=given.key),
            admin_certificates=ServerCertificates(
                authority=given.admin_authority, certificate=given.admin_certificate, key=given.admin_key
            ),
            token_file=given.token_file,
            superexec_secret_file=given.superexec_secret_file,
            progress=given.progress,
        )
    )


def _lifespan_config(settings: SuperLinkSettings) -> SuperLinkLifespanConfig:
    files = settings.admin_certificates
    return SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host="127.0.0.1",
        port=settings.admin_port,
        insecure=False,
        certificates=(files.authority.read_bytes(), files.certificate.read_bytes(), read_private(files.key)),
        superexec_auth_secret=read_private(settings.superexec_secret_file),
        # The door in front of it has checked the token; Flower's own plugin lets everyone in.
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(files.authority),
        ssl_certfile=str(files.certificate),
        ssl_keyfile=str(files.key),
        database=FLWR_IN_MEMORY_DB_NAME,
        # Only with "process" does Flower ask the superexec for its secret.
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )


def _enrolled(application: FastAPI) -> tuple[bytes, ...]:
    """PEM of every node key that Flower takes now."""
    nodes = application.state.linkstate_factory.state().get_node_info()
    return tuple(node.public_key for node in nodes if node.status != NodeStatus.UNREGISTERED)


def _without(
    application: FastAPI, layers: Sequence[type], *, instead: Mapping[Any, Any] = MappingProxyType({})
) -> FastAPI:
    """The same routes and state behind fewer layers, some replaced. Those are named, so that new ones stay in."""
    idle: frozenset[object] = frozenset(layers)
    lean = copy.copy(application)
    lean.user_middleware = [
        Middleware(instead[layer.cls]) if layer.cls in instead else layer
        for layer in application.user_middleware
        if layer.cls not in idle
    ]
    if missing := set(instead) - {layer.cls for layer in application.user_middleware}:
        raise AssertionError(f"flwr has no layer {missing}: read the new flwr")
    return lean


def _listening(
    files: ServerCertificates, application: Application, *, host: str, port: int, lifespan: str = "on"
) -> uvicorn.Config:
    return uvicorn.Config(
        in_slices(application),
        host=host,
        port=port,
        lifespan=lifespan,  # type: ignore[arg-type]
        # At "warning" it writes a line for each request that is no HTTP: strangers could fill the disk.
        log_level="error",
        # Ours: its own writes text, whatever format the environment asks for.
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        ssl_keyfile=str(files.key),
        ssl_certfile=str(files.certificate),
    )


def _below(path: str, allowed: Sequence[str]) -> bool:
    return any(path == prefix or (prefix.endswith("/") and path.startswith(prefix)) for prefix in allowed)


def _bounded(scope: Scope) -> bool:
    """Whether the body declares a length within the limit; a body of unknown length is not read."""
    return declared_length(dict(scope["headers"]).get(b"content-length", b"")) is not None


async def _refuse(scope: Scope, send: Send, status: int) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-length", b"0")]
    if status == _TOO_LARGE:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


if __name__ == "__main__":
    main()
