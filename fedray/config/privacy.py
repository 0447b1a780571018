"""The `privacy` section of a config: guarantees, budgets, secure sums. What does not go together is refused by the
channels (`fedray/federation/channels/`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedray.config.section import Section


class PrivacySection(Section):
    """Differential privacy: on as soon as epsilon or noise is given."""

    epsilon: float | None = Field(None, gt=0)
    """Budget of each client over the whole run, whatever reads its data; the noise is calibrated to it unless it is
    given."""
    delta: float | None = Field(None, gt=0, lt=1)
    """delta (default: a power of ten, at most a tenth of 1 / the largest client's examples; unit client: of 1 /
    clients)."""
    noise: float | None = Field(None, gt=0)
    """Noise multiplier: standard deviation of the noise over the clip (default: calibrated to epsilon)."""
    unit: Literal["example", "client"] = "example"
    """What is protected: each sequence, by noise at its client; or each client with all it has, by noise at a trusted
    coordinator."""
    trust: Literal["coordinator", "nobody"] = "coordinator"
    """unit client: who adds the noise: a trusted coordinator, or each client its share inside a secure sum, so that
    nobody sees the exact sum (needs secure_aggregation)."""
    clip: float | None = Field(None, gt=0)
    """Norm to which each example's gradient (example) or each client's whole update (client) is clipped (default 1)."""
    count_noise: float | None = Field(None, gt=0)
    """example: standard deviation of the noise on each client's number of examples, released once (default 20)."""
    subspace_fraction: float | None = Field(None, gt=0, lt=1)
    """adapter.subspace private: share of epsilon that the bases may spend (default 0.2)."""
    adaptive_clip: float | None = Field(None, gt=0, lt=1)
    """client: let the clip follow this quantile of the updates' norms (Andrew et al., NeurIPS 2021)."""
    secure_aggregation: bool = False
    """Let the coordinator see only the sum of the clients' updates (Bonawitz et al., CCS 2017)."""
    secure_threshold: float | None = Field(None, gt=0, le=1)
    """Share of a round's clients that must stay to the end for the sum to be opened (default: more than half; with
    identities: more than two thirds); clients refuse less than their own config has."""
    secure_colluding: float | None = Field(None, ge=0, lt=1 / 3)
    """Share of the clients that may work with the coordinator (default 0.05): decides how many neighbours a client of a
    large cohort needs (Bell et al., CCS 2020)."""
    identities: str | None = None
    """File on each client's own machine with all clients' public keys, a line a client as `fedray identity` prints it,
    exchanged before the run: no coordinator can then stand in for a client in a secure sum."""
    sweep_epsilon: float | None = Field(None, gt=0)
    """`fedray sweep`: budget of all trials together, which are releases of the same data; a single run is one trial."""
    lifetime_epsilon: float | None = Field(None, gt=0)
    """Budget of a client over all runs of its key folder, whoever names them (at privacy.delta, which it needs); a run
    that would pass it is refused at its start. Default: each run has its own alone."""
    key_dir: str | None = None
    """Where a client's machine keeps its noise keys (default: $XDG_STATE_HOME/fedray/keys, or
    ~/.local/state/fedray/keys)."""

    @property
    def on(self) -> bool:
        """Whether the run is differentially private."""
        return self.epsilon is not None or self.noise is not None
