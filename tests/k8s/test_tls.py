"""TLS: the certificate that a pod makes, whom it is believed by and for how long, and Ray's processes under it."""

from __future__ import annotations

import datetime
import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from manifests import certify

NOW = datetime.datetime.now(datetime.UTC)
ADDRESS, SERVICE = "10.1.2.3", "fedray-head-svc.fedray.svc.cluster.local"


def authority(
    folder: Path,
    name: str,
    days: int = 365,
    key: ec.EllipticCurvePrivateKey | None = None,
    called_key: bytes | None = None,
) -> Path:
    """A folder with an authority as the secret holds it. With `key` it is one that is renewed over its own.

    `called_key`: its subject key identifier, where it is not the usual SHA-1."""
    folder.mkdir()
    key = key or ec.generate_private_key(ec.SECP256R1())
    called = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usual = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    identifier = x509.SubjectKeyIdentifier(called_key) if called_key else usual
    made = (
        x509.CertificateBuilder()
        .subject_name(called)
        .issuer_name(called)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - datetime.timedelta(days=1))
        .not_valid_after(NOW + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "tls.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    return folder


def key_of(folder: Path) -> ec.EllipticCurvePrivateKey:
    return serialization.load_pem_private_key((folder / "tls.key").read_bytes(), None)


@pytest.fixture
def pod(tmp_path, monkeypatch):
    """pod(AUTHORITY, OPTION...) is a folder with the certificate that a pod makes at its start."""

    def start(signer: Path, *options: str, address: str = ADDRESS) -> Path:
        monkeypatch.setenv("POD_IP", address)
        monkeypatch.setenv("FQ_RAY_IP", SERVICE)  # the operator gives it to every init container
        out = tmp_path / f"pod-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        assert certify.main(["--authority", str(signer), "--out", str(out), *options]) == 0
        return out

    return start


def believe(server: Path, client: Path) -> bool:
    """Whether two pods agree to speak: each looks at the other's certificate, the client at the address too."""
    here, there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    here.verify_mode = ssl.CERT_REQUIRED
    for context, folder in ((here, server), (there, client)):
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        context.load_verify_locations(folder / "ca.crt")
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [here.wrap_bio(up, down, server_side=True), there.wrap_bio(down, up, server_hostname=ADDRESS)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return False
    return True


# --- a pod's certificate ----------------------------------------------------------------------------------------------


def test_a_pods_certificate_is_for_its_own_address_and_only_the_heads_for_the_service(tmp_path, pod):
    signer = authority(tmp_path / "ca", "fedray-ca")
    for options, services in (((), []), (("--head",), [SERVICE])):
        out = pod(signer, "--days", "30", *options)
        leaf = x509.load_pem_x509_certificate((out / "tls.crt").read_bytes())
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate((signer / "tls.crt").read_bytes()))
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", ADDRESS]
        assert names.get_values_for_type(x509.DNSName)[2:] == services
        assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
        assert (leaf.not_valid_after_utc - leaf.not_valid_before_utc).days == 30
        assert (out / "tls.key").stat().st_mode & 0o777 == 0o600
        assert (out / "ca.crt").read_bytes() == (signer / "tls.crt").read_bytes()


def test_no_certificate_outlives_its_authority(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("POD_IP", ADDRESS)
    signer = authority(tmp_path / "ca", "fedray-ca", days=20)
    (tmp_path / "out").mkdir()
    assert certify.main(["--authority", str(signer), "--out", str(tmp_path / "out"), "--days", "30"]) == 1
    assert "before this pod's certificate would" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert certify.main(["--authority", str(signer), "--out", str(tmp_path / "out"), "--days", "19"]) == 0


def test_beside_a_process_that_reads_it_again_a_certificate_is_renewed(tmp_path, monkeypatch):
    """Every 30 days, until the authority would end first."""
    monkeypatch.setenv("POD_IP", ADDRESS)
    out, made, slept = tmp_path / "out", [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        made.append(x509.load_pem_x509_certificate((out / "tls.crt").read_bytes()))
        if len(made) == 2:
            shutil.copytree(ending, signer, dirs_exist_ok=True)

    ending, signer = authority(tmp_path / "ends", "fedray-ca", days=20), authority(tmp_path / "ca", "fedray-ca")
    out.mkdir()
    monkeypatch.setattr(certify.time, "sleep", sleep)
    assert certify.main(["--authority", str(signer), "--out", str(out), "--name", "redis", "--every", "30"]) == 1
    assert slept == [30 * 86400] * 2 and made[0].serial_number != made[1].serial_number
    names = made[1].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "redis" in names.get_values_for_type(x509.DNSName)


def test_silos_believe_each_others_authorities_and_none_signs_with_anothers_key(tmp_path, pod, capsys):
    own = {name: authority(tmp_path / name, f"{name}-ca") for name in ("fedray", "silo-a", "stranger")}
    bundle = tmp_path / "ca.crt"
    bundle.write_bytes(b"".join((own[name] / "tls.crt").read_bytes() for name in ("fedray", "silo-a")))
    head, silo = (pod(own[name], "--trust", str(bundle)) for name in ("fedray", "silo-a"))
    assert believe(head, silo) and believe(silo, head)
    assert not believe(head, pod(own["stranger"])) and not believe(pod(own["stranger"]), head)
    (tmp_path / "out").mkdir()
    options = ["--authority", str(own["stranger"]), "--out", str(tmp_path / "out"), "--trust", str(bundle)]
    assert certify.main(options) == 1 and "lacks this pod's own authority (CN=stranger-ca)" in capsys.readouterr().err


def test_an_authority_that_is_renewed_over_its_key_parts_nobody(tmp_path, pod):
    """Pods of before and after the renewal speak with each other; with another key they would not."""
    first = authority(tmp_path / "first", "fedray-ca", days=100)
    renewed = authority(tmp_path / "renewed", "fedray-ca", key=key_of(first))
    replaced = authority(tmp_path / "replaced", "fedray-ca")
    before, after, apart = pod(first), pod(renewed), pod(replaced)
    assert believe(before, after) and believe(after, before)
    assert not believe(before, apart) and not believe(apart, before)


def test_an_authority_may_call_its_key_as_it_likes(tmp_path, pod):
    """cert-manager's libraries make the identifier in ways that change with their version."""
    signer = authority(tmp_path / "ca", "fedray-ca", called_key=b"7" * 20)
    assert believe(pod(signer), pod(signer))


# --- Ray ------------------------------------------------------------------------------------------------------------

RAY = """
import os, shutil, socket, ssl, subprocess, sys
import ray
from cryptography import x509

def serves(address):
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=os.environ["RAY_TLS_CA_CERT"])
    # The server asks for a certificate too.
    context.load_cert_chain(os.environ["RAY_TLS_SERVER_CERT"], os.environ["RAY_TLS_SERVER_KEY"])
    with context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=host) as talk:
        made = x509.load_der_x509_certificate(talk.getpeercert(binary_form=True))
        return talk.version(), made.issuer.rfc4514_string(), made.serial_number

ray.init(address="local", num_cpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
gcs, (silo, renewed) = ray.get_runtime_context().gcs_address, sys.argv[1:]
before = serves(gcs)
print("HEAD", *before[:2])
there = {"RAY_TLS_SERVER_CERT": silo + "/tls.crt", "RAY_TLS_SERVER_KEY": silo + "/tls.key"}
node = subprocess.Popen(
    ["ray", "start", "--block", "--address", gcs, "--num-cpus=1", "--labels=silo=a", "--object-manager-port=0",
     "--disable-usage-stats"], env=os.environ | there, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
try:
    task = ray.remote(lambda: (6 * 7, os.environ["RAY_TLS_SERVER_CERT"])).options(label_selector={"silo": "a"})
    print("ANSWER", *ray.get(task.remote(), timeout=60))
    (where,) = [n for n in ray.nodes() if n["Labels"].get("silo") == "a"]
    print("SILO", *serves(f"{where['NodeManagerAddress']}:{where['NodeManagerPort']}")[:2])
    for name in ("tls.crt", "tls.key"):
        shutil.copy(f"{renewed}/{name}", os.path.dirname(os.environ["RAY_TLS_SERVER_CERT"]))
    print("RENEWED", serves(gcs)[2] != before[2], flush=True)
finally:
    node.terminate()
    node.wait(30)
"""


@pytest.mark.xdist_group("ray")
def test_rays_processes_talk_under_certificates_of_two_parties_and_take_no_new_ones(tmp_path, pod):
    """A head and a silo's node, each under its own authority; a certificate that is renewed in place is not read
    again, which is why pods are replaced."""
    import ray._private.services as services

    own = {name: authority(tmp_path / name, f"{name}-ca") for name in ("fedray", "silo-a")}
    bundle = tmp_path / "ca.crt"
    bundle.write_bytes(b"".join((folder / "tls.crt").read_bytes() for folder in own.values()))
    address = services.get_node_ip_address()
    head, silo, renewed = (
        pod(own[name], "--trust", str(bundle), address=address) for name in ("fedray", "silo-a", "fedray")
    )
    env = os.environ | {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": f"{head}/tls.crt",
        "RAY_TLS_SERVER_KEY": f"{head}/tls.key",
        "RAY_TLS_CA_CERT": str(bundle),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-c", RAY, str(silo), str(renewed)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.stdout.splitlines() == [
        "HEAD TLSv1.3 CN=fedray-ca",
        f"ANSWER 42 {silo}/tls.crt",
        "SILO TLSv1.3 CN=silo-a-ca",
        "RENEWED False",
    ], done.stdout + done.stderr
