import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedgrade.errors import DocumentRefused
from server.certificates import certify, create_node_key

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_certificate_names_public_hosts_and_loopback_and_is_signed_by_the_authority(tmp_path):
    files = certify(tmp_path, ["superlink.example.org", "192.0.2.7", "2001:db8::7"], now=NOW)
    server, authority = certificate(files.certificate), certificate(files.authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"superlink.example.org", "localhost"}
    assert {str(address) for address in names.get_values_for_type(x509.IPAddress)} == {
        "192.0.2.7",
        "2001:db8::7",
        "127.0.0.1",
    }
    server.verify_directly_issued_by(authority)


def test_private_keys_are_for_their_owner_alone(tmp_path):
    certify(tmp_path / "pki", [], now=NOW)
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tmp_path / "pki" / name).stat().st_mode) == 0o600


def test_asking_again_changes_nothing(tmp_path):
    certify(tmp_path, ["a.example"], now=NOW)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    certify(tmp_path, ["a.example"], now=NOW + timedelta(days=300))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("hosts", "later"), [(["b.example"], 1), (["a.example"], 380)])
def test_a_certificate_that_no_longer_fits_is_renewed_with_the_same_keys(tmp_path, hosts, later):
    files = certify(tmp_path, ["a.example"], now=NOW)
    before = {name: (tmp_path / name).read_bytes() for name in ("ca.key", "server.key", "ca.pem", "server.pem")}
    certify(tmp_path, hosts, now=NOW + timedelta(days=later))
    after = {name: (tmp_path / name).read_bytes() for name in before}
    assert {name for name in before if before[name] != after[name]} == {"server.pem"}
    certificate(files.certificate).verify_directly_issued_by(certificate(files.authority))


@pytest.mark.parametrize("content", [b"", b"not a key"])
def test_a_broken_key_is_refused_and_kept(tmp_path, content):
    (tmp_path / "ca.key").touch(0o600)
    (tmp_path / "ca.key").write_bytes(content)
    with pytest.raises(DocumentRefused, match=r"ca\.key"):
        certify(tmp_path, [], now=NOW)
    assert (tmp_path / "ca.key").read_bytes() == content


@pytest.mark.parametrize("host", ["", "bücher.example"])
def test_a_host_that_no_certificate_can_name_is_refused(tmp_path, host):
    with pytest.raises(DocumentRefused, match="host"):
        certify(tmp_path, [host], now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_a_node_key_is_made_once(tmp_path):
    public = create_node_key(tmp_path / "node")
    private = serialization.load_ssh_private_key((tmp_path / "node").read_bytes(), None)
    assert serialization.load_ssh_public_key(public.read_bytes()) == private.public_key()
    with pytest.raises(DocumentRefused, match="not overwritten"):
        create_node_key(tmp_path / "node")
