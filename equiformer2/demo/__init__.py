"""The main job from raw OC20 relaxations to adsorption energies and a pruned network (`make demo`)."""
