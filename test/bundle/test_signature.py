"""A bundle is signed with keys as openssl makes them, and whatever is no such key is said in a line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st
from kit.confined import run_python
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.signature import SIGNATURE_SIZE, PrivateKey, PublicKey

Key = ed25519.Ed25519PrivateKey | x25519.X25519PrivateKey | ec.EllipticCurvePrivateKey

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not there")


def private_pem(key: Key, encryption: KeySerializationEncryption | None = None) -> bytes:
    """As `openssl genpkey` writes it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())


def public_pem(key: Key) -> bytes:
    """As `openssl pkey -pubout` writes it."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


ED25519 = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KINDS = (x25519.X25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1()))
PRIVATE, PUBLIC = PrivateKey(ED25519.private_bytes_raw()), PublicKey(ED25519.public_key().public_bytes_raw())


def _refusal(load: type[PrivateKey] | type[PublicKey], path: Path, data: bytes | None) -> str:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        load.load(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


@needs_openssl
def test_keys_of_openssl_sign_and_check(tmp_path: Path) -> None:
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    signature = PrivateKey.load(private).sign(b"a manifest")
    assert len(signature) == SIGNATURE_SIZE
    PublicKey.load(public).check(b"a manifest", signature)


@needs_openssl
def test_openssl_can_check_a_signature(tmp_path: Path) -> None:
    (tmp_path / "public.pem").write_bytes(public_pem(ED25519))
    (tmp_path / "manifest.json").write_bytes(b"a manifest")
    (tmp_path / "manifest.sig").write_bytes(PRIVATE.sign(b"a manifest"))
    command = "openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in manifest.json -sigfile manifest.sig"
    subprocess.run(command.split(), cwd=tmp_path, check=True)


def test_keys_are_read_from_pem(tmp_path: Path) -> None:
    (tmp_path / "private.pem").write_bytes(private_pem(ED25519))
    (tmp_path / "public.pem").write_bytes(public_pem(ED25519))
    assert PrivateKey.load(tmp_path / "private.pem") == PRIVATE
    assert PublicKey.load(tmp_path / "public.pem") == PUBLIC


def test_a_private_key_is_not_printed() -> None:
    assert repr(PRIVATE) == "PrivateKey()"


@given(st.binary(), st.data())
def test_a_signature_is_of_these_bytes_and_by_this_key(manifest: bytes, data: st.DataObject) -> None:
    signature = PRIVATE.sign(manifest)
    PUBLIC.check(manifest, signature)
    other = data.draw(st.binary().filter(lambda drawn: drawn != manifest))
    forged = data.draw(st.binary(max_size=80).filter(lambda drawn: drawn != signature))
    stranger = PublicKey(data.draw(st.binary(max_size=40).filter(lambda drawn: drawn != PUBLIC.raw)))
    for key, signed, by in ((PUBLIC, other, signature), (PUBLIC, manifest, forged), (stranger, manifest, signature)):
        with pytest.raises(BundleError, match="its signature is not by this key"):
            key.check(signed, by)


def test_a_private_key_is_refused_in_a_line_if_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    making = "openssl genpkey -algorithm ed25519"
    encrypted = private_pem(ED25519, BestAvailableEncryption(b"secret"))
    assert _refusal(PrivateKey, path, None).startswith(f"the key {path} cannot be read (No such file or directory)")
    assert f"{path} is no private key in PEM: make one with: {making}" in _refusal(PrivateKey, path, b"hello")
    assert f"{path} is encrypted: decrypt it with: openssl pkey" in _refusal(PrivateKey, path, encrypted)
    assert f"{path} has a public key, and the private one is wanted" in _refusal(PrivateKey, path, public_pem(ED25519))
    for other in OTHER_KINDS:
        assert "not of Ed25519: make one with:" in _refusal(PrivateKey, path, private_pem(other))
    assert "is no key: it has more than 65536 bytes" in _refusal(PrivateKey, path, bytes(70_000))
    assert "cannot be read (Is a directory)" in _refusal(PrivateKey, tmp_path, None)


def test_a_public_key_is_refused_in_a_line_if_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    getting = "get it from the private key with: openssl pkey -pubout"
    assert _refusal(PublicKey, path, None).startswith(f"the key {path} cannot be read (No such file or directory)")
    assert f"{path} is no public key in PEM: {getting}" in _refusal(PublicKey, path, b"hello")
    assert f"the public one is wanted: {getting}" in _refusal(PublicKey, path, private_pem(ED25519))
    encrypted = private_pem(ED25519, BestAvailableEncryption(b"secret"))
    assert f"the public one is wanted: {getting}" in _refusal(PublicKey, path, encrypted)
    for other in OTHER_KINDS:
        assert "not of Ed25519: make one with:" in _refusal(PublicKey, path, public_pem(other))
    assert "is no key: it has more than 65536 bytes" in _refusal(PublicKey, path, bytes(70_000))


@given(st.binary(max_size=200), st.sampled_from([private_pem(ED25519), public_pem(ED25519)]), st.integers(0, 120))
def test_a_damaged_key_is_a_key_or_refused(
    tmp_path_factory: pytest.TempPathFactory, insert: bytes, pem: bytes, at: int
) -> None:
    path = tmp_path_factory.mktemp("keys") / "key.pem"
    path.write_bytes(pem[:at] + insert + pem[at + len(insert) :])
    for load in (PrivateKey, PublicKey):
        try:
            assert len(load.load(path).raw) == 32
        except BundleError as error:
            assert str(error).isprintable()


def test_without_cryptography_it_is_said_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "private.pem").write_bytes(private_pem(ED25519))
    (tmp_path / "public.pem").write_bytes(public_pem(ED25519))
    code = """
import sys
from pathlib import Path
sys.modules["cryptography"] = None  # as if it were not installed
from sglang_warmstart.bundle.manifest import BundleError
from sglang_warmstart.bundle.signature import PrivateKey, PublicKey
directory = Path(sys.argv[1])
for call in (
    lambda: PrivateKey.load(directory / "private.pem"),
    lambda: PublicKey.load(directory / "public.pem"),
    lambda: PrivateKey(bytes(32)).sign(b""),
    lambda: PublicKey(bytes(32)).check(b"", bytes(64)),
):
    try:
        call()
    except BundleError as error:
        print(error)
"""
    line = "signatures need the package cryptography: pip install 'sglang-warmstart[sign]'\n"
    assert run_python(code, str(tmp_path)) == 4 * line
