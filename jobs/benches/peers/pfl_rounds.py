"""pfl-research's simulator over clients that take one local step: seconds of each round, as JSON.

Run by `python jobs/bench.py overhead` with the Python of an environment that has pfl, torch, transformers and peft.
The model is the one that fedray steps on, with PEFT's LoRA on the same layer; `linear` in its place is one 316 x 316
layer, about as many numbers and next to no step.
"""

import itertools
import json
import sys
import time

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel

CLIENTS, ROUNDS = int(sys.argv[1]), int(sys.argv[2])
MODEL, TARGET, RANK, TOKENS = sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6])
ENDS: list[float] = []
torch.set_num_threads(1)


class Linear(torch.nn.Module):
    """One layer."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(316, 316)

    def loss(self, inputs, is_eval=False):
        return self.layer(inputs).square().mean()

    def metrics(self, inputs):
        return {}


class LanguageModel(torch.nn.Module):
    """A causal language model with LoRA on one layer."""

    def __init__(self):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        super().__init__()
        config = LoraConfig(r=RANK, target_modules=[TARGET])
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), config)

    def loss(self, ids, is_eval=False):
        logits = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def metrics(self, ids):
        return {}


class Timed(TrainingProcessCallback):
    """Notes when each round is over."""

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        ENDS.append(time.perf_counter())
        return False, Metrics()


module = Linear() if MODEL == "linear" else LanguageModel()
inputs = torch.randn(1, 1, 316) if MODEL == "linear" else torch.randint(3, 200, (1, 1, TOKENS))
trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
users = FederatedDataset(
    lambda user: Dataset(raw_data=[inputs[0]], user_id=str(user)), get_user_sampler("random", list(range(CLIENTS)))
)
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=ROUNDS, evaluation_frequency=10**6, train_cohort_size=CLIENTS, val_cohort_size=0
    ),
    backend=SimulatedBackend(training_data=users, val_data=None),
    model=PyTorchModel(
        module, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(trained, lr=1.0)
    ),
    model_train_params=NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=0.01, local_batch_size=1, local_max_grad_norm=1.0
    ),
    model_eval_params=NNEvalHyperParams(1),
    callbacks=[Timed()],
)
print(json.dumps([end - start for start, end in itertools.pairwise(ENDS)]))
