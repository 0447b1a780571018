"""`fedray compare`: tuning on the validation split, reuse, refusal, the table and the picture."""

import csv
import json
import re
import subprocess
from types import SimpleNamespace

import pytest
import yaml
from matplotlib.text import Text

from fedray.cli import main
from fedray.compare import compare
from fedray.compare import runs as compare_runs
from fedray.compare.entries import Entry
from fedray.compare.picture import picture
from fedray.config.read import read_config
from fedray.data.partition import load_data
from fedray.errors import ConfigError, FedrayError
from fedray.federation.prepare import prepare
from fedray.federation.run import execute


@pytest.fixture
def flags(tiny, tmp_path):
    return (
        f"--engine inline --worker.cpus 1 --model.path {tiny}/llama --data.source {tiny}/text.jsonl --data.max_length "
        "48 --federation.clients 3 "
        f"--federation.rounds 1 --federation.local_steps 2 --adapter.targets q_proj,v_proj --out {tmp_path}/out"
    ).split()


@pytest.fixture
def runs(monkeypatch):
    """The runs that are started, in this process instead of one of their own."""
    started = []

    class Popen:
        def __init__(self, command, stdout, stderr):
            self.argv, self.stdout = command[4:], stdout  # python -m fedray.cli run
            started.append(self.argv)

        def wait(self):
            try:
                execute(prepare(read_config(self.argv)))
            except FedrayError as error:
                self.stdout.write(f"fedray: {error}\n")
                return error.exit_code
            return 0

    # The module's own name, and not subprocess.Popen: others start processes too.
    monkeypatch.setattr(compare_runs, "subprocess", SimpleNamespace(Popen=Popen, STDOUT=subprocess.STDOUT))
    return started


def test_each_entry_is_tuned_on_the_validation_split_and_run_with_its_best_rate(flags, runs, tmp_path, capsys):
    argv = [
        *flags,
        "--methods",
        "fedit,fed-sb@3",
        "--seeds",
        "0,5",
        "--lrs",
        "1e-9,3e-2,1e30",
        "--lrs.fed-sb@3",
        "0.3",
        "--set.fed-sb@3",
        "adapter.subspace=gradient",
    ]
    assert main(["compare", *argv]) == 0
    told = capsys.readouterr().out
    assert "fedit  lr 1e+30: failed: see its log" in told and "compare.png" in told
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "compare.json").read_text())}
    assert (
        rows["fedit"]["lr"] == 0.03
        and rows["fedit"]["tuning"]["1e+30"] is None
        and not rows["fedit"]["lr_at_edge_of_grid"]
    )
    assert rows["fed-sb@3"]["lr"] == 0.3 and rows["fed-sb@3"]["tuning"] == {}
    assert len(runs) == 3 + 4
    tuned, final = (
        yaml.safe_load((tmp_path / "out" / "fedit" / f / "config.yaml").read_text())
        for f in ("tune-0.03", "lr-0.03-seed-5")
    )
    assert (tuned["data"]["evaluate_on"], tuned["seed"]) == ("validation", 0) and (
        final["data"]["evaluate_on"],
        final["seed"],
    ) == ("test", 5)
    assert tuned["federation"] == final["federation"]  # the same budget
    assert (
        yaml.safe_load((tmp_path / "out" / "fed-sb-rank-3" / "lr-0.3-seed-0" / "config.yaml").read_text())["adapter"][
            "subspace"
        ]
        == "gradient"
    )
    for row in rows.values():
        summaries = [
            json.loads(p.read_text())
            for p in sorted((tmp_path / "out").glob(f"{row['method'].replace('@', '-rank-')}/lr-*/summary.json"))
        ]
        assert row["finals"] == [s["final"] for s in summaries] and row["mean"] == pytest.approx(sum(row["finals"]) / 2)
        assert (
            row["bytes_up"] == summaries[0]["bytes_up"] and row["trainable_params"] == summaries[0]["trainable_params"]
        )
    assert rows["fedit"]["tuning"]["0.03"] < rows["fedit"]["tuning"]["1e-09"]  # bits per byte: lower is better
    assert [r["method"] for r in csv.DictReader((tmp_path / "out" / "compare.csv").open())] == list(rows)

    runs.clear()
    assert main(["compare", *argv]) == 0 and runs == []  # all of it was there
    with pytest.raises(ConfigError, match="holds a run with another federation.rounds .1, now 2.: give another --out"):
        compare([*argv, "--federation.rounds", "2"], print)


@pytest.mark.parametrize(
    "extra, sentence",
    [
        ("--methods fedxx", "--methods 'fedxx' is not known: write [ADAPTER+]METHOD[@RANK] with a method of fedit"),
        ("--methods fedit --output.checkpoints file:///tmp/x", "output.checkpoints is the place of one run"),
        ("--methods fedit --seed 3", "--seed is set by the comparison itself"),
        ("--methods fedit --federation.lr 3", "--federation.lr is set by the comparison itself"),
        ("--methods fedit --adapter.kind abba", "--adapter.kind is set by the comparison itself"),
        ("--methods fedit --lrs fast", "--seeds, --lrs and --jobs hold numbers"),
        ("--methods fedit --lrs.fedex 1", "--lrs.fedex names no entry of --methods fedit"),
        ("--methods fedit --set.fedit rank", "--set.fedit 'rank' is no setting"),
        (
            "--methods fedit --set.fedit federation.rounds=9",
            "--set.fedit may set keys of adapter and method, and not 'federation.rounds'",
        ),
        ("--methods fedit --set.fedit method.name=fedex", "and not 'method.name'"),
        ("--methods fedit --lrs -1", "federation.lr: input should be greater than 0"),
        ("--methods fedit --lrs nan", "federation.lr: input should be a finite number"),
        ("--methods fedit --seeds 0,0", "--seeds 0,0 names a seed twice"),
        ("--methods fedit --data.evaluate_on validation", "data.evaluate_on is set by the comparison itself"),
        ("--methods fedit --set.fedit adapter.rnk=3", "unknown key 'adapter.rnk'"),
        ("--methods lora-sb+fedit", "method 'fedit' does not fit adapter 'lora-sb'"),
        ("--methods fedit,fedit", "--methods names fedit twice"),
        (
            "--methods fedit,ffa --set.ffa method.robust_rule=median",
            "with method.robust_rule clients count alike, and for the other entries with their examples: give",
        ),
        ("--methods", "--methods needs a value"),
        ("--jobs 0", "--jobs 0: at least one run at a time"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(extra, sentence, flags, runs, capsys, tmp_path):
    assert main(["compare", *flags, *extra.split()]) == 2
    assert sentence in capsys.readouterr().err and runs == [] and not (tmp_path / "out").exists()


def test_a_final_run_that_fails_stops_the_comparison_and_names_its_log(flags, runs, tmp_path, capsys):
    assert main(["compare", *flags, "--methods", "fedit", "--seeds", "0", "--lrs", "1e30"]) == 1
    error = capsys.readouterr().err
    assert (
        "a run failed: round 1: 0 of 3 clients reported and 3 are needed" in error
        and re.search(r"client 'client-0': (it sent a value|its update has norm) .*: lower its learning rate", error)
        and "lr-1e+30-seed-0.log" in error
    )
    assert main(["compare", *flags, "--methods", "fedit", "--seeds", "0", "--lrs", "1e30,1e31"]) == 1
    assert "failed at every learning rate of the grid" in capsys.readouterr().err


def test_labels_of_the_picture_do_not_overlap():
    rows = [
        {
            "method": f"method-{i}",
            "metric": "accuracy",
            "mean": 0.8 + 0.001 * (i % 3),
            "finals": [0.79, 0.82],
            "bytes_up": 2**22 + i * 2**16,
            "bytes_down": 2**23,
        }
        for i in range(12)
    ]
    figure = picture(rows)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # the words alone, without their lines
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())


@pytest.mark.slow
def test_the_command_as_its_user_runs_it(flags, tmp_path):
    assert main(["compare", *flags, "--methods", "fedit,ravan@2", "--seeds", "0", "--lrs", "1e-2", "--jobs", "2"]) == 0
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


def test_an_entry_takes_the_configs_adapter_where_it_fits_and_ranks_of_its_own():
    assert Entry.parse("fedit", "abba").adapter == "abba" and Entry.parse("fed-sb", "abba").adapter == "lora-sb"
    assert Entry.parse("lora+fedit", "abba").adapter == "lora"
    entry = Entry.parse("flexlora", None)
    assert entry.flags({"set.flexlora": "adapter.rank=3,2,1,method.split=balanced"})[4:] == [
        "--adapter.rank",
        "3,2,1",
        "--method.split",
        "balanced",
    ]


@pytest.mark.parametrize("source", ["one file", "a folder with a validation file", "builtin"])
def test_what_is_tuned_on_shares_no_example_with_what_is_measured_on(source, tiny, tmp_path):
    def parts(evaluate_on, seed):
        flags = f"--data.evaluate_on {evaluate_on} --seed {seed} --federation.clients 5".split()
        if source != "builtin":
            place = tiny / "text.jsonl" if source == "one file" else tmp_path
            flags += ["--data.source", str(place)]
        data = load_data(read_config(flags))
        return [
            {tuple(row.items()) for row in part if row["text"]}
            for part in ([r for c in data.train.values() for r in c], data.test)
        ]

    if source.startswith("a folder"):
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.jsonl").write_text(
                "".join(json.dumps({"text": f"{split} number {i}"}) + "\n" for i in range(30))
            )
    tuning_train, tuning = parts("validation", 0)
    for seed in (0, 1):
        train, final = parts("test", seed)
        assert not tuning & final and not tuning_train & final and not tuning_train & tuning and not train & final
        assert tuning and final
