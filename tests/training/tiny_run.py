"""A tiny run on the records of the genuine OC20 file, packed, which are read in a tenth of the time."""

from pathlib import Path

LMDB = Path(__file__).parents[1] / "fixtures" / "datasets_oc20" / "s2ef_val_20_packed.lmdb"

TINY_RUN = [
    "--seed=1",
    f"--data.train={LMDB}",
    f"--data.val={LMDB}",
    "--data.energy_kind=adsorption",
    "--data.batch_size=5",
    "--model.num_layers=2",
    "--model.lmax=2",
    "--model.mmax=2",
    "--model.sphere_channels=16",
    "--model.attn_hidden_channels=8",
    "--model.num_heads=2",
    "--model.attn_alpha_channels=8",
    "--model.attn_value_channels=4",
    "--model.ffn_hidden_channels=16",
    "--model.edge_channels=16",
    "--model.grid_resolution=8",
    "--model.num_distance_basis=16",
    "--model.max_radius=3.5",
    "--optim.lr=1e-3",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=1",
]
