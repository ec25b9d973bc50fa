"""Selects the features for Head2Toe's second stage from a finished run of its first.

  python -m losa_scenic.head2toe_select WORKDIR --keep=0.01 --output=FILE.json

Reads the classifier W [features classes] of the run's last checkpoint and keeps that share of the
features whose |W_i|_2 is largest. The second stage is a new run of the same backbone with

  --config.method=head2toe --config.method_configs.head2toe.selection=FILE.json
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Float

from losa_scenic.adapt_lib import head2toe, methods, selection
from losa_scenic.adapt_lib.method import HEAD, partition
from losa_scenic.common_lib import errors
from losa_scenic.common_lib.types import Config
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import checkpoints, optimizers
from losa_scenic.train_lib import workdir as workdir_lib
from losa_scenic.train_lib.state import TrainState


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code: 0, or 1 with one message on stderr."""
  args = _parser().parse_args(argv)
  try:
    content = select(args.workdir, args.keep)
    try:
      workdir_lib.write_json(args.output, content)
    except OSError as e:
      raise errors.UserError(f'Cannot write {args.output}: {e.strerror}.') from None
  except errors.UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  print(f'kept {len(content["kept"])} of {content["num_features"]} features: {args.output}')
  return 0


def select(workdir: pathlib.Path, keep: float) -> dict[str, Any]:
  """The content of a file of selected features.

  Args:
    workdir: of a finished run with method 'head2toe' and no selection.
    keep: share of the features that stay, in (0, 1]; at least one does.

  Raises:
    errors.UserError: for a share out of range, a workdir that holds no such run, or a checkpoint
      that cannot be read.
  """
  if not 0 < keep <= 1:
    raise errors.UserError(f'--keep must be in (0, 1], got {keep}.')
  config, summary = (_read_json(workdir / f'{name}.json') for name in ('config', 'summary'))
  config = ml_collections.ConfigDict(config)
  options = methods.options(config)
  if config.method != 'head2toe' or options.get('selection'):
    raise errors.UserError(
      f"{workdir} is no first stage of Head2Toe: its method is '{config.method}', options "
      f"{options}; it must be 'head2toe' without a selection."
    )
  # The width of the classifier is not written down, but its size is: a row for each feature, and
  # a row of biases.
  target_size = options.get('target_size', head2toe.TARGET_SIZE)
  model = ClassificationModel(config, {'num_classes': 1})
  spec = model.backbone.spec
  total = sum(head2toe.tap_sizes(spec, target_size))
  model = ClassificationModel(config, {'num_classes': summary['head_params'] // (total + 1)})
  score = np.linalg.norm(_last_classifier(workdir, config, model), axis=1)
  order = np.argsort(-score, kind='stable')[: max(1, int(keep * total))]
  return selection.content(
    head2toe.identity(spec, target_size),
    sorted(order.tolist()),
    num_features=total,
    keep=keep,
    options=options,
    backbone_sha256=model.backbone.sha256,
    dataset=summary['dataset'],
    workdir=str(workdir),
  )


def _last_classifier(
  workdir: pathlib.Path, config: Config, model: ClassificationModel
) -> Float[np.ndarray, 'features classes']:
  """The classifier's kernel in the last checkpoint; the run's lock is held while it is read."""
  tx = optimizers.get_optimizer(config, lambda step: step * 0.0)
  trainable, _ = partition(model.flax_model.param_shapes(), model.flax_model.method)
  state = jax.eval_shape(lambda t: TrainState.create(t, tx, jax.random.key(0)), trainable)
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), state)
  with workdir_lib.locked(workdir):
    saved = checkpoints.Checkpoints(workdir, model.identity())
    try:
      if saved.latest_step() is None:
        raise errors.UserError(f'{workdir} holds no checkpoint.')
      restored, _ = saved.restore(state)
      return np.asarray(restored.trainable[HEAD]['kernel'])
    finally:
      saved.close()


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise errors.UserError(f'There is no {path}: no finished run is in that workdir.') from None
  except (OSError, ValueError) as e:
    raise errors.UserError(f'Cannot read {path}: {e}') from None


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m losa_scenic.head2toe_select',
    description="Selects the features for Head2Toe's second stage from a run of its first.",
  )
  parser.add_argument('workdir', type=pathlib.Path, help='of the finished first stage')
  parser.add_argument(
    '--keep', type=float, default=0.01, help='share of the features to keep (default: 0.01)'
  )
  parser.add_argument(
    '--output', type=pathlib.Path, required=True, help='the JSON file to write, for `selection`'
  )
  return parser


if __name__ == '__main__':
  sys.exit(main())
