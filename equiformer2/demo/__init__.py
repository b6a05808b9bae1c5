"""The main job from raw OC20 relaxations to an adsorption energy, in minutes (`make demo`)."""
