"""Several methods and seeds with one config, one table: mean and spread of the final metric.

    python jobs/compare.py --methods fedit,fedex --seeds 0,1,2 --out runs/compare -- --config F.yaml --section.key value ...

Everything after `--` goes to `fedray run`. A run that is finished is not repeated; one that was cut off is resumed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedray.report.console import size


def run(method: str, seed: int, folder: Path, arguments: list[str]) -> dict:
    """The summary of one run, from its directory where it is there already. Raises SystemExit when the run fails."""
    summary = folder / "summary.json"
    if not summary.is_file():
        command = [sys.executable, "-m", "fedray.cli", "run", *arguments, "--method.name", method, "--seed", str(seed)]
        done = subprocess.run([*command, "--output.dir", str(folder), "--output.resume"], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
    return json.loads(summary.read_text())


def main() -> None:
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="fedit,ffa,fedex,fra,fra-ffa", help="comma-separated")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args(sys.argv[1:split])
    seeds = [int(s) for s in args.seeds.split(",")]
    results = {m: [run(m, s, args.out / f"{m}-{s}", sys.argv[split + 1 :]) for s in seeds] for m in args.methods.split(",")}

    table = Table(title=f"{len(seeds)} seeds")
    for column in ("method", "metric", "mean", "spread (min to max)", "trains", "up", "down", "factor averaging would lose", "lost"):
        table.add_column(column, justify="left" if column in ("method", "metric") else "right")
    for method, runs in results.items():
        finals = [r["final"] for r in runs]
        table.add_row(
            method, runs[0]["metric"], f"{statistics.mean(finals):.4f}", f"{min(finals):.4f} to {max(finals):.4f}",
            f"{runs[0]['trainable_params']:,}", size(runs[0]["bytes_up"]), size(runs[0]["bytes_down"]),
            f"{max(r['aggregation_error'] for r in runs):.1%}", f"{max(r['exactness'] for r in runs):.1e}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
