"""Sign and check bundles: an Ed25519 signature over the manifest, which has the SHA-256 of everything else.

Keys are PEM files as ``openssl genpkey -algorithm ed25519`` and ``openssl pkey -pubout`` write them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sglang_warmstart.bundle.manifest import BundleError

SIGNATURE_SIZE = 64  # bytes
_KEY_FILE_LIMIT = 1 << 16  # bytes
_INSTALL = "signatures need the package cryptography: pip install 'sglang-warmstart[sign]'"
_NEW_KEY = "make one with: openssl genpkey -algorithm ed25519"
_PUBLIC_OF = "get it from the private key with: openssl pkey -pubout"


@dataclass(frozen=True)
class PublicKey:
    """Tells whether a bundle was signed by the owner of the private key.

    Args:
        raw: its 32 bytes.
    """

    raw: bytes

    @classmethod
    def load(cls, path: Path) -> PublicKey:
        """The key in a PEM file.

        Raises:
            BundleError: it cannot be read, or is no public Ed25519 key; or ``cryptography`` is not installed.
        """
        data = _read(path)
        if b"PRIVATE KEY-----" in data:
            raise BundleError(f"{path} has a private key, and the public one is wanted: {_PUBLIC_OF}")
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
            from cryptography.hazmat.primitives.serialization import load_pem_public_key
        except ImportError as error:
            raise BundleError(_INSTALL) from error
        try:
            key = load_pem_public_key(data)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise BundleError(f"{path} is no public key in PEM: {_PUBLIC_OF}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise BundleError(f"{path} has a public key that is not of Ed25519: {_NEW_KEY}")
        return cls(key.public_bytes_raw())

    def check(self, manifest: bytes, signature: bytes) -> None:
        """See whether these bytes were signed with the private key.

        Raises:
            BundleError: they were not; or ``cryptography`` is not installed.
        """
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        except ImportError as error:
            raise BundleError(_INSTALL) from error
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, manifest)
        except (InvalidSignature, ValueError) as error:
            raise BundleError("its signature is not by this key: it was changed, or somebody else signed it") from error


@dataclass(frozen=True)
class PrivateKey:
    """Signs bundles.

    Args:
        raw: its 32 bytes, the seed.
    """

    raw: bytes = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """The key in a PEM file that is not encrypted.

        Raises:
            BundleError: it cannot be read, or is no private Ed25519 key, or is encrypted; or ``cryptography`` is not
                installed.
        """
        data = _read(path)
        if b"-----BEGIN PUBLIC KEY-----" in data:
            raise BundleError(f"{path} has a public key, and the private one is wanted: {_NEW_KEY}")
        try:
            from cryptography.exceptions import UnsupportedAlgorithm
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
        except ImportError as error:
            raise BundleError(_INSTALL) from error
        try:
            key = load_pem_private_key(data, password=None)
        except TypeError as error:
            raise BundleError(f"{path} is encrypted: decrypt it with: openssl pkey -in {path}") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise BundleError(f"{path} is no private key in PEM: {_NEW_KEY}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise BundleError(f"{path} has a private key that is not of Ed25519: {_NEW_KEY}")
        return cls(key.private_bytes_raw())

    @property
    def public_key(self) -> PublicKey:
        """What tells its signatures from others.

        Raises:
            BundleError: ``cryptography`` is not installed.
        """
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        except ImportError as error:
            raise BundleError(_INSTALL) from error
        return PublicKey(Ed25519PrivateKey.from_private_bytes(self.raw).public_key().public_bytes_raw())

    def sign(self, manifest: bytes) -> bytes:
        """The signature of these bytes: 64 bytes.

        Raises:
            BundleError: ``cryptography`` is not installed.
        """
        try:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        except ImportError as error:
            raise BundleError(_INSTALL) from error
        return Ed25519PrivateKey.from_private_bytes(self.raw).sign(manifest)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_KEY_FILE_LIMIT + 1)
    except OSError as error:
        raise BundleError(f"the key {path} cannot be read ({error.strerror or error}): name a PEM file") from error
    if len(data) > _KEY_FILE_LIMIT:
        raise BundleError(f"{path} is no key: it has more than {_KEY_FILE_LIMIT} bytes: name a PEM file")
    return data
