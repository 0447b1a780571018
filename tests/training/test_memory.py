"""A client that does not fit: what would is found by trying. The device's memory is a number of sequences here."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import rounds, run, trainer_and_view

from fedray.data.tasks.causal_lm import CausalLM
from fedray.training.memory import OutOfMemory, largest_that_fits


@given(most=st.integers(0, 70), too_many=st.integers(1, 64))
def test_the_largest_that_fits_is_found_in_few_tries(most, too_many):
    tried = []
    found = largest_that_fits(lambda n: tried.append(n) or n <= most, too_many)
    assert found == max(0, min(most, too_many - 1)) and len(tried) <= too_many.bit_length()
    assert all(0 < n < too_many for n in tried)


@pytest.fixture
def memory(monkeypatch):
    """A function: from now on so many sequences fit."""
    real = CausalLM.loss

    def shrink(most):
        def loss(self, forward, batch):
            value = real(self, forward, batch)
            if len(batch["input_ids"]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return value

        monkeypatch.setattr(CausalLM, "loss", loss)

    return shrink


@pytest.mark.parametrize("worker", [{"backend": "torch"}, {"zero_stage": 0}, {"zero_stage": 3}], ids=str)
@pytest.mark.parametrize(
    ("most", "words"),
    [
        (6, "8 sequences of 48 tokens at once and rank 2 do not fit on cpu; 6 do: set federation.accumulate to 2,"),
        (2, "; 2 do: set federation.accumulate to 4, the batch stays the same"),
        (0, ", nor does 1: lower adapter.rank or data.max_length"),
    ],
)
def test_the_sentence_names_what_fits_and_it_does(make_config, memory, worker, most, words):
    config = make_config(worker={"cpus": 1} | worker, federation__batch_size=8)
    trainer, view = trainer_and_view(config)
    memory(most)
    with pytest.raises(OutOfMemory) as error:
        trainer.train(view, "client-0", 0)
    assert words in str(error.value)
    trainer.reset()
    if most:
        accumulate = int(str(error.value).split("accumulate to ")[1].split(",")[0])
        config = make_config(worker={"cpus": 1} | worker, federation__batch_size=8, federation__accumulate=accumulate)
        trainer, view = trainer_and_view(config)
        assert trainer.train(view, "client-0", 0).loss > 0


def test_a_client_that_does_not_fit_is_left_out_and_the_next_one_trains_as_ever(make_config, memory):
    options = dict(federation__rounds=2, federation__quorum=0.5, federation__optimizer="sgd")
    clients = {"client-1": {"batch_size": 8}}
    memory(4)
    folder = run(make_config(clients=clients, **options))
    for record in rounds(folder):
        (dropped,) = record["dropped"]
        assert dropped["client"] == "client-1" and "4 do: set federation.accumulate to 2" in dropped["reason"]
        assert not dropped["reason"].startswith("OutOfMemory")
