"""How a basis forms: pretraining of the paper's masked autoencoder, and tracking of any training's checkpoints.

`images` reads pixels, `mae` is the model, `training` trains and continues, `trajectory` and `track` follow
checkpoints, `callback` follows a training of transformers' Trainer, `formation` is the grid of experiments.
"""
