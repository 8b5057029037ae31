"""What server/ takes from flwr's private modules. A failure means: read the new flwr, then raise the pin."""

import dataclasses
import hashlib
import inspect

import pytest
from fastapi import FastAPI
from flwr.cli.build import build_fab_from_files
from flwr.common import serde
from flwr.common.constant import Status, SubStatus
from flwr.proto import control_pb2, message_pb2, runtime_pb2
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.server.superlink.linkstate.linkstate_factory import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from flwr.superlink.routers.fleet import node_auth

from server import control, flower_state, superlink


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (ControlHttpClient.from_server_address, "server_address insecure root_certificates interceptors retry_invoker"),
        (ControlHttpClient.RegisterNode, "self request"),
        (ControlHttpClient.UnregisterNode, "self request"),
        (ControlHttpClient.ListNodes, "self request"),
        (ControlHttpClient.StartRun, "self request"),
        (ControlHttpClient.ListRuns, "self request"),
        (ControlHttpClient.StopRun, "self request"),
        (ControlHttpClient.StreamLogs, "self request"),
        (RuntimeHttpClient.PullMessages, "self request"),
        (RuntimeHttpClient.PullObject, "self request"),
        (RuntimeHttpClient.ConfirmMessageReceived, "self request"),
        (HttpGrid.__init__, "self runtime_api_address insecure root_certificates token"),
        (create_app, "config superlink_lifespan_class"),
        (SuperLinkLifespan.__init__, "self config state_factory"),
        (InMemoryObjectStore.preregister, "self run_id object_tree"),
        (InMemoryLinkState.__init__, "self federation_manager object_store"),
        (InMemoryLinkState.store_message_and_object_tree, "self message object_tree session_id"),
        (build_fab_from_files, "files"),
        (serde.fab_to_proto, "fab"),
        (serde.user_config_to_proto, "user_config"),
    ],
)
def test_a_private_call_has_kept_its_signature(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters.split()


def test_the_superlinks_state_is_ours_from_its_first_request_on():
    stores = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(simulation=False), stores)
    before = factory.state()
    flower_state.LeafLifespan(None, factory)
    assert isinstance(factory.state(), flower_state.LeafState)
    assert factory.state() is factory.federation_manager.linkstate is not before
    assert factory.state().object_store is stores.store()
    assert isinstance(stores.store(), flower_state.LeafStore)


def test_the_superlinks_settings_are_those_that_were_read():
    assert [field.name for field in dataclasses.fields(SuperLinkLifespanConfig)] == [
        *("control_address", "health_server_address", "host", "port", "insecure", "certificates"),
        *("superexec_auth_secret", "authn_plugin", "event_log_plugin", "fleet_event_log_plugin", "enable_event_log"),
        *("artifact_provider", "enable_supernode_auth", "fleet_api_type", "fleet_api_address", "simulation"),
        *("ssl_ca_certfile", "ssl_certfile", "ssl_keyfile", "database", "isolation", "runtime_dependency_install"),
    ]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (control_pb2.RegisterNodeRequest, "public_key name"),
        (control_pb2.UnregisterNodeRequest, "node_id"),
        (runtime_pb2.PullAppMessagesRequest, "message_ids"),
        (message_pb2.ConfirmMessageReceivedRequest, "node run_id message_object_id"),
    ],
)
def test_a_request_still_has_the_fields_that_are_set(kind, fields):
    assert set(fields.split()) <= {field.name for field in kind.DESCRIPTOR.fields}


def test_a_grid_still_makes_its_client_on_demand():
    assert isinstance(inspect.getattr_static(HttpGrid, "_runtime_client"), property)


def test_the_bundle_holds_no_code_of_its_own_and_flower_takes_it():
    assert len(control._build(control._BUNDLE).content) < 10_000
    for name in ("run_of_fedgrade.py", "site_of_fedgrade.py"):
        assert control._BUNDLE[name].decode().splitlines()[0].startswith("from ")


def test_a_run_still_ends_in_the_words_that_are_read():
    assert (Status.FINISHED, SubStatus.COMPLETED) == ("finished", "completed")


def test_layers_are_left_out_by_name_and_new_ones_stay_in():
    app = FastAPI()
    for layer in (*superlink._IDLE_FOR_RUNS, str):
        app.add_middleware(layer)
    assert [layer.cls for layer in superlink._without(app, superlink._IDLE_FOR_RUNS).user_middleware] == [str]
    assert len(app.user_middleware) == len(superlink._IDLE_FOR_RUNS) + 1


def test_every_fleet_request_still_names_its_node_or_its_key():
    fleet = {path: kind for (_, path), kind in PROTOBUF_REQUEST_TYPES.items() if path.startswith("/v1/fleet/")}
    assert len(fleet) == 12
    for kind in fleet.values():
        fields = {field.name for field in kind.DESCRIPTOR.fields}
        assert fields & {"node", "node_id", "public_key"}, kind


def test_flower_still_authenticates_nodes_by_what_is_checked_here_in_its_place():
    # A new check there must come here too.
    source = inspect.getsource(node_auth.authenticate_node)
    assert hashlib.sha256(source.encode()).hexdigest()[:16] == "f8e66372d61b3653"
