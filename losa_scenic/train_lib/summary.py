"""What a finished run leaves for people and programs: summary.json, a table, a tuned backbone."""

import json
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import flax
import jax

from losa_scenic import __version__
from losa_scenic.adapt_lib import fold
from losa_scenic.adapt_lib.method import combine, split_head
from losa_scenic.common_lib import trees
from losa_scenic.common_lib.types import Config, Params
from losa_scenic.model_lib import encoder
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import progress
from losa_scenic.train_lib.program import Program
from losa_scenic.train_lib.state import TrainState
from losa_scenic.weights_lib import backbones


def content(
  model: ClassificationModel,
  state: TrainState,
  frozen: Params,
  config: Config,
  meta_data: Mapping[str, Any],
  start: int | None,
  bar: progress.Progress,
  evaluation: Mapping[str, float],
) -> dict[str, Any]:
  """The content of summary.json.

  Accuracies are in [0, 1], `test_accuracy` null if the test split was left out; parameter counts
  are scalars; `trainable_params` leaves out the classifier, whose count is `head_params`;
  `train_images_per_second` covers this process's steps without compilation and evaluation, and is
  null if it trained fewer than two; `backbone_facts` says of a public checkpoint which fields of
  its spec are from elsewhere than the shapes of its tensors, and from where.
  """
  rest, head = split_head(state.trainable)
  return {
    'test_accuracy': None,
    **evaluation,
    'trainable_params': trees.count(rest),
    'head_params': trees.count(head),
    'frozen_params': trees.count(frozen),
    'train_images_per_second': bar.images_per_second or None,
    'num_steps': int(state.global_step),
    'seed': config.rng_seed,
    'method': config.method,
    'backbone': config.backbone,
    'backbone_sha256': model.backbone.sha256,
    'preprocessing': {
      'image_size': model.backbone.spec.image_size,
      'interpolation': meta_data.get('interpolation', ''),
      'mean': list(model.backbone.spec.mean),
      'std': list(model.backbone.spec.std),
    },
    'backbone_facts': {
      field: origin for field, origin in model.backbone.facts.items() if origin != 'shapes'
    },
    'dataset': _dataset(config),
    'metric': meta_data.get('metric', 'accuracy'),
    'num_train_examples': meta_data['num_train_examples'],
    'resumed_from_step': start,
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'versions': {
      'losa_scenic': __version__,
      'jax': jax.__version__,
      'flax': flax.__version__,
      'python': platform.python_version(),
    },
  }


def of_training(workdir: pathlib.Path) -> dict[str, Any]:
  """What only the process that trained could know, from the summary it left (if it did)."""
  path = workdir / 'summary.json'
  former = json.loads(path.read_text()) if path.exists() else {}
  return {k: former[k] for k in ('train_images_per_second', 'resumed_from_step') if k in former}


def _dataset(config: Config) -> str:
  path = config.dataset_configs.get('path')
  return f'{config.dataset_name}:{pathlib.Path(path).stem}' if path else config.dataset_name


def guesses(name: str, backbone: backbones.Backbone) -> str:
  """A line on what a public checkpoint does not say itself, by convention; '' of other backbones.

  Args:
    name: of the backbone, as in the config.
    backbone: the backbone.
  """
  if not backbone.facts:
    return ''
  values = {field: getattr(backbone.spec, field, None) for field in backbone.facts}
  guessed = [
    f'{field} {_text(values[field])}'
    for field, origin in backbone.facts.items()
    if origin == 'convention'
  ]
  return f'backbone {name}: {backbone.family}; by convention: {", ".join(guessed) or "nothing"}'


def _text(value: Any) -> str:
  return '/'.join(f'{v:g}' for v in value) if isinstance(value, tuple) else str(value)


def as_table(summary: Mapping[str, Any], workdir: pathlib.Path) -> str:
  """The summary as a few lines for people."""
  rate = summary['train_images_per_second']
  split = 'test' if summary['test_accuracy'] is not None else 'valid'
  percent = f'{100 * summary[f"{split}_accuracy"]:.2f} %'
  if summary['metric'] == 'per_class':
    percent += ' (mean over classes)'
  rows = {
    f'{split} accuracy': percent,
    'trained parameters': f'{summary["trainable_params"]:,} (without the head)',
    '  with the head': f'{summary["trainable_params"] + summary["head_params"]:,}',
    'frozen parameters': f'{summary["frozen_params"]:,}',
    'training speed': f'{rate:.0f} images/s' if rate else 'nothing left to train',
    'outputs': str(workdir),
    'curves': f'tensorboard --logdir {workdir}',
  }
  return progress.table(
    f'\n{summary["method"]} on {summary["dataset"]}, backbone {summary["backbone"]}', rows
  )


def export_backbone(
  program: Program,
  state: TrainState,
  config: Config,
  evaluation: Mapping[str, float],
) -> None:
  """Writes the tuned backbone, without classifier, where `config.export_backbone` says.

  What the method inserted is merged into the weights (see `fold`).
  """
  model = program.model.flax_model
  params = combine(jax.device_get(state.trainable), jax.device_get(program.frozen))
  params = fold.fold(model, params)
  stacked = params if model.scan else encoder.stack_layers(params)
  recipe = config.to_dict()
  # The card travels with the weights: names of files, not where they lay on this machine.
  if recipe['dataset_configs'].get('path'):
    recipe['dataset_configs']['path'] = pathlib.Path(recipe['dataset_configs']['path']).name
  recipe['export_backbone'] = pathlib.Path(config.export_backbone).name
  if program.model.backbone.weights is not None:
    recipe['backbone'] = pathlib.Path(config.backbone).name
  card = {
    'config': recipe,
    'dataset': _dataset(config),
    'num_steps': int(state.global_step),
    'seed': config.rng_seed,
    **evaluation,
  }
  backbones.save(
    pathlib.Path(config.export_backbone),
    program.model.backbone.spec,
    jax.tree.map(jax.numpy.asarray, stacked),
    dtype='float16',
    card=card,
  )
