"""What a run would cost, for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fedray.plan import Memory, MethodCost, Plan
from fedray.report.words import number, size

UNKNOWN_COUNTS = "privacy  noise and epsilon are planned when the clients have told their noised numbers of examples"


def print_plan(console: Console, costs: Plan, placement: str | None = None) -> None:
    """Model, memory, placement, and the table of methods."""
    console.print(
        f"model    {costs.model}: {number(costs.base_parameters)} parameters, {costs.adapted_layers} layers adapted, "
        f"{number(costs.heads)} in heads"
    )
    console.print(_memory(costs.memory), soft_wrap=True)
    if placement:
        console.print(f"workers  {placement}")
    console.print(plan_table(costs))
    if costs.costs[0].start_up:
        console.print(_start(costs.costs[0]))
    if costs.privacy:
        console.print(privacy_table(costs))
    if costs.clients > costs.cohort:
        console.print("a client that sat rounds out also downloads the base updates it missed (fedex, flora)")


def _memory(memory: Memory) -> str:
    text = (
        f"memory   about {size(memory.total)} a worker: base {size(memory.base)}, adapter and optimizer "
        f"{size(memory.adapter_and_optimizer)}, activations {size(memory.activations)} (estimate)"
    )
    if memory.host_copy_of_moved_layers:
        text += f"; and {size(memory.host_copy_of_moved_layers)} of host memory for the original weights"
    return text


def _start(costs: MethodCost) -> str:
    return (
        f"before round 1 each client sends {size(costs.start_up)} and receives {size(costs.start_down)} for the "
        "subspace; both are counted in the run"
    )


def plan_table(costs: Plan) -> Table:
    """Every method side by side."""
    title = f"a round, per client ({costs.cohort} clients a round), and a run of {costs.costs[0].rounds} rounds"
    table = Table(title=title, title_justify="left")
    for column in ("method", "exact", "trains", "up", "down", "down, round 1", "sent once", "run, up", "run, down"):
        table.add_column(column, justify="left" if column in ("method", "exact") else "right")
    for i, c in enumerate(costs.costs):
        cells = (
            c.method,
            c.exact,
            number(c.trainable),
            size(c.up),
            size(c.down),
            size(c.first_down),
            size(c.once) if c.once else "-",
            size(c.run_up),
            size(c.run_down),
        )
        table.add_row(*cells, style="bold" if i == 0 else None)
    return table


def privacy_table(costs: Plan) -> Table:
    """What each client's privacy will cost: with noised counts, so about."""
    first = next(iter(costs.privacy.values()))
    title = (
        f"privacy by {first.unit}, {first.relation}, delta {first.delta:g}; "
        "the signal is what clipped terms add up to when all agree"
    )
    table = Table(title=title, title_justify="left")
    signal = "signal to noise, a step at best"
    for column in ("client", "rate", "steps", "clip", "noise multiplier", "epsilon, whole run", signal):
        table.add_column(column, justify="left" if column == "client" else "right")
    for client, plan in costs.privacy.items():
        table.add_row(
            client,
            f"{plan.rate:g}",
            f"{plan.steps}",
            f"{plan.clip:g}",
            f"{plan.noise:.4g}",
            f"{plan.epsilon:.4g}",
            f"{plan.signal_to_noise(costs.costs[0].trainable):.3g}",
        )
    return table
