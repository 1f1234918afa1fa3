"""Whether this machine can train as ``distill`` says; asked before a model is loaded, and without importing torch
where there is no GPU."""

from tuneshift_dag.config.transfer import Transfer
from tuneshift_dag.errors import TuneshiftError
from tuneshift_dag.models.memory import gpu_count


def training_problem(transfer: Transfer) -> str | None:
    """What ``distill`` asks for that isn't here, with its repair; None when all is."""
    file, distill, gpus = transfer.folder / "transfer.yaml", transfer.config.distill, gpu_count()
    if distill.optimizer == "paged_adamw_8bit" and not gpus:
        return (
            f"{file}: distill.optimizer: 'paged_adamw_8bit' needs CUDA, and PyTorch sees no GPU here. Set it to adamw,"
            " or train on a machine with a GPU."
        )
    if gpus and distill.processes > gpus:
        return (
            f"{file}: distill.processes: {distill.processes} processes need a GPU each, and PyTorch sees {gpus}. Set it"
            f" to {gpus} or less."
        )
    return None


def check_training(transfer: Transfer) -> None:
    """Raise TuneshiftError with `training_problem`, if there is one."""
    problem = training_problem(transfer)
    if problem is not None:
        raise TuneshiftError(problem)
