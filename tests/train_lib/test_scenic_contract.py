"""The signatures and fields that Scenic's projects rely on (google-research/scenic at 4a38d47)."""

import dataclasses
import inspect

import flax.linen as nn
import pytest

from losa_scenic import main
from losa_scenic.dataset_lib import datasets
from losa_scenic.dataset_lib.dataset_utils import Dataset
from losa_scenic.model_lib import models
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import lr_schedules, optimizers, run_config, steps, trainer, writers

KEYWORD = inspect.Parameter.KEYWORD_ONLY


def keywords(fn) -> list[str]:
  return [p.name for p in inspect.signature(fn).parameters.values() if p.kind is KEYWORD]


def positional(fn) -> list[str]:
  return [p.name for p in inspect.signature(fn).parameters.values() if p.kind is not KEYWORD]


def test_main():
  assert keywords(main.main) == ['rng', 'config', 'workdir', 'writer']
  assert positional(main.main) == []


def test_train():
  names = ['rng', 'config', 'model_cls', 'dataset', 'workdir', 'writer']
  assert keywords(trainer.train) == names
  assert positional(trainer.train) == []
  assert trainer.get_trainer('classification') is trainer.train


def test_step_names():
  """Ours take the frozen parameters apart, and what Scenic hides in its state or config."""
  assert {'flax_model', 'loss_fn', 'metrics_fn'} <= set(keywords(steps.train_step))
  assert {'flax_model', 'metrics_fn'} <= set(keywords(steps.eval_step))
  assert positional(steps.train_step)[-1] == positional(steps.eval_step)[-1] == 'batch'


def test_dataset_fields():
  assert [field.name for field in dataclasses.fields(Dataset)] == [
    'train_iter',
    'valid_iter',
    'test_iter',
    'meta_data',
    'train_ds',
    'valid_ds',
    'test_ds',
    'train_multi_iter',
    'valid_multi_iter',
    'test_multi_iter',
    'train_multi_ds',
    'valid_multi_ds',
    'test_multi_ds',
  ]


def test_meta_data_and_batches():
  dataset = datasets.build_dataset('digits', batch_size=4, eval_batch_size=4, image_size=8)
  assert {
    'num_classes',
    'input_shape',
    'input_dtype',
    'num_train_examples',
    'num_eval_examples',
    'target_is_onehot',
  } <= dataset.meta_data.keys()
  assert dataset.meta_data['input_shape'] == (-1, 8, 8, 3)
  assert next(dataset.train_iter).keys() >= {'inputs', 'label', 'batch_mask'}


@pytest.mark.parametrize(
  'method,names',
  [
    ('__init__', ['self', 'config', 'dataset_meta_data']),
    ('get_metrics_fn', ['self', 'split']),
    ('get_metrics_fn_jit', ['self', 'split']),
    ('loss_function', ['self', 'logits', 'batch', 'model_params']),
    ('build_flax_model', ['self']),
    ('default_flax_model_config', ['self']),
  ],
)
def test_base_model_methods(method, names):
  assert positional(getattr(ClassificationModel, method)) == names
  assert keywords(getattr(ClassificationModel, method)) == []


def test_base_model_attributes():
  model = models.get_model_cls('classification')(None, {'num_classes': 3})
  assert model.config.method == 'losa'
  assert model.dataset_meta_data == {'num_classes': 3}
  assert isinstance(model.flax_model, nn.Module)
  call = inspect.signature(type(model.flax_model).__call__).parameters
  assert call['train'].kind is KEYWORD
  assert 'output_projection' in model.flax_model.param_shapes()


def test_config_fields_have_scenics_names():
  assert {
    'rng_seed',
    'dataset_name',
    'dataset_configs',
    'data_dtype_str',
    'batch_size',
    'eval_batch_size',
    'checkpoint',
    'checkpoint_steps',
    'max_checkpoint_keep',
    'log_summary_steps',
    'log_eval_steps',
    'lr_configs',
    'model_name',
    'trainer_name',
    'num_training_steps',
    'num_training_epochs',
    'optimizer',
    'optimizer_configs',
    'max_grad_norm',
    'label_smoothing',
    'shuffle_seed',
    'model_dtype_str',
  } <= set(run_config.default_config())


def test_factories_and_writers():
  assert positional(lr_schedules.get_learning_rate_fn)[0] == 'config'
  assert positional(optimizers.get_optimizer)[:2] == ['config', 'learning_rate']
  for name in ('write_scalars', 'write_images', 'write_texts', 'write_hparams', 'flush', 'close'):
    assert callable(getattr(writers.MultiWriter, name))
  for name in ('write_scalars', 'write_images', 'write_texts'):
    assert positional(getattr(writers.MultiWriter, name))[1] == 'step'
