"""The audit of whole runs: what canaries prove stays below the claim, and faults that were, put back, are caught."""

import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from fedray.audit import audit_run
from fedray.audit.bounds import tells_of
from fedray.audit.noise import NoiseSeen
from fedray.cli import main
from fedray.errors import ConfigError, PrivacyError
from fedray.federation import questions, wire, worker
from fedray.federation.channels import accounted, client, example, masked, orders
from fedray.federation.channels.base import Admission
from fedray.federation.channels.orders import check_round_number
from fedray.privacy import client_level, discrete, dpsgd
from fedray.privacy.journal import Journal
from fedray.privacy.keys import TEST_KEY, Key, Stream
from fedray.privacy.sums.book import Page
from fedray.report.audit import print_audit
from fedray.training import subspace
from fedray.training.local import LocalTrainer

SGD = {"federation__optimizer": "sgd", "federation__lr": 0.5, "federation__schedule": "constant"}
SUBSPACE = {"method__name": "fed-sb", "adapter": {"kind": "lora-sb", "rank": 4, "subspace": "private"}}
NOBODY = {"unit": "client", "trust": "nobody", "secure_aggregation": True, "noise": 1.5, "delta": 1e-5}
KINDS = {
    "examples": (SGD | {"method__name": "fedit", "privacy": {"noise": 1.5, "delta": 1e-5}}, 400),
    "subspace": (SGD | SUBSPACE | {"privacy": {"noise": 1.5, "delta": 1e-5}}, 60),
    "clients": ({"method__name": "ffa", "privacy": {"noise": 1.5, "delta": 1e-5, "unit": "client"}}, 400),
    "nobody": ({"method__name": "ffa", "privacy": NOBODY}, 400),
}


@pytest.fixture(autouse=True)
def _keys_of_their_own(monkeypatch):
    """Noise that a test's word fixes is a fault."""
    monkeypatch.delenv(TEST_KEY, raising=False)


def audited(make_config, tmp_path, kind, **overrides):
    values, canaries = KINDS[kind]
    return audit_run(make_config(**values | overrides), canaries, tmp_path / "audit")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_proven_of_a_whole_run_stays_below_the_claim(make_config, tmp_path, kind):
    found = audited(make_config, tmp_path, kind)
    assert found.holds and found.rounds == 3
    assert len(found.findings) == (2 if kind == "subspace" else 1)
    assert all(0 <= f.proven <= f.claimed for f in found.findings)
    assert all(f.noise.share == pytest.approx(1, abs=0.1) for f in found.findings)
    # A client with noise of its own was asked again, and said nothing else. Trusted noise is not the client's.
    assert found.asked >= (0 if kind == "clients" else 9) and found.answered == 0


def test_canaries_prove_more_than_nothing(make_config, tmp_path):
    """Else a bound below every claim would say little. Little noise, so that a lower bound is far from 0."""
    privacy = {"noise": 0.4, "delta": 1e-5, "unit": "client"}
    (finding,) = audited(make_config, tmp_path, "clients", privacy=privacy).findings
    assert 1.5 < finding.proven < finding.claimed


def quiet(kind, patch):
    """The noise is left out; in a step all but a hundredth, since one that moves nothing is found by itself."""
    if kind == "examples":
        real_step = dpsgd.noised
        patch.setattr(
            dpsgd,
            "noised",
            lambda total, mechanism, noise: real_step(total, replace(mechanism, noise=mechanism.noise / 100), noise),
        )
    elif kind == "subspace":
        real = subspace._noised
        patch.setattr(
            subspace, "_noised", lambda total, noise: real(total, type(noise)(**vars(noise) | {"deviation": 0.0}))
        )
    elif kind == "clients":
        patch.setattr(
            client_level,
            "noised_mean",
            lambda total, deviation, expected, stream: {n: t / expected for n, t in total.items()},
        )
    else:
        patch.setattr(discrete, "integers", lambda stream, deviation, count: np.zeros(count, dtype=np.int64))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_that_is_left_out_is_caught(make_config, tmp_path, monkeypatch, kind):
    quiet(kind, monkeypatch)
    # At noise 4 little is claimed, so little must be proven to break it; at 8 less, which 60 canaries need.
    values = KINDS[kind][0]
    noise = 8.0 if kind == "subspace" else 4.0
    found = audited(make_config, tmp_path, kind, privacy=values["privacy"] | {"noise": noise})
    assert not found.holds
    assert any(finding.proven > finding.claimed for finding in found.findings)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_that_is_left_out_is_caught_where_more_is_claimed_than_canaries_can_prove(
    make_config, tmp_path, monkeypatch, kind
):
    quiet(kind, monkeypatch)
    values = KINDS[kind][0]
    found = audited(make_config, tmp_path, kind, privacy=values["privacy"] | {"noise": None, "epsilon": 100.0})
    assert not found.holds
    broken = found.findings[0]
    assert broken.claimed > broken.most >= broken.proven and broken.noise.share < 0.3


def test_noise_that_is_a_tenth_short_is_caught(make_config, tmp_path, monkeypatch):
    """No canary would see it."""
    real = dpsgd.noised
    short = lambda total, mechanism, noise: real(total, replace(mechanism, noise=0.9 * mechanism.noise), noise)  # noqa: E731
    monkeypatch.setattr(dpsgd, "noised", short)
    found = audited(make_config, tmp_path, "examples")
    (finding,) = found.findings
    assert finding.noise.share == pytest.approx(0.9, abs=0.03) and not finding.holds and not found.holds


def samples_everyone(patch):
    patch.setattr(Stream, "sample", lambda self, count, rate: list(range(count)))


def draws_everyone(patch):
    patch.setattr(
        client.ClientLevel,
        "admit",
        lambda self, round, message: self.with_agreement(Admission([*self.context.clients])),
    )


def noises_always_alike(patch):
    real = Key.stream
    patch.setattr(
        Key, "stream", lambda self, *parts: real(self, *(parts[:1] if parts[0] in ("noise", "share") else parts))
    )


def noises_every_other_number(patch):
    real = Stream.normals

    def normals(self, count):
        drawn = real(self, count)
        drawn[::2] = 0
        return drawn * 2**0.5

    patch.setattr(Stream, "normals", normals)


def tells_exact_counts(patch):
    real = example.ExampleSide.noised_count

    def exact(self, client, orders):
        real(self, client, orders)
        return torch.tensor([float(len(self.trainer.examples("train", client)))])

    patch.setattr(example.ExampleSide, "noised_count", exact)


def fixes_keys(patch):
    patch.setenv(TEST_KEY, "tests")


@pytest.mark.parametrize(
    ("fault", "kind", "overrides", "words"),
    [
        (samples_everyone, "examples", {}, "samples are larger than their rate"),
        (
            draws_everyone,
            "clients",
            {"federation__cohort": 1, "federation__rounds": 6},
            "samples are larger than their rate",
        ),
        (noises_always_alike, "examples", {}, "the noise of one sum is that of another"),
        (noises_always_alike, "nobody", {}, "the noise of one sum is that of another"),
        (noises_every_other_number, "examples", {}, "some numbers have less noise than others"),
        (tells_exact_counts, "examples", {}, "clients tell their numbers of examples with less noise"),
        (fixes_keys, "clients", {}, "a test's word has fixed the keys"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_noise_and_samples_that_are_not_as_charged_are_caught(
    make_config, tmp_path, monkeypatch, fault, kind, overrides, words
):
    fault(monkeypatch)
    values = KINDS[kind][0]["privacy"]
    if kind == "examples":  # a count that its noise brought down to a batch would have everyone sampled by right
        values = values | {"count_noise": 5.0}
    found = audited(make_config, tmp_path, kind, privacy=values, **overrides)
    console = Console(record=True, width=200)
    print_audit(console, found, 1)
    assert not found.holds and words in console.export_text()


def test_what_was_not_seen_is_not_refuted(make_config, tmp_path):
    """Of a client that was in no cohort nothing is known."""
    seen = NoiseSeen()
    assert not seen.faults() and seen.share == 1.0
    assert tells_of([], []) == [] and tells_of([{"round": 1}, {"round": 2}], [["a"], ["a", "b"]]) == []


def test_a_clip_that_is_not_kept_is_caught(make_config, tmp_path, monkeypatch):
    """Each canary counts ten times: what it would do if nothing clipped it."""
    from fedray.audit.canaries import Canaries

    real = Canaries.add
    monkeypatch.setattr(Canaries, "add", lambda self, tensors, weight, who: real(self, tensors, 10 * weight, who))
    privacy = KINDS["clients"][0]["privacy"] | {"noise": 4.0}
    assert not audited(make_config, tmp_path, "clients", privacy=privacy).holds


@pytest.mark.parametrize(("kind", "moved"), [("examples", 1.0), ("clients", 1.0), ("nobody", 1.0)])
def test_what_one_moves_a_sum_by_is_measured(make_config, tmp_path, kind, moved):
    """With a clip that every gradient and every update reaches."""
    found = audited(make_config, tmp_path, kind, privacy=KINDS[kind][0]["privacy"] | {"clip": 0.01})
    assert found.moved == pytest.approx(moved, abs=1e-3) and found.holds


@pytest.mark.parametrize("kind", ["sums", "nobody"])
def test_an_update_that_is_not_clipped_is_caught_inside_secure_sums_too(make_config, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(client_level, "clipped", lambda update, clip: (dict(update), True))
    values = KINDS["clients" if kind == "sums" else kind][0]
    privacy = values["privacy"] | {"secure_aggregation": True, "clip": 0.01}
    found = audit_run(make_config(**values | {"privacy": privacy}), 100, tmp_path / "audit")
    assert found.moved > 1.5 and not found.holds


def test_rounding_that_no_clip_covers_is_caught(make_config, tmp_path, monkeypatch):
    """Of a clip near to what fixed point rounds."""
    monkeypatch.setattr(masked.Masked, "rounding", lambda self, numbers: 0.0)
    privacy = KINDS["nobody"][0]["privacy"] | {"clip": 1e-7}
    found = audited(make_config, tmp_path, "nobody", privacy=privacy)
    assert found.moved > 1.01 and not found.holds


def test_an_example_that_moves_what_others_add_is_caught(make_config, tmp_path, monkeypatch):
    """Dropout's masks are laid out over a batch, so one example more shifts them all."""
    monkeypatch.setattr(example, "check", lambda config: None)
    monkeypatch.setattr(dpsgd, "check_model", lambda model: None)
    monkeypatch.setattr(dpsgd, "each_alone", lambda model: nullcontext())
    adapter = {"kind": "lora", "rank": 2, "dropout": 0.4}
    privacy = KINDS["examples"][0]["privacy"] | {"clip": 0.01}
    found = audited(make_config, tmp_path, "examples", adapter=adapter, privacy=privacy)
    assert found.moved > 1.01 and not found.holds


@pytest.mark.parametrize("adaptive", [None, 0.5])
def test_a_client_that_moves_the_sum_at_will_is_caught(make_config, tmp_path, monkeypatch, adaptive):
    monkeypatch.setattr(client.ClientLevel, "look", lambda self, packet: None)
    privacy = KINDS["clients"][0]["privacy"] | {"adaptive_clip": adaptive}
    found = audited(make_config, tmp_path, "clients", privacy=privacy)
    assert found.moved > 1e3 and not found.holds


def test_a_secret_cohort_that_records_name_is_caught(make_config, tmp_path, monkeypatch):
    cohorts = {"federation__cohort": 2}
    assert audited(make_config, tmp_path / "kept", "clients", **cohorts).holds

    def named(self, record, message, last):
        return accounted.Accounted.annotate(self, record, message, last)

    monkeypatch.setattr(client.ClientLevel, "annotate", named)
    found = audited(make_config, tmp_path / "named", "clients", **cohorts)
    assert found.told == ["cohort"] and not found.holds


def test_a_number_that_grows_with_a_secret_cohort_tells_of_it():
    drawn = [["a", "b"], [], ["a", "b", "c"]]
    records = [{"bytes_up": 7 * len(who), "bytes_down": 40, "seconds": {"train": 0.1 + len(who)}} for who in drawn]
    assert tells_of(records, drawn) == ["bytes_up"]
    assert tells_of([r | {"bytes_up": 14} for r in records], drawn) == []
    assert tells_of(
        [r | {"who": w, "seconds": {"each": 2.5 * len(w)}} for r, w in zip(records, drawn, strict=True)], drawn
    ) == ["who", "bytes_up", "seconds.each"]


def trusts_digests(patch):
    real = wire.Packet.again
    patch.setattr(wire.Packet, "again", lambda packet: packet if real(packet) else None)


def forgets_what_was_kept(patch):
    patch.setattr(worker, "inputs_digest", lambda header, packet, kept: wire.broadcast_digest(header, packet))


def takes_any_increment(patch):
    patch.setattr(worker, "as_announced", lambda packet, digest: packet)


def takes_names_for_granted(patch):
    def digest(self):
        return "" if self.sides is None else self.sides.vector.tobytes().hex()[:64]

    patch.setattr(questions.Sketch, "digest", digest)


def takes_any_type(patch):
    patch.setattr(wire.Packet, "again", lambda packet: wire.Packet(packet.manifest, packet.vector))


def believes_its_orders(patch):
    patch.setattr(example, "Budget", lambda *about: Believing(*about))


class Believing(orders.Budget):
    """As the budget that took the sampling rate, and the numbers that follow from it, from the coordinator."""

    def check_round(self, round, orders):
        check_round_number(self._config, round)

    def check_run(self, orders, releases):
        pass


def noises_other_data_alike(patch):
    patch.setattr(Key, "bound", lambda self, what: self)


def tells_of_its_size(patch):
    """As a worker that held the true count against the orders, and sent the words out."""
    real = orders.Budget.check_round

    def check_round(self, round, ordered):
        try:
            real(self, round, ordered)
        except PrivacyError as error:
            raise PrivacyError(f"{error} ({sizes[-1]} examples)") from None

    sizes, examples = [0], LocalTrainer.examples

    def counted(self, part, client=""):
        sizes.append(len(examples(self, part, client)))
        return examples(self, part, client)

    patch.setattr(LocalTrainer, "examples", counted)
    patch.setattr(orders.Budget, "check_round", check_round)


def forgets_its_sums(patch):
    """No page is kept, nor is there a journal."""
    keeps_no_journal(patch)
    patch.setattr(Page, "answer", lambda self, step, after, *inputs: self.answers.setdefault(step, ""))


def keeps_no_journal(patch):
    real = Journal.answer
    patch.setattr(Journal, "answer", lambda self, new, check: real(self, new, check) if new.what == "count" else None)


@pytest.mark.parametrize(
    ("fault", "kind", "overrides"),
    [
        (trusts_digests, "examples", {}),
        (forgets_what_was_kept, "examples", {"method__name": "fedsa"}),
        (takes_any_increment, "examples", {"method__name": "flora"}),
        (takes_names_for_granted, "subspace", {}),
        (keeps_no_journal, "examples", {}),
        (takes_any_type, "examples", {}),
        (believes_its_orders, "examples", {}),
        (forgets_its_sums, "nobody", {}),
        (noises_other_data_alike, "examples", {}),
        (tells_of_its_size, "examples", {}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_client_that_would_answer_again_is_caught(make_config, tmp_path, monkeypatch, fault, kind, overrides):
    fault(monkeypatch)
    found = audited(make_config, tmp_path, kind, **overrides)
    assert found.answered > 0 and not found.holds


@pytest.mark.parametrize("fault", [keeps_no_journal, trusts_digests])
def test_inside_a_secure_sum_a_second_lock_holds(make_config, tmp_path, monkeypatch, fault):
    """A session masks one vector, whatever became of the journal."""
    fault(monkeypatch)
    found = audited(make_config, tmp_path, "nobody")
    assert found.asked >= 9 and found.answered == 0 and found.holds


def test_the_command_prints_the_bound_beside_the_claim(tiny, capsys):
    flags = (
        f"--model.path {tiny}/llama --data.source {tiny}/text.jsonl --data.max_length 48 --adapter.rank 2 "
        "--federation.clients 3 --federation.rounds 2 --federation.local_steps 2 --worker.cpus 1"
    ).split()
    assert main(["audit", *flags, "--privacy.epsilon", "3", "--canaries", "100"]) == 0
    told = capsys.readouterr().out
    claimed, proven = re.search(r"claimed epsilon ([\d.]+) at delta .*at least\s+([\d.]+): holds", told, re.S).groups()
    assert float(proven) <= float(claimed) <= 3
    assert re.search(r"second questions from other inputs: \d+, answered: 0", told) and "2 rounds with 100" in told
    assert main(["audit", *flags]) == 2 and "give privacy.epsilon, or privacy.noise" in capsys.readouterr().err
    assert main(["audit", *flags, "--privacy.noise", "1", "--canaries", "x"]) == 2
    assert main(["audit", *flags, "--privacy.noise", "1", "--canaries", "9999999"]) == 2
    assert "give fewer --canaries" in capsys.readouterr().err


def test_a_run_without_privacy_has_nothing_to_audit(make_config, tmp_path):
    with pytest.raises(ConfigError, match="fedray audit tries a guarantee"):
        audit_run(make_config(), 10, tmp_path)
