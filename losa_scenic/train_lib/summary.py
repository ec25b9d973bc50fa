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
from losa_scenic.common_lib import hosts, trees
from losa_scenic.common_lib.types import Config, Params
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib import encoder
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.model_lib.spec import BackboneSpec
from losa_scenic.train_lib import heartbeat, memory, progress, sharding
from losa_scenic.train_lib.program import Program
from losa_scenic.train_lib.state import TrainState
from losa_scenic.weights_lib import backbones

_OF_TRAINING = (
  'train_images_per_second',
  'images_per_second_per_device',
  'input_wait',
  'step_time',
  'mfu',
  'peak_host_memory_gb',
  'peak_device_memory_gb',
  'bad_steps',
  'devices',
  'processes',
  'device',
  'resumed_from_step',
)
_SHARES = ('input_wait', 'device_wait', 'host')


def content(
  model: ClassificationModel,
  state: TrainState,
  frozen: Params,
  config: Config,
  dataset: dataset_utils.Dataset,
  start: int | None,
  bar: progress.Progress,
  evaluation: Mapping[str, float],
  bad_steps: int = 0,
) -> dict[str, Any]:
  """The content of summary.json.

  Accuracies are in [0, 1], `test_accuracy` null if the test split was left out; parameter counts
  are scalars; `trainable_params` leaves out the classifier, whose count is `head_params`;
  `train_images_per_second`, of all devices together, covers this process's steps without
  compilation and evaluation, and is null if it trained fewer than two, as are
  `images_per_second_per_device`, `step_time`, the shares of that time in which the run waited for
  data, waited for the device, and did the rest on the host (`input_wait` is the first of them), and
  `mfu`, which is also null for devices whose peak is not known. Peaks of memory are in 2**30 bytes,
  of this process and of the fullest of its devices, null for a CPU. `bad_steps` counts those that
  were dropped because they were not finite, `bad_images` those that could not be read;
  `backbone_facts` says of a
  public checkpoint which fields of its spec are from elsewhere than the shapes of its tensors, and
  from where.
  """
  rest, head = split_head(state.trainable)
  meta_data, spec = dataset.meta_data, model.backbone.spec
  speed = bar.measurements()
  return {
    'test_accuracy': None,
    **evaluation,
    'trainable_params': trees.count(rest),
    'head_params': trees.count(head),
    'frozen_params': trees.count(frozen),
    'train_images_per_second': speed.get('img/sec'),
    'images_per_second_per_device': speed.get('img/sec/device'),
    'input_wait': speed.get('input_wait'),
    'step_time': {name: speed[name] for name in _SHARES} if speed else None,
    'mfu': speed.get('mfu'),
    'peak_host_memory_gb': memory.peak_host_gb(),
    'peak_device_memory_gb': memory.peak_device_gb(),
    'bad_steps': bad_steps,
    'bad_images': len(dataset.train_ds.bad_files.problems),
    'num_steps': int(state.global_step),
    'seed': config.rng_seed,
    'method': config.method,
    'backbone': config.backbone,
    'backbone_sha256': model.backbone.sha256,
    'backbone_quantisation': config.backbone_quantisation,
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
    'devices': jax.device_count(),
    'processes': jax.process_count(),
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
  try:
    former = json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    former = {}
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
  bad_images, bad_steps = summary.get('bad_images'), summary.get('bad_steps')
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
    'most memory': _memory(summary),
    **({'bad images': f'{bad_images}, see bad_files.csv'} if bad_images else {}),
    **({'bad steps': f'{bad_steps} dropped, see bad_steps.jsonl'} if bad_steps else {}),
    'outputs': str(workdir),
    'curves': f'tensorboard --logdir {workdir}',
  }
  return progress.table(
    f'\n{summary["method"]} on {summary["dataset"]}, backbone {summary["backbone"]}', rows
  )


def _speed(summary: Mapping[str, Any]) -> str:
  """In the words of the lines of a run."""
  shares = summary.get('step_time')
  if not summary['train_images_per_second'] or shares is None:
    return 'nothing left to train'
  values = {
    'img/sec': summary['train_images_per_second'],
    'img/sec/device': summary['images_per_second_per_device'],
    **shares,
    **({} if summary['mfu'] is None else {'mfu': summary['mfu']}),
  }
  unit = 'clips' if summary['preprocessing'].get('clips') else 'images'
  return heartbeat.fit(heartbeat.pieces(None, values, unit), 100)


def _memory(summary: Mapping[str, Any]) -> str:
  """'1.2 GB of the host, 8.1 GB of a device'."""
  places = {'host': 'the host', 'device': 'a device'}
  held = {place: summary.get(f'peak_{place}_memory_gb') for place in places}
  return ', '.join(
    f'{heartbeat.number(gb, 100)} GB of {places[place]}' for place, gb in held.items() if gb
  )


def export_backbone(
  program: Program,
  state: TrainState,
  config: Config,
  name: str,
  evaluation: Mapping[str, float],
) -> None:
  """Writes the tuned backbone, without classifier, where `config.export_backbone` says.

  What the method inserted is merged into the weights (see `fold`). In a run of several processes
  all must call it; process 0 writes.

  Raises:
    errors.UserError: on every process, if the file cannot be written in a run of several.
    OSError: in a run of one.
  """
  params = combine(sharding.fetch(state.trainable), sharding.fetch(program.frozen))
  hosts.on_first(lambda: _save_backbone(program, params, state, config, name, evaluation))


def _save_backbone(
  program: Program,
  params: Params,
  state: TrainState,
  config: Config,
  name: str,
  evaluation: Mapping[str, float],
) -> None:
  """Merges and writes `params`, which are in the memory of this process."""
  model = program.model.flax_model
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
