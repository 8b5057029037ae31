"""What clients/fleet.py takes from flwr's private modules. A failure means: read the new flwr, then raise the pin."""

import inspect
from importlib.metadata import version

import httpx
import pytest
from flwr.app import ConfigRecord
from flwr.app.message import remove_content_from_message
from flwr.common import constant
from flwr.common.constant import ErrorCode
from flwr.proto import fleet_pb2, heartbeat_pb2
from flwr.supercore.inflatable import inflatable_object, inflatable_protobuf_utils, inflatable_utils
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient

from clients import fleet, link, node


def test_flwr_is_the_version_that_was_read():
    assert version("flwr").split(".")[:2] == ["1", "41"]


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (FleetHttpClient.from_server_address, "server_address insecure root_certificates interceptors retry_invoker"),
        (FleetHttpClient.ActivateNode, "self request"),
        (FleetHttpClient.DeactivateNode, "self request"),
        (FleetHttpClient.SendNodeHeartbeat, "self request"),
        (FleetHttpClient.PullMessages, "self request"),
        (FleetHttpClient.PushMessages, "self request"),
        (FleetHttpClient.PullObject, "self request"),
        (FleetHttpClient.PushObject, "self request"),
        (FleetHttpClient.ConfirmMessageReceived, "self request"),
        (RuntimeVersionHttpInterceptor.__init__, "self component_name"),
        (inflatable_object.get_all_nested_objects, "obj"),
        (inflatable_object.get_object_id, "object_content"),
        (inflatable_object.get_object_tree, "obj"),
        (inflatable_object.no_object_id_recompute, ""),
        (inflatable_protobuf_utils.make_pull_object_fn_protobuf, "pull_object_protobuf node run_id"),
        (inflatable_protobuf_utils.make_push_object_fn_protobuf, "push_object_protobuf node run_id session_id"),
        (
            inflatable_protobuf_utils.make_confirm_message_received_fn_protobuf,
            "confirm_message_received_protobuf node run_id",
        ),
        (
            inflatable_utils.pull_objects,
            "object_ids pull_object_fn max_concurrent_pulls max_time max_tries_per_object initial_backoff backoff_cap",
        ),
        (
            inflatable_utils.push_object_contents_from_iterable,
            "object_contents push_object_fn max_concurrent_pushes",
        ),
        (remove_content_from_message, "message"),
        (ConfigRecord.inflate, "object_content children"),
    ],
)
def test_a_private_call_has_kept_its_signature(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters.split()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (fleet_pb2.ActivateNodeRequest, "public_key heartbeat_interval"),
        (fleet_pb2.DeactivateNodeRequest, "node_id"),
        (heartbeat_pb2.SendNodeHeartbeatRequest, "node heartbeat_interval"),
    ],
)
def test_a_request_has_kept_its_fields(kind, fields):
    assert {field.name for field in kind.DESCRIPTOR.fields} == set(fields.split())


def test_the_http_client_can_be_told_not_to_follow_redirects():
    client = FleetHttpClient("https://127.0.0.1:1")
    assert isinstance(client._client, httpx.Client)
    client.close()


def test_flower_still_takes_the_heartbeats_that_a_site_may_configure():
    assert constant.HEARTBEAT_MIN_INTERVAL == link._MIN_HEARTBEAT_SECONDS
    assert constant.HEARTBEAT_MAX_INTERVAL == link._MAX_HEARTBEAT_SECONDS
    assert ErrorCode.CLIENT_APP_RAISED_EXCEPTION == 2


def test_no_app_bundle_is_ever_asked_for():
    source = inspect.getsource(fleet) + inspect.getsource(node)
    assert "GetFabRequest" not in source
    assert ".GetFab(" not in source
