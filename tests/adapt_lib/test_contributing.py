"""The example of CONTRIBUTING.md: what a new method takes, followed to the letter."""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from losa_scenic import app
from losa_scenic.adapt_lib import fold, methods
from losa_scenic.adapt_lib.method import partition, split_head
from losa_scenic.common_lib import trees
from losa_scenic.main import main
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.vit import ViT

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / 'CONTRIBUTING.md').read_text()
FILE, BLOCK = re.findall(r'```python\n(.*?)```', TEXT, re.S)


@pytest.fixture
def ia3(tmp_path, monkeypatch):
  """The example's file, registered as the text says."""
  path = tmp_path / 'ia3.py'
  path.write_text(FILE)
  spec = importlib.util.spec_from_file_location('ia3', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  (line,) = re.findall(r"`('ia3': ia3\.build),`", TEXT)
  monkeypatch.setitem(methods.METHODS, *eval(f'{{{line}}}', {'ia3': module}).popitem())
  return methods


def model_of(methods, **options):
  spec = presets.preset('test/8')
  return Adapted(spec, methods.build('ia3', spec, options), 5)


def test_it_counts_starts_and_merges_as_the_text_says(ia3, random_like, make_batch):
  model = model_of(ia3)
  trainable, _ = partition(model.param_shapes(), model.method)
  assert trees.count(split_head(trainable)[0]) == 3 * (2 * 32 + 64)
  params, images = random_like(model.param_shapes()), make_batch(2)['inputs']
  merged = fold.fold(model, params)
  have = ViT(model.spec, {}).apply({'params': merged}, images)
  want = model.apply({'params': params}, images, method='features')
  np.testing.assert_allclose(have, want, atol=1e-4)
  start = model.init(jax.random.key(0), jnp.zeros(model.input_shape()))['params']
  plain = {k: v for k, v in trees.flatten(start['backbone']).items() if 'insert_' not in k}
  frozen = ViT(model.spec, {}).apply({'params': trees.unflatten(plain)}, images)
  assert np.array_equal(model.apply({'params': start}, images, method='features'), frozen)


def test_it_trains_from_the_command_line(ia3, tmp_path, capsys):
  argv = ['main', f'--config={ROOT / "configs" / "quickstart.py"}', f'--workdir={tmp_path / "run"}']
  argv += ['--config.method=ia3', '--config.method_configs.ia3.mlp=false']
  argv += ['--config.lr_configs.base_learning_rate=1e-2', '--config.backbone=test/8']
  argv += ['--config.random_backbone=true', '--config.num_training_steps=12']
  app.run(main, argv)
  assert 'ia3 on digits' in capsys.readouterr().out


def test_the_published_block_is_one(ia3):
  assert re.match(r"\s+'ia3': Published\(.*\),\n", BLOCK)
