"""What a finished run leaves for people and programs: summary.json, a table, a tuned backbone."""

import json
import os
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
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib import encoder
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.train_lib import progress
from losa_scenic.train_lib.program import Program
from losa_scenic.train_lib.state import TrainState
from losa_scenic.weights_lib import backbones

_OF_TRAINING = ('train_images_per_second', 'input_wait', 'resumed_from_step')


def content(
  model: ClassificationModel,
  state: TrainState,
  frozen: Params,
  config: Config,
  dataset: dataset_utils.Dataset,
  start: int | None,
  bar: progress.Progress,
  evaluation: Mapping[str, float],
) -> dict[str, Any]:
  """The content of summary.json.

  Accuracies are in [0, 1], `test_accuracy` null if the test split was left out; parameter counts
  are scalars; `trainable_params` leaves out the classifier, whose count is `head_params`;
  `train_images_per_second` covers this process's steps without compilation and evaluation, and is
  null if it trained fewer than two, as is `input_wait`, the share of that time in which the run
  waited for data; `bad_images` counts those that could not be read; `backbone_facts` says of a
  public checkpoint which fields of its spec are from elsewhere than the shapes of its tensors, and
  from where.
  """
  rest, head = split_head(state.trainable)
  meta_data, spec = dataset.meta_data, model.backbone.spec
  return {
    'test_accuracy': None,
    **evaluation,
    'trainable_params': trees.count(rest),
    'head_params': trees.count(head),
    'frozen_params': trees.count(frozen),
    'train_images_per_second': bar.images_per_second or None,
    'input_wait': bar.input_wait if bar.images_per_second else None,
    'bad_images': len(dataset.train_ds.bad_files.problems),
    'num_steps': int(state.global_step),
    'seed': config.rng_seed,
    'method': config.method,
    'backbone': config.backbone,
    'backbone_sha256': model.backbone.sha256,
    'preprocessing': {
      'image_size': spec.image_size,
      'interpolation': meta_data.get('interpolation', ''),
      'central_crop': meta_data.get('central_crop'),
      'train_crops': meta_data.get('train_crops'),
      'clips': meta_data.get('clips'),
      'mean': list(spec.mean),
      'std': list(spec.std),
    },
    'backbone_facts': {
      field: origin for field, origin in model.backbone.facts.items() if origin != 'shapes'
    },
    'dataset': _dataset(config, meta_data.get('name') or config.dataset_name),
    'data': list(meta_data.get('about', ())),
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
  return {k: former[k] for k in _OF_TRAINING if k in former}


def _dataset(config: Config, name: str) -> str:
  """Name of the set, and which of its kind."""
  options = config.dataset_configs
  part, root = options.get('task') or options.get('name'), options.get('root')
  if not part and root:
    path = pathlib.Path(root).expanduser().absolute()
    part = path.name if path.is_dir() else path.stem
  return f'{name}:{part}' if part else name


def data_lines(meta_data: Mapping[str, Any], spec: BackboneSpec) -> list[str]:
  """What the data is and how the model sees it, a line each, for the start of a run."""
  names = [str(name) for name in meta_data['class_names']]
  shown = ', '.join(names[:5]) + (', ...' if len(names) > 5 else '')
  counts = ((meta_data[f'num_{k}_examples'], n) for k, n in _PARTS.items())
  crop = meta_data.get('central_crop')
  view = 'the whole image' if crop is None else f'the central {crop:.1%} of the shorter side'
  mean, std = ('/'.join(f'{v:g}' for v in values) for values in (spec.mean, spec.std))
  return [
    *(f'data: {line}' for line in meta_data.get('about', ())),
    f'data: {len(names)} classes ({shown}); '
    + ', '.join(f'{count:,} {name}' for count, name in counts if count),
    *_clip_lines(meta_data.get('clips')),
    f'data: {view} to {spec.image_size} x {spec.image_size}, {meta_data.get("interpolation")}; '
    f'mean {mean}, std {std}',
  ]


def _clip_lines(sampling: Mapping[str, Any] | None) -> list[str]:
  if sampling is None:
    return []
  rate = sampling['frames_per_second']
  every = f'{sampling["frame_stride"]} apart' if sampling['frame_stride'] > 1 else 'one by one'
  short = {'loop': 'begin again', 'pad': 'stand still at their last frame'}
  views = sampling['num_test_clips'] * sampling['num_test_crops']
  return [
    f'data: clips of {sampling["num_frames"]} frames, '
    + (every if rate is None else f'{rate:g} a second')
    + f'; shorter ones {short[sampling["short_clips"]]}; {views} '
    + ('view' if views == 1 else 'views')
    + ' of each in testing'
  ]


_PARTS = {'train': 'training', 'eval': 'validation', 'test': 'test'}


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
  bad = summary.get('bad_images')
  split = 'test' if summary['test_accuracy'] is not None else 'valid'
  percent = f'{100 * summary[f"{split}_accuracy"]:.2f} %'
  if summary['metric'] == 'per_class':
    percent += ' (mean over classes)'
  rows = {
    f'{split} accuracy': percent,
    'trained parameters': f'{summary["trainable_params"]:,} (without the head)',
    '  with the head': f'{summary["trainable_params"] + summary["head_params"]:,}',
    'frozen parameters': f'{summary["frozen_params"]:,}',
    'training speed': _speed(summary),
    **({'bad images': f'{bad}, see bad_files.csv'} if bad else {}),
    'outputs': str(workdir),
    'curves': f'tensorboard --logdir {workdir}',
  }
  return progress.table(
    f'\n{summary["method"]} on {summary["dataset"]}, backbone {summary["backbone"]}', rows
  )


def _speed(summary: Mapping[str, Any]) -> str:
  rate, wait = summary['train_images_per_second'], summary.get('input_wait')
  if not rate:
    return 'nothing left to train'
  unit = 'clips' if summary['preprocessing'].get('clips') else 'images'
  return progress.speed(rate, wait or 0.0, unit)


def export_backbone(
  program: Program,
  state: TrainState,
  config: Config,
  name: str,
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
  for option, value in recipe['dataset_configs'].items():
    if option == 'root' or (isinstance(value, str) and os.path.isabs(os.path.expanduser(value))):
      recipe['dataset_configs'][option] = value and pathlib.Path(value).absolute().name
  recipe['export_backbone'] = pathlib.Path(config.export_backbone).name
  if program.model.backbone.weights is not None:
    recipe['backbone'] = pathlib.Path(config.backbone).name
  card = {
    'config': recipe,
    'dataset': _dataset(config, name),
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
