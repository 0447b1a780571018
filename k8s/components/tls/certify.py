"""A certificate for this pod, signed by the authority under /tls-ca: what Ray's RAY_TLS_ variables point to."""

import datetime
import ipaddress
import os
import socket
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def main(authority: Path, out: Path, address: str, days: int = 30) -> None:
    """Write ca.crt, tls.crt and tls.key (P-256) to `out`. `authority`: a folder with tls.crt and tls.key. Ray checks
    the address."""
    signer = x509.load_pem_x509_certificate((authority / "tls.crt").read_bytes())
    secret = serialization.load_pem_private_key((authority / "tls.key").read_bytes(), None)
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    names = [
        x509.DNSName("localhost"),
        x509.DNSName(socket.gethostname()),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        x509.IPAddress(ipaddress.ip_address(address)),
    ]
    if service := os.environ.get("FQ_RAY_IP"):  # the operator's name of the head's service
        names.append(x509.DNSName(service))
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedray-node")]))
        .issuer_name(signer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(secret, hashes.SHA256())
    )
    (out / "ca.crt").write_bytes((authority / "tls.crt").read_bytes())
    (out / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    handle = os.open(out / "tls.key", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


if __name__ == "__main__":
    main(
        Path(sys.argv[1] if len(sys.argv) > 1 else "/tls-ca"),
        Path(sys.argv[2] if len(sys.argv) > 2 else "/tls"),
        os.environ["POD_IP"],
    )
