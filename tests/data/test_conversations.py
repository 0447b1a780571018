"""Conversations token by token, answers out of words, choices and what is said after a prompt."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from support import rounds, run
from transformers import AutoTokenizer, ByT5Tokenizer

from fedray.config.read import from_dict
from fedray.data.encoded import Encoded
from fedray.data.partition import load_data
from fedray.data.tasks import IGNORED, TASKS, Example
from fedray.data.tasks.answers import as_number, result_of, same_result
from fedray.data.tasks.chat import cut, messages_of, pieces, tokens
from fedray.data.tasks.choice import _counts_from, _first_said, _place
from fedray.data.tasks.generating import prompt_of
from fedray.data.tasks.nlg import scores
from fedray.errors import ConfigError
from fedray.federation.prepare import prepare
from fedray.training.generation import Evaluated
from fedray.training.local import LocalTrainer

#: ChatML, as most instruction-tuned decoders have it: a line break after each turn's end.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: A template that keeps the thoughts of the last turn only.
FORGETS = (
    "{% for m in messages %}[{{ m.role }}]{% if loop.last %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(template=CHATML):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def said(*turns):
    return [{"role": role, "content": content} for role, content in turns]


TWO_TURNS = said(("user", "a?"), ("assistant", "b."), ("user", "c?"), ("assistant", "d."))


def scored(tokenizer, ids, labels):
    """The text of each run of tokens that are scored, and that nothing else is."""
    assert len(ids) == len(labels) and all(y in (IGNORED, i) for i, y in zip(ids, labels, strict=True))
    runs, last = [], False
    for i, y in zip(ids, labels, strict=True):
        if y != IGNORED:
            runs = runs if last else [*runs, []]
            runs[-1].append(i)
        last = y != IGNORED
    return [tokenizer.decode(r) for r in runs]


def test_only_the_answers_of_all_turns_are_scored_up_to_the_token_that_ends_each():
    tokenizer = byte_tokenizer()
    written = pieces(tokenizer, "chat", TWO_TURNS)
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert "".join(text for text, _ in written) == whole
    ids, labels = tokens(tokenizer, written)
    assert tokenizer.decode(ids) == whole
    assert scored(tokenizer, ids, labels) == ["b.<|im_end|>", "d.<|im_end|>"]
    assert labels[-1] == IGNORED  # the line break after the last turn


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        ("alpaca", "### Instruction:\na?\n\n### Response:\nb.</s>### Instruction:\nc?\n\n### Response:\nd.</s>", 2),
        ("plain", "a?b.</s>c?d.</s>", 2),
    ],
)
def test_without_a_chat_template(template, text, answers):
    tokenizer = byte_tokenizer(None)
    ids, labels = tokens(tokenizer, pieces(tokenizer, template, TWO_TURNS))
    assert tokenizer.decode(ids) == text and scored(tokenizer, ids, labels) == ["b.</s>", "d.</s>"][:answers]
    with pytest.raises(ConfigError, match=r"has no chat template: give data.template alpaca or plain"):
        pieces(tokenizer, "chat", TWO_TURNS)


def test_a_template_whose_answers_cannot_be_told_apart_is_refused():
    with pytest.raises(ConfigError, match="writes earlier turns anew"):
        pieces(byte_tokenizer(FORGETS), "chat", TWO_TURNS)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    with pytest.raises(ConfigError, match="refuses a conversation of the data: no system message"):
        pieces(byte_tokenizer(refuses), "chat", said(("system", "s"), ("user", "a"), ("assistant", "b")))


def test_messages_by_other_names_and_what_is_none():
    assert messages_of([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "x") == said(
        ("user", "a"), ("assistant", "b")
    )
    for bad in ([], "text", [{"role": "user"}], [{"role": "wizard", "content": "a"}], [{"role": "user", "content": 3}]):
        with pytest.raises(ConfigError, match="which is no"):
            messages_of(bad, "data.text 'm'")


@pytest.mark.parametrize("length", [2, 5, 9, 12, 40])
def test_a_long_prompt_loses_its_beginning_and_a_long_answer_its_end(length):
    ids, labels = list(range(20)), [IGNORED] * 10 + list(range(10, 18)) + [IGNORED] * 2
    short, kept = cut(ids, labels, length)
    assert len(short) == len(kept) == min(20, length)
    assert all(y in (IGNORED, i) for i, y in zip(short, kept, strict=True))
    answer = [y for y in kept if y != IGNORED]
    assert answer == list(range(10, 10 + len(answer))) and len(answer) == min(8, length - 1)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("48/2 = 24 clips.\n#### 72", "72"),
        ("#### 1,000", "1000"),
        ("She makes $18.00 a day.", "18"),
        ("The answer is 1,234.50.", "1234.5"),
        ("The final answer is: 50%.", "50"),
        ("Answer: -3/4", "-0.75"),
        ("the answer is \N{MINUS SIGN}7", "-7"),
        ("so \\boxed{\\frac{3}{4}} it is", "0.75"),
        ("\\boxed{\\dfrac12}", "0.5"),
        ("\\boxed{x^2 + 1}", "x^2+1"),
        ("first \\boxed{1}, no: \\boxed{2}", "2"),
        ("5 apples and 6 pears make 11", "11"),
        ("he has 3.5e3 of them", "3500"),
        ("The answer is 12 hours, not 13", "12"),
        ("x1 = 4", "4"),
        ("#### 2\n#### 3", "3"),
        ("It costs .5 dollars", "0.5"),
        ("2 + 2 = 4.", "4"),
        ("the answer is 10^2", "10^2"),
        ("\\boxed{ 12 }", "12"),
        ("no idea", None),
        ("", None),
        ("####", None),
        ("\\boxed{}", None),
        ("\\boxed{7", "7"),
        ("The answer is: 2\\sqrt{3}", "2\\sqrt{3}"),
        ("The answer is: (3,4).", "(3,4)"),
        ("The answer is: x^2+3", "x^2+3"),
        ("The answer is: $16\\pi$", "16\\pi"),
        ("The answer is: 10:30", "10:30"),
        ("The answer is that he has 5 apples.", "5"),
        ("The answer is **18 dollars**", "18"),
    ],
)
def test_what_an_answer_comes_to(text, result):
    found = result_of(text)
    assert (found is None) == (result is None)
    assert result is None or same_result(found, result)


def test_numbers_that_are_none_and_numbers_that_would_fill_the_memory():
    assert as_number("1e000000999999999") is None and as_number("7" * 5000) is None
    assert as_number("1e999999999") is None and as_number("1/0") is None and as_number("12 apples") is None
    assert not same_result("7", "7.1") and not same_result(None, None) and not same_result("x", "7")
    assert same_result("0.333333333", "1/3") and not same_result("0.33", "1/3")


def trainer_of(config):
    return LocalTrainer(config, "cpu", 1)


def write_rows(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def encoded(tmp_path, task, rows, held_out=False, **data):
    """A task's examples of these rows, with a byte tokenizer of ChatML."""
    source = write_rows(tmp_path / "rows.jsonl", rows * 8)
    section = {"source": str(source), "max_length": 120, **data}
    config = from_dict(
        {"engine": "inline", "model": {"path": "m", "task": task}, "data": section, "federation": {"clients": 1}}
    )
    loaded = load_data(config)
    one = TASKS[task](config, loaded, byte_tokenizer())
    return one, (one.encode_held_out(loaded.test) if held_out else one.encode(next(iter(loaded.train.values()))))


def test_rows_of_instruction_input_and_output_or_of_messages_are_the_same_conversations(tmp_path):
    task, by_columns = encoded(
        tmp_path, "instruction", [{"instruction": "add", "input": "1+1", "output": "2"}], system="be brief"
    )
    messages = said(("system", "be brief"), ("user", "add\n\n1+1"), ("assistant", "2"))
    _, by_messages = encoded(tmp_path, "instruction", [{"messages": messages}])
    assert by_columns[0] == by_messages[0]
    assert task.tokenizer.decode(by_columns[0].input_ids) == task.tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    batch = task.collate([by_columns[0], Example([5, 6], [5, 6])])
    assert (batch["labels"][1, 2:] == IGNORED).all() and (batch["attention_mask"][1] == 0).sum() == len(
        by_columns[0].input_ids
    ) - 2


def test_a_row_without_an_answer_is_named(tmp_path):
    rows = [{"instruction": "add", "output": "2"}, {"instruction": "add", "output": " "}]
    with pytest.raises(ConfigError, match=r"data.completion 'output' has no answer in row \d+"):
        encoded(tmp_path, "instruction", rows)
    with pytest.raises(ConfigError, match="no usual column of answers is there: choose one of instruction, other"):
        encoded(tmp_path, "instruction", [{"instruction": "add", "other": "2"}])
    with pytest.raises(ConfigError, match="comes to no result: mark it"):
        encoded(tmp_path, "math", [{"question": "how many?", "answer": "a few"}], held_out=True)


@pytest.mark.parametrize(
    ("task", "row", "sentence"),
    [
        (
            "instruction",
            {"instruction": "add", "output": ""},
            "client 'client-0': data.completion 'output' has no answer",
        ),
        (
            "math",
            {"question": "how many?", "answer": "a few"},
            "the held-out data: the answer of row 1 of the held-out",
        ),
        ("choice", {"instruction": "which?", "output": "b", "answer": "b"}, "the held-out data: row 1 of the held-out"),
    ],
)
def test_a_bad_row_is_refused_before_the_run_begins(make_config, tmp_path, task, row, sentence):
    source = write_rows(tmp_path / "bad.jsonl", [row] * 30)
    config = make_config(
        model={"path": make_config().model.path, "task": task},
        data={"source": str(source), "max_length": 64, "template": "plain"},
        generation={"max_new_tokens": 8},
    )
    with pytest.raises(ConfigError) as refused:
        prepare(config)
    assert str(refused.value).startswith(sentence)


def test_an_example_keeps_what_is_said_about_it_in_a_file(tmp_path):
    rows = [Example([1, 2], [1, 2], about="z\u00fcrich"), Example([3], [3]), Example([4], [4], about="x")]
    Encoded.of(rows).save(tmp_path / "kept")
    assert list(Encoded.load(tmp_path / "kept")) == rows


ARC = {"text": ["up", "down", "left"], "label": ["A", "B", "C"]}


@pytest.mark.parametrize(
    ("row", "data", "choices", "right"),
    [
        ({"question": "where?", "choices": ARC, "answerKey": "B"}, {"choices": "choices"}, ["up", "down", "left"], 1),
        ({"question": "where?", "a": "up", "b": "down", "label": 1}, {"choices": "a,b"}, ["up", "down"], 1),
        ({"question": "is it?", "answer": True}, {"choices": "yes/no"}, ["yes", "no"], 0),
        ({"question": "which?", "ends": ["x", "y"], "label": "y"}, {"choices": "ends"}, ["x", "y"], 1),
        (
            {"instruction": "so?\n\nAnswer format: true/false", "output": "it is false", "answer": "false"},
            {},
            ["true", "false"],
            1,
        ),
    ],
)
def test_choices_in_the_shapes_that_data_sets_have(tmp_path, row, data, choices, right):
    task, examples = encoded(tmp_path, "choice", [row], held_out=True, **data)
    about = json.loads(examples[0].about)
    assert about["choices"] == choices and about["right"] == right and len(about["answers"]) == len(choices)
    assert about["answers"][right] == [examples[0].input_ids, examples[0].labels]
    for choice, (ids, labels) in zip(choices, about["answers"], strict=True):
        assert scored(task.tokenizer, ids, labels)[0].removesuffix("<|im_end|>").endswith(choice)


def test_the_likeliest_choice_is_taken_and_the_likeliest_a_byte(tmp_path):
    row = {"question": "which?", "choices": ["a", "bbbb"], "label": 0}
    task, examples = encoded(tmp_path, "choice", [row], held_out=True, choices="choices")

    def forward(batch):
        """Every token has the same logit, `b` a larger one: four of them are likelier a byte, not as a whole."""
        logits = torch.zeros(*batch["input_ids"].shape, len(task.tokenizer))
        logits[..., task.tokenizer.convert_tokens_to_ids("b")] = 2.0
        return logits

    found = task.statistics(SimpleNamespace(forward=forward), examples[:1], task.collate(examples[:1]))
    assert found[0]["right"] == 1.0 and found[0]["right_per_byte"] == 0.0
    assert task.judged(examples[0], "The answer is a, not bbbb")["right"] == 1.0
    assert _first_said("The answer is B", list("ABCD")) == 1 and _first_said("I do not know: yes", ["yes", "no"]) == 0
    assert _first_said("100", ["10", "100"]) == 1 and _first_said("none", ["yes", "no"]) is None
    assert task.judged(examples[0], "bbbb or a")["right"] == 0.0 == task.judged(examples[0], "?")["right"]


def test_keys_that_are_numbers():
    assert _place(0, ["1", "2", "3", "0"], [], "row 1") == 0  # a class, whatever the answers say
    assert _counts_from(["1", "2", "1"], [["a", "b"]] * 3) == 1 and _place("2", ["a", "b"], [], "row 1", 1) == 1
    assert _counts_from(["0", "1"], [["a", "b"]] * 2) == 0
    with pytest.raises(ConfigError, match="counts from 0 or from 1 cannot be told"):
        _place("1", ["a", "b"], [], "row 1", _counts_from(["1", "1"], [["a", "b"]] * 2))


def test_a_question_is_never_cut_to_make_room_for_its_answer(tmp_path):
    row = {"question": "q" * 60, "answer": f"{'a' * 60} #### 7"}
    _, (example, *_) = encoded(tmp_path, "math", [row], held_out=True, max_length=100, template="plain")
    assert len(prompt_of(example)) == 60 and len(example.input_ids) == 100
    with pytest.raises(ConfigError, match="row 1 of the held-out data asks in 60 tokens, and data.max_length is 50"):
        encoded(tmp_path, "math", [row], held_out=True, max_length=50, template="plain")


def test_messages_in_columns_of_structs_and_without_an_answer(tmp_path):
    columns = {"role": ["user", "assistant"], "content": ["a", "b"]}
    assert messages_of(columns, "x") == said(("user", "a"), ("assistant", "b"))
    with pytest.raises(ConfigError, match="has no answer of the assistant in row 1"):
        encoded(tmp_path, "instruction", [{"messages": said(("user", "a"))}])


def test_the_templates_end_of_a_turn_ends_what_is_said(tmp_path):
    task, _ = encoded(tmp_path, "instruction", [{"instruction": "add", "output": "b"}])
    assert task.ends == (task.tokenizer.eos_token_id, task.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    dated = byte_tokenizer("{{ date_string }}" + CHATML)
    assert pieces(dated, "chat", TWO_TURNS)[0][0].startswith("26 Jul 2024")


def test_held_out_rows_of_one_input_are_one_question_with_all_references(tmp_path):
    rows = [{"mr": "an x", "ref": "one"}, {"mr": "an x", "ref": "two"}, {"mr": "an y", "ref": "three"}]
    task, _ = encoded(tmp_path, "nlg", rows, text="mr", completion="ref")
    examples = task.encode_held_out(Dataset.from_list(rows))
    assert [json.loads(example.about) for example in examples] == [["one", "two"], ["three"]]


def test_a_limit_of_held_out_inputs_leaves_each_its_references(tmp_path):
    for part, count in (("train", 2), ("test", 6)):
        rows = [{"mr": f"an x{i}", "ref": f"{word} {i}"} for word in ("one", "two") for i in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"path": str(tmp_path), "task": "nlg"}
    data = {"source": str(tmp_path), "text": "mr", "completion": "ref", "template": "plain", "test_limit": 4}
    config = from_dict({"model": model, "data": data, "federation": {"clients": 2}})
    test = load_data(config).test
    assert len(test) == 8 and len(set(test["mr"])) == 4


def test_a_limit_of_held_out_questions_looks_at_all_that_is_asked():
    nlg = TASKS["nlg"]
    section = from_dict({"model": {"task": "nlg", "path": "p"}, "data": {"source": "s"}}).data
    rows = [{"text": "write", "input": f"of {i // 2}", "output": str(i)} for i in range(6)]
    assert len(set(nlg.questions(section, Dataset.from_list(rows), "text"))) == 3
    turns = [[{"role": "user", "content": f"of {i // 2}"}, {"role": "assistant", "content": str(i)}] for i in range(6)]
    assert len(set(nlg.questions(section, Dataset.from_dict({"messages": turns}), "messages"))) == 3


def test_scores_are_those_of_the_libraries():
    import sacrebleu
    from nltk.translate.nist_score import corpus_nist
    from rouge_score.rouge_scorer import RougeScorer

    texts = ["the cat sat on the mat today", "a dog ran"]
    references = [["the cat sat on the mat", "a cat was on the mat today"], ["a dog ran fast"]]
    found = scores(texts, references)
    assert (
        found["bleu"]
        == sacrebleu.corpus_bleu(
            texts, [["the cat sat on the mat", "a dog ran fast"], ["a cat was on the mat today", None]]
        ).score
    )
    words = [t.split() for t in texts]
    assert found["nist"] == corpus_nist([[r.split() for r in each] for each in references], words, n=5)
    scorer = RougeScorer(["rougeL"])
    best = [max(scorer.score(r, t)["rougeL"].fmeasure for r in each) for t, each in zip(texts, references, strict=True)]
    assert found["rouge_l"] == pytest.approx(sum(best) / 2)
    perfect = scores(["the cat sat on the mat"], [["the cat sat on the mat"]])
    assert perfect["bleu"] == pytest.approx(100) and perfect["rouge_l"] == 1 and perfect["meteor"] > 0.99
    assert all(value == 0 for value in scores([""], [["the cat"]]).values())


def test_the_prompt_is_what_comes_before_the_last_answer():
    ids, labels = tokens(byte_tokenizer(), pieces(byte_tokenizer(), "chat", TWO_TURNS))
    prompt = byte_tokenizer().decode(prompt_of(Example(ids, labels)))
    assert prompt == byte_tokenizer().apply_chat_template(TWO_TURNS[:-1], tokenize=False, add_generation_prompt=True)


# --- what a model says ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(make_config):
    return trainer_of(make_config(worker__backend="torch"))


def evaluated(trainer, **section):
    config = from_dict({"generation": {"max_new_tokens": 6, **section}})
    trainer.set_mode(training=False)
    engine = trainer._rebuild(dict(trainer.factors))
    return Evaluated(engine, trainer.task, config.generation, trainer.device)


def test_what_is_said_greedily_is_the_likeliest_token_each_time_alone_or_in_a_batch(speaker):
    model, prompts = evaluated(speaker), [[40, 50, 60], [70], [80, 90, 100, 110, 120]]
    together = model.generate(prompts)
    for prompt, words in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(6):
            logits = model.forward({"input_ids": torch.tensor([ids])})[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == speaker.task.tokenizer.eos_token_id:
                ids.pop()
                break
        assert words == ids[len(prompt) :] == model.generate([prompt])[0]


def test_what_is_drawn_is_drawn_by_the_seed(speaker):
    model = evaluated(speaker, temperature=1.0, top_p=0.9)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate([[40, 50, 60], [70]]))
    assert runs[0] == runs[1] != runs[2]


def test_a_run_that_is_judged_by_what_the_model_says(make_config, tmp_path):
    rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(40)]
    source = write_rows(tmp_path / "sums.jsonl", rows)
    base = make_config()
    config = make_config(
        model={"path": base.model.path, "task": "math"},
        data={"source": str(source), "max_length": 64, "template": "plain"},
        generation={"max_new_tokens": 8},
    )
    records = rounds(run(config))
    assert [set(r["metrics"]) for r in records] == [{"accuracy", "answered", "loss"}] * 3
    assert records[-1]["metrics"]["loss"] < records[0]["metrics"]["loss"]


# --- a real model's template ------------------------------------------------------------------------------------


@pytest.mark.shared
def test_a_real_templates_conversation_is_its_own_token_by_token(smollm):
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    ids, labels = tokens(tokenizer, pieces(tokenizer, "chat", TWO_TURNS))
    assert ids == tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)
    assert scored(tokenizer, ids, labels) == ["b.<|im_end|>", "d.<|im_end|>"]
