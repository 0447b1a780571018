"""A certificate for this pod, signed by an authority: what Ray's RAY_TLS_ variables point to.

    python certify.py [--head] [--name NAME] [--days 30] [--every DAYS] [--trust FILE] [--out /tls]

Ray reads its certificate when a process starts and checks the address that it speaks to. So each pod makes one for its
own address before Ray starts, and is replaced before the certificate ends (the manifests' activeDeadlineSeconds).
Beside Redis, which can read a new one while it runs, it stays and makes one from time to time (`--every`).
"""

import argparse
import datetime
import ipaddress
import os
import socket
import sys
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM
DAY = 86400  # seconds


class Refused(Exception):
    """No certificate is made, and why: a sentence for the one who runs the cluster."""


def trusted(authority: x509.Certificate, trust: Path | None) -> bytes:
    """PEM of the authorities that this pod believes: those of the file `trust`, or its own alone.

    Raises Refused where its own is not among them: nobody would believe what it signs."""
    if trust is None:
        return authority.public_bytes(PEM)
    bundle = trust.read_bytes()
    own = (authority.subject, authority.public_key())
    if own not in [(c.subject, c.public_key()) for c in x509.load_pem_x509_certificates(bundle)]:
        raise Refused(
            f"{trust} lacks this pod's own authority ({authority.subject.rfc4514_string()}): add its certificate to "
            "the config map fedray-trust"
        )
    return bundle


def leaf(authority: x509.Certificate, secret, key, names: list[x509.GeneralName], days: int) -> x509.Certificate:
    """A certificate over `key` for a node of Ray's, which is server and client, for so many days from now.

    Raises Refused where the authority ends before it: the pod would outlive what it is believed by."""
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    if authority.not_valid_after_utc < end:
        raise Refused(
            f"the authority ends on {authority.not_valid_after_utc:%Y-%m-%d}, before this pod's certificate would "
            f"({end:%Y-%m-%d}): renew it over the same key (k8s/README.md, TLS)"
        )
    refused = "content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    usage = dict.fromkeys([*refused.split(), "encipher_only", "decipher_only"], False)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedray-node")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(_issuer(authority), critical=False)
        .sign(secret, hashes.SHA256())
    )


def _issuer(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """The authority's key as it is called in its own certificate: there are several ways to make that name."""
    try:
        named = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(named.value)


def own_names(address: str, called: list[str]) -> list[x509.GeneralName]:
    """What this pod is called: its addresses, its host's name, and further names."""
    names = ["localhost", socket.gethostname(), *called]
    addresses = ["127.0.0.1", address]
    return [*map(x509.DNSName, names), *(x509.IPAddress(ipaddress.ip_address(a)) for a in addresses)]


def certify(args: argparse.Namespace) -> None:
    """Write ca.crt, tls.crt and tls.key (P-256) to the folder `args.out`, or raise Refused and write nothing."""
    authority = x509.load_pem_x509_certificate((args.authority / "tls.crt").read_bytes())
    secret = serialization.load_pem_private_key((args.authority / "tls.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    # A worker whose certificate held the service's name could stand for the head. The operator gives the name to both.
    names = own_names(os.environ["POD_IP"], [*args.name, *([os.environ["FQ_RAY_IP"]] if args.head else [])])
    believed, made = trusted(authority, args.trust), leaf(authority, secret, key, names, args.days)
    (args.out / "ca.crt").write_bytes(believed)
    (args.out / "tls.crt").write_bytes(made.public_bytes(PEM))
    # A container that is started again finds the files of its first start.
    handle = os.open(args.out / "tls.key", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


def main(argv: list[str]) -> int:
    """See the module's docstring; 1 where it refuses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--authority", type=Path, default=Path("/tls-ca"), help="a folder with tls.crt and tls.key")
    parser.add_argument("--trust", type=Path, help="certificates of all parties' authorities, where each has its own")
    parser.add_argument("--out", type=Path, default=Path("/tls"))
    parser.add_argument("--days", type=int, default=30, help="how long the certificate lasts")
    parser.add_argument("--every", type=int, metavar="DAYS", help="stay, and make a new one after so many days")
    parser.add_argument("--name", action="append", default=[], help="a further name of this pod")
    parser.add_argument("--head", action="store_true", help="the service's name too, which the operator gives")
    args = parser.parse_args(argv)
    try:
        certify(args)
        while args.every:
            time.sleep(args.every * DAY)
            certify(args)
    except Refused as why:
        print(why, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
