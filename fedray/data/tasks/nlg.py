"""Texts for structured input, with several references (E2E NLG): BLEU, NIST, METEOR, ROUGE-L and CIDEr."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedray.data.tasks.base import Example, Statistics, Task
from fedray.data.tasks.generating import Generating
from fedray.data.tasks.instruction import COLUMNS, WORDS

if TYPE_CHECKING:
    from datasets import Dataset

    from fedray.config.sections import Config, DataSection

#: The modules of the extra `fedray[nlg]`.
_NEEDED = ("sacrebleu", "nltk", "rouge_score", "pycocoevalcap")


class NLG(Generating):
    """Held-out rows of one input are one question, and all their answers its references. Metrics, each by the library
    that people compare with: BLEU (sacrebleu, 0 to 100), NIST and METEOR (nltk; METEOR without WordNet, which no
    package brings: exact words and stems), ROUGE-L (rouge-score, F1 against the nearest reference), CIDEr
    (pycocoevalcap), and mean loss of the first reference."""

    name = "nlg"
    model = "causal-lm"
    metric = "bleu"
    reported: ClassVar[dict[str, bool]] = {
        "bleu": True,
        "nist": True,
        "meteor": True,
        "rouge_l": True,
        "cider": True,
        "loss": False,
    }
    higher_is_better = True
    target = "completion"
    labelled = False
    options: ClassVar[dict[str, str]] = COLUMNS | WORDS
    takes_builtin = False

    @classmethod
    def questions(cls, data: DataSection, examples: Dataset, text: str) -> list[str] | None:
        about = data.input or ("input" if "input" in examples.column_names and text != "input" else None)
        inputs = examples[about] if about in examples.column_names else [None] * len(examples)
        asked = [value[:-1] if isinstance(value, list) else value for value in examples[text]]
        return [json.dumps(both) for both in zip(asked, inputs, strict=True)]

    @classmethod
    def check(cls, config: Config, tasks: Mapping[str, type[Task]]) -> None:
        super().check(config, tasks)
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise ValueError(f"model.task nlg needs {missing[0]}: pip install fedray[nlg]")

    def encode_held_out(self, examples: Dataset) -> list[Example]:
        first: dict[str, int] = {}
        references: dict[str, list[str]] = {}
        for i, messages in enumerate(self._conversations(examples)):
            asked = json.dumps(messages[:-1])
            first.setdefault(asked, i)
            references.setdefault(asked, []).append(messages[-1]["content"])
        found = super().encode_held_out(examples.select(first.values()))
        return [
            dataclasses.replace(example, about=json.dumps(each))
            for example, each in zip(found, references.values(), strict=True)
        ]

    def reference(self, examples: Dataset, i: int, answer: str) -> str:
        return json.dumps([answer])

    def judged(self, example: Example, said: str) -> Statistics:
        return {"said": " ".join(said.split()), "references": json.loads(example.about)}

    def metrics(self, statistics: Sequence[Statistics]) -> dict[str, float]:
        said, references = [s["said"] for s in statistics], [s["references"] for s in statistics]
        return {**scores(said, references), **super().metrics(statistics)}


def scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The five metrics of texts against the references of each."""
    import sacrebleu  # and the others: seconds that only this needs
    from nltk.translate.nist_score import corpus_nist
    from pycocoevalcap.cider.cider import Cider
    from rouge_score.rouge_scorer import RougeScorer

    most = max(len(each) for each in references)
    streams: Any = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    words, of_references = [_words(s) for s in said], [[_words(r) for r in each] for each in references]
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    nearest = [
        max(rouge.score(r, s)["rougeL"].fmeasure for r in each) for s, each in zip(said, references, strict=True)
    ]
    cider, _ = Cider().compute_score(
        {i: [" ".join(r) for r in each] for i, each in enumerate(of_references)},
        {i: [" ".join(s)] for i, s in enumerate(words)},
    )
    meteor = [_meteor(s, each) for s, each in zip(words, of_references, strict=True)]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(said), streams).score),
        "nist": float(corpus_nist(of_references, words, n=5)) if any(words) else 0.0,
        "meteor": sum(meteor) / len(meteor),
        "rouge_l": sum(nearest) / len(nearest),
        "cider": float(cider),
    }


def _words(text: str) -> list[str]:
    """In lower case, as WMT's scripts cut a text (sacrebleu's 13a)."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words: list[str] = Tokenizer13a()(text.lower()).split()
    return words


class _NoWordNet:
    """A dictionary without synonyms."""

    @staticmethod
    def synsets(word: str) -> list[object]:
        return []


def _meteor(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    from nltk.translate.meteor_score import meteor_score

    return float(meteor_score(references, said, wordnet=_NoWordNet()))
