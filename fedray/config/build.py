"""The values that a config means: its adapter, its method, and what methods must know of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedray.adapters import ADAPTERS, Adapter, Layer
from fedray.config.declared import Declared
from fedray.config.sections import ADAPTER_OPTIONS, METHOD_OPTIONS, AdapterSection, Config
from fedray.errors import nearest
from fedray.methods import METHODS, Method, RobustOptions, RobustRule, ServerOptimizer, Spec, linear_methods, why_not


def make_adapter(section: AdapterSection) -> Adapter:
    """The adapter value that a section means. Raises ValueError, with the reason, for what is not sound."""
    if section.kind not in ADAPTERS:
        raise ValueError(f"adapter.kind '{section.kind}' is not known{nearest(section.kind, ADAPTERS)}")
    _check_owners("adapter", section.kind, section.options, ADAPTER_OPTIONS)
    adapter = ADAPTERS[section.kind].configured(section.options, section.rslora)
    adapter.width(section.largest_rank)
    return adapter


def make_method(config: Config) -> Method:
    """The method value that a config means. Raises ValueError, with the reason, for what is not sound."""
    section, kind = config.method, config.adapter.kind
    if section.name not in METHODS:
        raise ValueError(f"method.name '{section.name}' is not known{nearest(section.name, METHODS)}")
    if reason := why_not(section.name, kind):
        raise ValueError(f"method '{section.name}' does not fit adapter '{kind}': {reason}")
    _check_owners("method", section.name, section.options, METHOD_OPTIONS)
    _check_ranks(config)
    options = section.options | _server_optimizer(config) | _robust_rule(config)
    return METHODS[section.name].configured(options, config.federation.rounds, kind)


def make_spec(config: Config, layers: Sequence[Layer], clients: Sequence[str]) -> Spec:
    """What methods must know of the model, with each client's rank. Raises ConfigError when these do not fit."""
    return Spec(make_adapter(config.adapter), tuple(layers), config.seed, config.adapter.ranks(clients))


def _check_owners(section: str, name: str, values: Mapping[str, Any], declared: Mapping[str, Declared]) -> None:
    """Raises ValueError for an option that belongs to others."""
    for option in values:
        owners = declared[option].owners
        if name not in owners:
            raise ValueError(f"{section}.{option} belongs to {' and '.join(owners)}, not to {name}: leave it out")


def _check_ranks(config: Config) -> None:
    if isinstance(config.adapter.rank, int) or METHODS[config.method.name].mixed_ranks:
        return
    several = ", ".join(name for name, method in METHODS.items() if method.mixed_ranks)
    raise ValueError(
        f"adapter.rank differs between clients, and {config.method.name} needs one rank for all: use {several}"
    )


def _server_optimizer(config: Config) -> dict[str, ServerOptimizer]:
    """The method's argument `server`; none where no server optimizer is configured."""
    if not config.method.server_options:
        return {}
    server = ServerOptimizer.configured(config.method.server_options)
    if not METHODS[config.method.name].linear:
        raise ValueError(
            f"method.server_optimizer steps along a mean, and {config.method.name} broadcasts none: "
            f"use it with {linear_methods()}"
        )
    return {"server": server}


def _robust_rule(config: Config) -> dict[str, RobustRule]:
    """The method's argument `robust`; none where no robust rule is configured."""
    if not config.method.robust_options:
        return {}
    rule, method = RobustOptions.configured(config.method.robust_options), METHODS[config.method.name]
    if not method.linear:
        raise ValueError(
            f"method.robust_rule stands in for a mean, and {method.name} broadcasts more than one: "
            f"use it with {linear_methods()}"
        )
    if rule.compares_deltas and method.kept:
        raise ValueError(
            f"method.robust_rule {rule.name} compares what updates mean, and {method.name}'s clients keep factors that "
            "it needs for that: use median or trimmed"
        )
    return {"robust": rule}
