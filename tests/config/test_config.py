"""Config: YAML and flags, round trip, one sentence for each kind of bad input, and nothing touched."""

import pytest

from fedray.cli import main
from fedray.config.build import make_method
from fedray.config.read import from_dict, help_lines, known_keys, read_config
from fedray.config.sections import Config
from fedray.errors import ConfigError
from fedray.methods import FedExKeep


def test_flags_win_over_the_file_and_the_rest_keeps_its_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("federation:\n  lr: 1e-3\n  rounds: 4\nadapter:\n  targets: [q_proj, v_proj]\n")
    config = read_config(["--config", str(file), "--federation.rounds=9", "--output.resume", "--method.name", "fra"])
    assert (config.federation.lr, config.federation.rounds, config.federation.batch_size) == (
        1e-3,
        9,
        Config().federation.batch_size,
    )
    assert config.adapter.targets == ("q_proj", "v_proj") and config.output.resume and config.method.name == "fra"
    assert read_config(["--adapter.targets", "q_proj,v_proj"]).adapter.targets == ("q_proj", "v_proj")
    assert read_config(["--federation.max_grad_norm", "null"]).federation.max_grad_norm is None


def test_a_config_survives_yaml(tmp_path):
    config = read_config(
        [
            "--clients.ward.7.lr",
            "0.1",
            "--federation.cohort",
            "3",
            "--method.name",
            "fedex",
            "--method.assignment",
            "keep",
        ]
    )
    file = tmp_path / "c.yaml"
    file.write_text(config.to_yaml())
    again = read_config(["--config", str(file)])
    assert again == config and again.clients["ward.7"].lr == 0.1 and config.client("ward.7").lr == 0.1
    assert config.client("other").lr == config.federation.lr


def test_every_key_has_a_line_of_help():
    assert all(doc and "\n" not in doc for _, _, doc in help_lines())
    assert "federation.local_steps" in known_keys() and "clients.NAME.lr" in known_keys()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--federation.rouns 3", "unknown key 'federation.rouns': did you mean federation.rounds?"),
        ("--clients.a.lrr 3", "unknown key 'clients.a.lrr': did you mean clients.NAME.lr?"),
        ("--federation.lr fast", "federation.lr: input should be a valid number"),
        ("--federation.rounds 0", "federation.rounds: input should be greater than or equal to 1"),
        (
            "--model.task translation",
            "model.task: input should be 'causal-lm' or 'choice' or 'classification' or 'instruction'",
        ),
        ("--method.name fedx", "method.name 'fedx' is not known: did you mean fedex?"),
        ("--method.name fed-sb", "method 'fed-sb' does not fit adapter 'lora': it averages the r x r core R"),
        ("--adapter.kind dora", "adapter.kind 'dora' is not known"),
        (
            "--adapter.kind lora-sb",
            (
                "method 'fedex' does not fit adapter 'lora-sb': only its core trains, and the plain mean of that is "
                "exact: use fed-sb"
            ),
        ),
        ("--method.name ravan --adapter.kind lora-sb", "it needs adapter.kind ravan"),
        ("--adapter.kind abba --adapter.rank 1", "adapter.rank 1 cannot be split in two: abba needs at least 2"),
        (
            "--adapter.kind abba --adapter.rslora",
            "adapter.rslora scales B A by alpha / sqrt(rank), and abba has a scale of its own",
        ),
        ("--adapter.scale paper", "adapter.scale belongs to abba, not to lora: leave it out"),
        ("--adapter.cores 3", "adapter.cores belongs to ravan, not to lora: leave it out"),
        ("--adapter.subspace gradient", "adapter.subspace belongs to lora-sb, not to lora: leave it out"),
        (
            "--adapter.kind lora-sb --method.name fed-sb --adapter.subspace public",
            "adapter.subspace public needs adapter.subspace_source",
        ),
        (
            "--adapter.kind lora-sb --method.name fed-sb --adapter.subspace_passes 1",
            "adapter.subspace_passes belongs to adapter.subspace public and gradient-raw",
        ),
        (
            "--adapter.kind lora-sb --method.name fed-sb --adapter.subspace svd",
            "adapter.subspace: input should be 'weights', 'gradient', 'gradient-raw', 'public' or 'private'",
        ),
        (
            "--adapter.kind ravan --method.name ravan --adapter.rank 80",
            "adapter.rank 80 (320 columns in all) is above the size of layer",
        ),
        ("--adapter.rank 0", "adapter.rank: input should be greater than or equal to 1"),
        (
            "--adapter.rank 8,4",
            "adapter.rank differs between clients, and fedex needs one rank for all: use flora, flexlora, hetlora",
        ),
        ("--adapter.rank 8,4 --method.name flora", "adapter.rank lists 2 ranks for 5 clients"),
        (
            "--adapter.rank asyncoi=4 --method.name flora",
            "adapter.rank names 'asyncoi', which is not a client of this run: did you mean asyncio?",
        ),
        ("--method.energy 0.5", "method.energy belongs to florist, not to fedex"),
        ("--method.name florist --method.energy 1.5", "method.energy: input should be less than or equal to 1"),
        (
            "--method.server_optimizer adam",
            "method.server_optimizer steps along a mean, and fedex broadcasts none: use it with fedit, ffa",
        ),
        (
            "--method.name ffa --method.server_lr 0.1",
            "method.server_lr needs method.server_optimizer: avgm, adam or yogi",
        ),
        (
            "--method.name ffa --method.server_optimizer lamb",
            "method.server_optimizer: input should be 'avgm', 'adam' or 'yogi'",
        ),
        (
            "--method.name ffa --method.server_optimizer avgm --method.server_tau 0.1",
            "method.server_tau belongs to server_optimizer adam and yogi, not to avgm",
        ),
        ("--method.assignment keep --adapter.kind abba", "method.assignment keep needs adapter.kind lora, not abba"),
        ("--method.name rolora --federation.keep_optimizer", "federation.keep_optimizer does not fit rolora"),
        (
            "--method.name fedit --method.residual_rank 3",
            "method.residual_rank belongs to fedex and flora, not to fedit",
        ),
        ("--method.assignment keep --method.residual_rank 3", "keep cannot be truncated"),
        ("--federation.batch_size 8 --federation.accumulate 3", "federation.accumulate 3 does not divide"),
        ("--clients.a.batch_size 3 --federation.accumulate 2", "federation.accumulate 2 does not divide"),
        ("--data.source x.csv --data.partition column", "data.partition column needs data.column"),
        ("--model.task classification", "the built-in corpus is for causal-lm"),
        ("--engine inline --federation.deadline 3", "federation.deadline needs engine ray"),
        ("--data.text_pair x", "data.text_pair belongs to classification"),
        ("--model.path mistral-7b", "is a shape for `fedray plan`, without weights"),
        ("--data.max_length 4000", "data.max_length 4000 is more than the model's 1024 positions"),
        ("--adapter.targets [", "adapter.targets '[' is no regular expression"),
        ("--adapter.targets lm_head", "shares its weight with another layer"),
        ("--adapter.heads lm_head", "shares its weight with another layer"),
        ("--data.completion answer", "data.completion 'answer' is not a column"),
        ("--output.dir /proc/none/here", "cannot be made"),
        ("--config nowhere.yaml", "config file 'nowhere.yaml' does not exist"),
        ("stray", "'stray' is not a flag"),
        ("--data.source nowhere.csv", "data source 'nowhere.csv' does not exist"),
        ("--model.path ./nowhere", "model.path './nowhere' does not exist"),
        ("--adapter.targets no_such_layer", "adapter.targets no_such_layer match no layer"),
        ("--adapter.targets embed_tokens", "embed_tokens, which is no linear layer"),
        ("--adapter.rank 500", "adapter.rank 500 is above the size of layer"),
        ("--adapter.heads nothing", "adapter.heads 'nothing' is no module of this model"),
        ("--federation.cohort 9", "federation.cohort 9 is more than the 5 clients"),
        ("--federation.clients 3", "federation.clients is 3, but column 'package' has 5 values"),
        ("--clients.asyncoi.lr 1", "clients.asyncoi is not a client of this run: did you mean asyncio?"),
        ("--worker.count 3 --worker.gpus 1", "3 workers x 1 GPUs = 3 GPUs, but there are 0"),
        ("--output.resume", "output.resume needs output.dir"),
    ],
)
def test_bad_input_gets_one_sentence_exit_code_2_and_touches_nothing(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["run", *flags.split()]) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()
    assert len(error) == 1 and sentence in error[0] and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_fewer_examples_than_clients(tmp_path, capsys):
    source = tmp_path / "few.jsonl"
    source.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    assert main(["run", "--data.source", str(source), "--output.dir", str(tmp_path / "out")]) == 2
    assert "2 training examples are fewer than 5 clients" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_holds_something_else(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert main(["run", "--output.dir", str(tmp_path / "mine")]) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    (tmp_path / "mine" / "thesis.txt").unlink()
    (tmp_path / "mine" / "config.yaml").write_text(Config().to_yaml())
    assert main(["run", "--output.dir", str(tmp_path / "mine")]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert main(["run", "--output.dir", str(tmp_path / "mine"), "--output.resume", "--federation.lr", "0.5"]) == 2
    assert "another federation.lr (0.005, now 0.5)" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["config.yaml"]


def test_unknown_keys_in_a_file_are_named_too(tmp_path):
    with pytest.raises(ConfigError, match="unknown key 'federation.quorumm': did you mean federation.quorum?"):
        from_dict({"federation": {"quorumm": 1}})


def test_method_values():
    assert isinstance(make_method(from_dict({"method": {"assignment": "keep"}})), FedExKeep)
    assert make_method(from_dict({"method": {"name": "fra-ffa"}, "federation": {"rounds": 8}})).fra_rounds == 4
    assert make_method(from_dict({"method": {"name": "flora", "residual_rank": 3}})).residual_rank == 3


@pytest.mark.parametrize(
    "train, test, flags, sentence",
    [
        (
            ['{"text": "ab", "label": 0}', '{"text": "cd", "label": 1}'],
            ['{"text": "ef", "label": -1}'],
            "c",
            "of the held-out data holds -1",
        ),
        (
            ['{"text": "ab", "label": 0}', '{"text": null, "label": 1}'],
            ['{"text": "ef", "label": 1}'],
            "c",
            "data.text 'text' has rows without a value",
        ),
        (
            ['{"text": "ab", "label": 0}', '{"text": "cd"}'],
            ['{"text": "ef", "label": 0}'],
            "c",
            "data.label 'label' has rows without a value",
        ),
        (
            ['{"text": "ab", "label": 0}', '{"text": "cd", "label": 0}'],
            ['{"text": "ef", "label": 0}'],
            "c",
            "holds 1 class",
        ),
        (['{"text": "ab"}', '{"text": "cd"}'], ['{"body": "ef"}'], "l", "data.text 'text' is not a column"),
        (['{"text": "ab"}', '{"text": "cd"}'], ['{"text": ""}'], "l", "holds no text in the held-out data"),
        (
            ['{"text": "ab", "w": "x"}', '{"text": "cd", "w": null}'],
            ['{"text": "ef"}'],
            "w",
            "data.column 'w' has rows without a value",
        ),
    ],
)
def test_bad_data_is_found_before_anything_is_touched(train, test, flags, sentence, tmp_path, tiny, capsys):
    (tmp_path / "train.jsonl").write_text("\n".join(train))
    (tmp_path / "test.jsonl").write_text("\n".join(test))
    extra = {
        "c": f"--model.task classification --model.path {tiny}/bert --federation.clients 1",
        "l": "--federation.clients 1",
        "w": "--data.partition column --data.column w",
    }[flags]
    command = f"run --data.source {tmp_path} --data.max_length 32 --output.dir {tmp_path}/out {extra}"
    assert main(command.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and sentence in error[0] and not (tmp_path / "out").exists()


def test_more_bad_input(tmp_path, tiny, capsys):
    (tmp_path / "latin.yaml").write_bytes("seed: 1 # \xe4".encode("latin-1"))
    (tmp_path / "file").touch()
    (tmp_path / "one.jsonl").write_text('{"text": "abc"}')
    (tmp_path / "empty-model").mkdir()
    (tmp_path / "empty-model" / "config.json").write_text((tiny / "bert" / "config.json").read_text())
    for flags, sentence in (
        (f"--config {tmp_path}/latin.yaml", "is not YAML"),
        (f"--output.dir {tmp_path}/file/run", "cannot be made"),
        (f"--data.source {tmp_path}/one.jsonl", "holds 1 example: too few to hold some out"),
        (f"--model.path {tmp_path}/empty-model", "holds no weights"),
        (f"--data.source {tiny}/text.jsonl --data.subset x", "data.subset belongs to hub data sets"),
        (f"--data.source {tiny}/text.jsonl --clients.a.source x --data.limit 3", "data.limit deals out one source"),
    ):
        assert main(["run", *flags.split()]) == 2
        assert sentence in capsys.readouterr().err
