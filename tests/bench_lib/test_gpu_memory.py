"""Memory of a step on a GPU that is not there: the command, its mistakes, and JAX's CUDA plugin."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from losa_scenic import bench
from losa_scenic.bench_lib import gpu_memory
from losa_scenic.common_lib import errors

PLUGIN = importlib.util.find_spec('jax_plugins') and importlib.util.find_spec(
  'jax_plugins.xla_cuda12'
)
needs_plugin = pytest.mark.skipif(
  not PLUGIN, reason="JAX's CUDA plugin is not installed: pip install 'losa_scenic[gpu]'"
)
SMALL = ('--backbone=test/8', '--method=losa')


@pytest.fixture(autouse=True)
def platforms():
  """Later tests find the devices that they would have found."""
  jax.devices()
  before = jax.config.jax_platforms
  yield
  jax.config.update('jax_platforms', before)


class Plan:
  """What XLA says of a compiled step, in bytes."""

  argument_size_in_bytes = 1000
  output_size_in_bytes = 300
  alias_size_in_bytes = 280
  temp_size_in_bytes = 5


class Compiled:
  def memory_analysis(self) -> Plan:
    return Plan()


def test_outputs_in_the_place_of_arguments_count_once(monkeypatch):
  monkeypatch.setattr(gpu_memory, 'compile_step', lambda *args, **kwargs: Compiled())
  memory = gpu_memory.of_step()
  assert memory == gpu_memory.Memory(arguments=1000, outputs=20, temporary=5)
  assert memory.total == 1025
  assert list(memory.parts().items())[-1] == ('total', 1025)


def test_the_command_says_what_is_compiled(monkeypatch, capsys):
  given = []

  def compile_step(*args):
    given.extend(args)
    return Compiled()

  monkeypatch.setattr(gpu_memory, 'compile_step', compile_step)
  more = ['--set', 'rank=3', '--batch_size=7', '--num_classes=5', '--dtype=float32', '--remat']
  more += ['--devices=4', '--fsdp=2']
  assert bench.main(['memory', *SMALL, *more, '--attention=chunked', '--optimizer=adamw']) == 0
  model, tx, *rest = given
  assert rest == [7, np.dtype('float32'), 'chunked', 'h100', 4, 2]
  assert (model.num_classes, model.dtype, model.remat, model.scan) == (5, 'float32', True, True)
  weights = {'kernel': np.ones((2, 3), np.float32)}
  assert sum(np.size(leaf) for leaf in jax.tree.leaves(tx.init(weights))) == 2 * 6 + 2
  printed = json.loads(capsys.readouterr().out)
  assert printed['set'] == {'rank': 3} and printed['layer_loop'] == 'scan'
  assert (printed['devices'], printed['fsdp']) == (4, 2)
  assert printed['total_mib'] == round(1025 / 2**20, 1)


@pytest.mark.parametrize(
  ('method', 'loop', 'scan'),
  [('full', 'auto', True), ('full', 'unroll', False), ('linear', 'scan', True)],
)
def test_the_loop_over_layers_is_that_of_a_run(monkeypatch, method, loop, scan):
  def compile_step(model, *_):
    assert model.scan == scan
    return Compiled()

  monkeypatch.setattr(gpu_memory, 'compile_step', compile_step)
  result = gpu_memory.of_method('test/8', method, layer_loop=loop)
  assert result['layer_loop'] == ('scan' if scan else 'unroll')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--dtype=float16'], "Unknown dtype 'float16'. Did you mean 'bfloat16'"),
    (['--target=h101'], "Unknown GPU 'h101'. Did you mean 'h100'"),
    (['--optimizer=adam'], "Unknown optimizer 'adam'. Did you mean 'adamw'"),
    (['--layer_loop=scam'], "Did you mean 'scan'"),
    (['--attention=fuse'], "Did you mean 'fused'"),
    (['--batch_size=0'], 'batch_size must be an integer of at least 1'),
    (['--num_classes=0'], 'num_classes must be'),
    (['--devices=0'], 'devices must be an integer of at least 1'),
    (['--fsdp=0'], 'fsdp must be an integer of at least 1'),
    (['--set', 'rnk=3'], "Did you mean 'rank'"),
  ],
)
def test_mistakes_end_with_one_message(capsys, arguments, message):
  assert bench.main(['memory', *SMALL, *arguments]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert re.search(message, error), error


def test_backbone_and_method_are_needed(capsys):
  assert bench.main(['memory', '--method=losa']) == 1
  assert 'Give --backbone and --method' in capsys.readouterr().err


def test_without_the_plugin_it_says_what_to_install(monkeypatch, capsys):
  def no_plugin(**_):
    raise NotImplementedError('topology not\nimplemented for cuda')

  monkeypatch.setattr(gpu_memory.topologies, 'get_topology_desc', no_plugin)
  assert bench.main(['memory', *SMALL]) == 1
  error = capsys.readouterr().err
  assert "pip install 'losa_scenic[gpu]'" in error and error.count('\n') == 1


@pytest.mark.skipif(bool(PLUGIN), reason="JAX's CUDA plugin is installed")
def test_jax_itself_lacks_it():
  with pytest.raises(errors.UserError, match=r'losa_scenic\[gpu\]'):
    gpu_memory.of_method('test/8', 'losa')


@needs_plugin
def test_a_step_is_planned_without_a_gpu():
  # In a process of its own: without the tests' compiler options, and before anything used a device.
  keep = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS' and not k.startswith('JAX_')}

  def planned(*arguments: str) -> dict[str, float]:
    command = [sys.executable, '-m', 'losa_scenic.bench', 'memory', *arguments]
    done = subprocess.run(command, env=keep, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)

  model = ('--backbone=vivit-test/8x2', '--num_classes=10', '--batch_size=200')
  linear, full = (planned(*model, f'--method={method}') for method in ('linear', 'full'))
  counted = bench.params.count('vivit-test/8x2', 'linear', num_classes=10)
  # Frozen weights in two bytes, and clips of 4 x 32 x 32 pixels; the classifier is nothing.
  clips = 200 * 4 * 32 * 32 * 3
  expected = (2 * counted['frozen_params'] + clips) / 2**20
  assert linear['arguments_mib'] == pytest.approx(expected, abs=0.1)
  # All weights in four bytes, and their momentum.
  expected = (8 * counted['frozen_params'] + clips) / 2**20
  assert full['arguments_mib'] == pytest.approx(expected, abs=0.1)
  assert full['total_mib'] > linear['total_mib'] > linear['arguments_mib']
  # Two GPUs share the layers: four square matrices and two of the MLP, biases and norms.
  model = ('--backbone=S/16', '--method=linear', '--layer_loop=scan')
  alone, shared = planned(*model), planned(*model, '--devices=2', '--fsdp=2')
  layers = 12 * (4 * 384 * 384 + 2 * 384 * 1536 + 9 * 384 + 1536)
  saved = alone['arguments_mib'] - shared['arguments_mib']
  assert saved == pytest.approx(2 * layers / 2 / 2**20, abs=0.2)
