import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.node_key import create_node_key, load_node_key
from fedgrade.errors import DocumentRefused


def test_a_key_comes_back_as_it_was_made(tmp_path):
    public = create_node_key(tmp_path / "keys" / "node")
    key = load_node_key(tmp_path / "keys" / "node")
    assert serialization.load_ssh_public_key(public.read_bytes()) == key.public_key()
    assert (key.curve.name, stat.S_IMODE((tmp_path / "keys" / "node").stat().st_mode)) == ("secp384r1", 0o600)


def test_an_existing_key_is_not_overwritten(tmp_path):
    (tmp_path / "node").write_text("mine")
    with pytest.raises(DocumentRefused, match="not overwritten"):
        create_node_key(tmp_path / "node")
    assert (tmp_path / "node").read_text() == "mine"


def test_a_key_that_others_may_read_is_refused(tmp_path):
    create_node_key(tmp_path / "node")
    (tmp_path / "node").chmod(0o640)
    with pytest.raises(DocumentRefused, match="chmod 600"):
        load_node_key(tmp_path / "node")


@pytest.mark.parametrize("content", [b"", b"-----BEGIN OPENSSH PRIVATE KEY-----\n", b"\xff" * 100])
def test_anything_but_a_key_is_refused(tmp_path, content):
    (tmp_path / "node").touch(0o600)
    (tmp_path / "node").write_bytes(content)
    with pytest.raises(DocumentRefused, match="not an unencrypted OpenSSH private key"):
        load_node_key(tmp_path / "node")


def test_a_missing_key_is_one_clear_error(tmp_path):
    with pytest.raises(DocumentRefused, match="No such file"):
        load_node_key(tmp_path / "node")


def test_an_ed25519_key_is_refused_because_flower_refuses_it(tmp_path):
    (tmp_path / "node").touch(0o600)
    (tmp_path / "node").write_bytes(
        Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
    )
    with pytest.raises(DocumentRefused, match="NIST elliptic curves only"):
        load_node_key(tmp_path / "node")
