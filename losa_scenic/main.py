"""Trains and evaluates what a config describes.

  python -m losa_scenic.main --config=configs/quickstart.py [--workdir=DIR] [--config.KEY=VALUE ...]

Started again with the same command, a run that was interrupted continues from its last checkpoint.
"""

import pathlib

import jax

from losa_scenic import app
from losa_scenic.common_lib import config as config_lib
from losa_scenic.common_lib.types import Config
from losa_scenic.dataset_lib import datasets
from losa_scenic.model_lib import models
from losa_scenic.train_lib import run_config, trainer
from losa_scenic.train_lib.writers import Writer
from losa_scenic.weights_lib import backbones


def main(*, rng: jax.Array, config: Config, workdir: pathlib.Path, writer: Writer) -> None:
  """Config -> dataset, model class, trainer; and nothing else (Scenic's `main`)."""
  config = run_config.resolve(config)
  model_cls = models.get_model_cls(config.model_name)
  train = trainer.get_trainer(config.trainer_name)
  # The spec alone: the model opens the backbone itself, and some files are in memory while open.
  spec = backbones.find(config.backbone, config_lib.to_dict(config.backbone_configs)).spec
  dataset = datasets.of_run(config, spec)
  train(
    rng=rng,
    config=config,
    model_cls=model_cls,
    dataset=dataset,
    workdir=workdir,
    writer=writer,
  )


if __name__ == '__main__':
  app.run(main)
