"""What would not be private, or would say so and not be.

Each check raises ValueError with one sentence that names the fix.
"""

from __future__ import annotations

from fedray.config.sections import Config
from fedray.methods import Method, linear_methods

#: Which privacy keys belong to which unit.
UNIT_OPTIONS = {"count_noise": "example", "subspace_fraction": "example", "adaptive_clip": "client"}


def check_privacy(config: Config, method: Method) -> None:
    """Raises ValueError, with the reason, for what would not be private, or would say so and not be."""
    _secure_sum(config, method)
    _budgets(config)
    _secure_state(config, method)
    if not config.privacy.on:
        _needs_privacy(config)
        return
    if config.privacy.unit == "example":
        _example_unit(config)
    _unit_keys(config)
    _subspace(config)
    _released(config)
    if config.privacy.unit == "client":
        _client_unit(config, method)


def _secure_sum(config: Config, method: Method) -> None:
    """Only the sum of the updates is opened."""
    privacy = config.privacy
    if privacy.secure_threshold is not None and not privacy.secure_aggregation:
        raise ValueError("privacy.secure_threshold belongs to privacy.secure_aggregation: switch it on")
    if privacy.secure_aggregation and not method.linear:
        raise ValueError(
            f"privacy.secure_aggregation opens only the sum of the updates, and {method.name} needs each one: "
            f"use {linear_methods()}"
        )


def _budgets(config: Config) -> None:
    one, every = config.privacy.epsilon, config.privacy.sweep_epsilon
    if one is not None and every is not None and one > every:
        raise ValueError(
            f"privacy.epsilon {one:g} of one run is above privacy.sweep_epsilon {every:g} of all of them: lower it"
        )


def _secure_state(config: Config, method: Method) -> None:
    """What a client keeps goes into the coordinator's checkpoint: with a secure sum it must be noised."""
    privacy = config.privacy
    if not privacy.secure_aggregation or (privacy.on and privacy.unit == "example"):
        return
    if config.federation.keep_optimizer:
        source = "federation.keep_optimizer"
    elif method.kept:
        source = f"method {method.name}"
    else:
        return
    raise ValueError(
        f"privacy.secure_aggregation hides single updates, and with {source} the coordinator's checkpoint would hold "
        "what each client keeps, from which its update can be read: "
        "leave it out, or add privacy.epsilon with privacy.unit example"
    )


def _needs_privacy(config: Config) -> None:
    """What would protect nothing while privacy is off."""
    privacy = config.privacy
    given = [name for name in ("delta", "clip", *UNIT_OPTIONS) if getattr(privacy, name) is not None]
    if privacy.unit != "example":
        given.append("unit")
    if given:
        raise ValueError(
            f"privacy.{given[0]} without privacy.epsilon would protect nothing: give privacy.epsilon (or privacy.noise)"
        )
    if config.adapter.subspace == "private":
        raise ValueError("adapter.subspace private needs privacy.epsilon, or privacy.noise")


def _example_unit(config: Config) -> None:
    """Example level: one example must change the sum by no more than the clip."""
    for name, dropout in (("model.dropout", config.model.dropout), ("adapter.dropout", config.adapter.dropout)):
        if dropout:
            # Masks are laid out over the batch: one example more shifts those of all others, beyond the clip.
            raise ValueError(
                f"{name} {dropout:g} would let one example change what every other one adds, "
                "beyond what privacy.clip bounds: set it to 0 in a private run"
            )


def _unit_keys(config: Config) -> None:
    privacy = config.privacy
    for option, unit in UNIT_OPTIONS.items():
        if getattr(privacy, option) is not None and privacy.unit != unit:
            raise ValueError(f"privacy.{option} belongs to privacy.unit {unit}, not to {privacy.unit}: leave it out")


def _subspace(config: Config) -> None:
    """Whatever reads the clients' data before round 1 is noised too."""
    subspace, privacy = config.adapter.subspace, config.privacy
    if subspace in ("gradient", "gradient-raw"):
        raise ValueError(
            f"adapter.subspace {subspace} reads the clients' data without noise, "
            "and no noise in training takes that back: use private, public or weights"
        )
    if subspace == "private" and privacy.unit == "client":
        raise ValueError(
            "adapter.subspace private protects examples, not clients: use public or weights with privacy.unit client"
        )
    if subspace != "private" and privacy.subspace_fraction is not None:
        raise ValueError("privacy.subspace_fraction belongs to adapter.subspace private: leave it out")


def _released(config: Config) -> None:
    """What would leave a client beside its noised update, or fill it where the client has nothing."""
    if config.data.client_held_out > 0:
        raise ValueError(
            "data.client_held_out would send metrics of the clients' own examples without noise: "
            "leave it out in a private run"
        )
    if not isinstance(config.adapter.rank, int):
        raise ValueError(
            "adapter.rank that differs between clients does not fit privacy: "
            "noise would fill what smaller clients do not have; use one rank"
        )


def _client_unit(config: Config, method: Method) -> None:
    """Client level: the noise is on the mean of the updates, so nothing else may tell of a client."""
    if not method.linear:
        raise ValueError(
            f"privacy.unit client adds noise to the mean of the updates, and {method.name} broadcasts more than that: "
            f"use {linear_methods()}"
        )
    if method.kept:
        raise ValueError(
            f"privacy.unit client noises what is averaged, and {method.name}'s clients keep factors of their own "
            "that it does not reach: use unit example"
        )
    if config.privacy.secure_aggregation and config.federation.cohort is not None:
        raise ValueError(
            "privacy.secure_aggregation with privacy.unit client needs every client in every round, "
            "since a small sample would show its members: leave federation.cohort out"
        )
    if config.method.weights == "examples":
        raise ValueError(
            "method.weights examples would weigh clients by sizes that privacy.unit client protects: "
            "use equal, or leave it out"
        )
