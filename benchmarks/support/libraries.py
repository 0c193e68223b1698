"""One pass over a frozen model by other libraries that collect K-FAC factors."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from .workload import PASS, Work, Workload


def curvlinops_pass(workload: Workload, fisher: str) -> None:
    """Make the pass by curvlinops."""
    from curvlinops import KFACLinearOperator

    KFACLinearOperator(
        workload.model,
        nn.CrossEntropyLoss(),
        [module.weight for module in workload.layers.values()],
        workload.batches * PASS,
        fisher_type={"sampled": "mc", "empirical": "empirical"}[fisher],
        kfac_approx="expand",
        check_deterministic=False,
        num_data=PASS * workload.num_rows,
        num_per_example_loss_terms=workload.batches[0][1].numel() // len(workload.batches[0][0]),
    ).compute_kronecker_factors()


def kronfluence_pass(workload: Workload, fisher: str) -> Work:
    """Return work that makes the pass by kronfluence, on a copy of the model, which it wraps."""
    from kronfluence import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Pass(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits, labels = model(batch[0]), batch[1]
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            raise NotImplementedError

        def get_influence_tracked_modules(self):
            return workload.names

    task, device = Pass(), workload.model.place.device
    model = prepare_model(copy.deepcopy(workload.model), task).to(device)  # what it adds is on the CPU
    arguments = FactorArguments(use_empirical_fisher=fisher == "empirical")
    return lambda: fit_covariance_matrices_with_loader(
        model, State(cpu=device.type == "cpu"), task, workload.batches * PASS, arguments, disable_tqdm=True
    )
