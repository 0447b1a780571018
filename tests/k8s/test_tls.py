"""TLS: the certificate that a pod makes, whom it is believed by and for how long, and Ray's processes under it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from manifests import K8S

TLS = """
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
import os, socket, ssl
host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
context = ssl.create_default_context(cafile=os.environ["RAY_TLS_CA_CERT"])
with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as talk:
    print("SPEAKS", talk.version(), dict(pair[0] for pair in talk.getpeercert()["subject"])["commonName"])
print("ANSWER", ray.get(ray.remote(lambda: 6 * 7).remote()), flush=True)
"""


@pytest.mark.xdist_group("ray")
def test_rays_processes_talk_under_the_certificates_that_a_pod_makes(tmp_path):
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    ca, out = tmp_path / "ca", tmp_path / "tls"
    ca.mkdir()
    out.mkdir()
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedray-ca")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
    )
    made = (
        made.not_valid_after(now + datetime.timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (ca / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (ca / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    import ray._private.services as services

    address = services.get_node_ip_address()
    subprocess.run(
        [sys.executable, str(K8S / "components/tls/certify.py"), str(ca), str(out)],
        env=os.environ | {"POD_IP": address},
        check=True,
    )
    assert (out / "tls.key").stat().st_mode & 0o077 == 0
    leaf = x509.load_pem_x509_certificate((out / "tls.crt").read_bytes())
    leaf.verify_directly_issued_by(made)
    env = os.environ | {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(out / "tls.crt"),
        "RAY_TLS_SERVER_KEY": str(out / "tls.key"),
        "RAY_TLS_CA_CERT": str(out / "ca.crt"),
    }
    done = subprocess.run(
        [sys.executable, "-c", TLS], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert "ANSWER 42" in done.stdout and "SPEAKS TLSv1.3 fedray-node" in done.stdout, done.stdout + done.stderr
