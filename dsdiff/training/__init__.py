"""Training of the embedded model's parts. Nothing else in the project imports Lightning.

options: the options of a run and the contents of its config file, without torch.
modules: one Lightning module per kind of model, with its objective, optimizer and logging.
samples: grids of pictures written while a model trains.
loop: one run, from its config to the exported weights.
"""
