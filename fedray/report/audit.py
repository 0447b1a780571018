"""What an audit found, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from fedray.audit.audited import Audited
    from fedray.audit.noise import NoiseSeen


def print_audit(console: Console, found: Audited, canaries: int) -> None:
    """Each claim with what is proven beside it, and whether a client answered twice."""
    for finding in found.findings:
        verdict = "holds" if finding.proven <= finding.claimed else "BROKEN: more is proven than is claimed"
        console.print(f"{finding.what}", soft_wrap=True)
        console.print(
            f"  claimed epsilon {finding.claimed:.3f} at delta {finding.delta:g}; proven (95 %): at least "
            f"{finding.proven:.3f}: {verdict}",
            soft_wrap=True,
        )
        if finding.claimed > finding.most:
            console.print(
                f"  so many canaries prove {finding.most:.3f} at most, whatever is wrong: try more --canaries, or a "
                "run with a smaller epsilon",
                soft_wrap=True,
            )
        _print_noise(console, finding.noise)
    if found.asked:
        console.print(f"second questions from other inputs: {found.asked}, answered: {found.answered}", soft_wrap=True)
    console.print(f"the furthest that one moved a sum before its noise: {found.moved:.3f} clips", soft_wrap=True)
    if not found.counts.enough:
        console.print("BROKEN: clients tell their numbers of examples with less noise than is charged", soft_wrap=True)
    if found.fixed:
        console.print("BROKEN: a test's word has fixed the keys, and whoever knows it knows the noise", soft_wrap=True)
    if found.told:
        console.print(f"BROKEN: records tell of the secret cohort: {', '.join(found.told)}", soft_wrap=True)
    console.print(f"{found.rounds} rounds with {canaries} canaries, {found.seconds:.0f} s", soft_wrap=True)


def _print_noise(console: Console, noise: NoiseSeen) -> None:
    """What was seen of the noise itself."""
    if not noise.numbers:
        console.print("  none of its sums came: nothing of its noise was seen", soft_wrap=True)
        return
    faults = noise.faults()
    verdict = f"BROKEN: {', '.join(faults)}" if faults else "holds"
    said = f"{noise.share:.3f} of what is charged, over {noise.numbers:,} numbers"
    console.print(f"  noise in its sums: {said}: {verdict}", soft_wrap=True)
