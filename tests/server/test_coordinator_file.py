"""What ``coordinator.yaml`` may say of a database; no server is needed to know."""

from dataclasses import replace

import pytest

from fedgrade.errors import DocumentRefused
from server.coordinator_file import read_settings, settings_yaml
from tests.server.test_enrolment import SETTINGS


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://fed@db.example/fed",
        "postgresql://fed@db.example:5433/fed?sslmode=verify-full&sslrootcert=/etc/fed/ca.pem",
        "postgresql://one.example,two.example:5433/fed?target_session_attrs=read-write",
        "postgresql://fed@/fed?host=/run/postgresql",
        "postgresql://fed@localhost/fed?sslmode=disable",
        "postgresql://fed@[::1]:5432/fed?sslmode=disable",
        "postgresql:///?service=fedgrade",
    ],
)
def test_settings_take_an_address_without_secrets(address, tmp_path):
    (tmp_path / "coordinator.yaml").write_text(settings_yaml(replace(SETTINGS, database=address)))
    assert read_settings(tmp_path).database == address


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("postgresql://fed:hidden@db.example/fed", "holds a password; .*PGPASSFILE"),
        ("postgresql://fed:hi/dd@en@db.example/fed", "holds a password"),
        ("postgresql://fed@db.example/fed?password=hidden", "holds a password"),
        ("postgresql://fed@db.example/fed?sslpassword=hidden", "holds a password"),
        ("postgresql://fed@db.example/fed?sslmode=require", "sslmode 'require' lets others listen"),
        ("postgresql://fed@127.0.0.1,db.example/fed?sslmode=disable", "lets others listen"),
        ("postgresql://fed@/fed?host=db.example&sslmode=prefer", "lets others listen"),
        ("postgresql:///?service=fedgrade&sslmode=disable", "lets others listen"),
        ("postgresql://fed@db.example/fed?options=-csearch_path", "option 'options' is none of"),
        ("postgresql://fed@db.example/fed?sslmode=verify-full&sslmode=disable", "an option appears twice"),
        ("mysql://fed@db.example/fed", "neither files nor like postgresql://"),
        ("postgresql://fed@db.example/fed\nhost: evil", "neither files nor"),
        ("", "neither files nor"),
    ],
)
def test_settings_refuse_an_address_that_holds_secrets_or_lets_others_listen(address, why):
    with pytest.raises(DocumentRefused, match=f"coordinator.database: .*{why}") as caught:
        replace(SETTINGS, database=address)
    assert "hidden" not in str(caught.value)
