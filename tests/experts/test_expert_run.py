"""A run that trains two data sets together, its file, exact resuming, what tasks share, refusals."""

from tiny_run import TINY_RUN

OWN = ("--data.", "--trainer.max_epochs", "--seed", "--model.max_radius")
ARGUMENTS = [
    *(word for word in TINY_RUN if not word.startswith(OWN)),
    *("--seed=1", "--data.batch_size=4", "--trainer.max_epochs=-1", "--experts.num_experts=3"),
    *("--experts.channels=4", "--experts.hidden_channels=8", "--checkpoint_every_n_steps=1"),
    *("--model.num_layers=1", "--model.max_neighbors=6", "--model.max_radius=3.0"),
]
"""Words of a run without its data."""
