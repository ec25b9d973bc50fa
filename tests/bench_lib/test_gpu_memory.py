"""Memory of a step on a GPU that is not there: the command, its mistakes, and JAX's CUDA plugin."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from losa_scenic import bench
from losa_scenic.bench_lib import gpu_memory, gpu_targets, plan_step
from losa_scenic.train_lib import device_speed

NAMES = ('test/8', 'vivit-B/16x2')
SMALL = ('--backbone=test/8', '--method=losa')


class Plan:
  """What XLA says of a compiled step, in bytes."""

  argument_size_in_bytes = 1000
  output_size_in_bytes = 300
  alias_size_in_bytes = 280
  temp_size_in_bytes = 5


class Compiled:
  def memory_analysis(self) -> Plan:
    return Plan()


def test_outputs_in_the_place_of_arguments_count_once():
  memory = plan_step.memory_of(Compiled())
  assert memory == plan_step.Memory(arguments=1000, outputs=20, temporary=5)
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
  step, *rest = given
  assert rest == ['h100-80gb', 4, 'chunked']
  assert (step.batch_size, step.frozen_dtype, step.mesh) == (4 * 7, 'float32', {'fsdp': 2})
  model, tx = step.model, step.tx
  assert (model.num_classes, model.dtype, model.remat, model.scan) == (5, 'float32', True, True)
  weights = {'kernel': np.ones((2, 3), np.float32)}
  assert sum(np.size(leaf) for leaf in jax.tree.leaves(tx.init(weights))) == 2 * 6 + 2
  printed = json.loads(capsys.readouterr().out)
  assert printed['set'] == {'rank': 3} and printed['layer_loop'] == 'scan'
  assert (printed['devices'], printed['fsdp']) == (4, 2)
  assert printed['total_mib'] == round(1025 / 2**20, 1)


def test_layers_may_be_rounded_and_in_the_memory_of_the_host(monkeypatch, capsys):
  steps = []

  def compile_step(step, *_):
    steps.append(step)
    return Compiled()

  monkeypatch.setattr(gpu_memory, 'compile_step', compile_step)
  layers = {}
  for more in (['--dtype=float32'], ['--backbone_quantisation=int8', '--stream_microbatches=2']):
    given = [*SMALL, '--frozen_memory=host', '--batch_size=4', *more]
    assert bench.main(['memory', *given]) == 0
    printed = json.loads(capsys.readouterr().out)
    layers[more[0]] = printed['host_mib']
    assert printed['host_mib'] == pytest.approx(steps[-1].sizes(1)['host'] / 2**20, abs=0.06)
  assert [step.model.stream.microbatches for step in steps] == [1, 2]
  assert steps[1].model.quantisation == 'int8'
  # Three layers of a width of 32, rows a little longer than what is in them.
  weights = 3 * (4 * 32 * 32 + 2 * 32 * 64)
  assert layers['--dtype=float32'] == pytest.approx(4 * weights / 2**20, rel=0.3)
  assert layers['--backbone_quantisation=int8'] == pytest.approx(weights / 2**20, abs=0.06)


@pytest.mark.parametrize(
  ('method', 'loop', 'scan'),
  [('full', 'auto', True), ('full', 'unroll', False), ('linear', 'scan', True)],
)
def test_the_loop_over_layers_is_that_of_a_run(monkeypatch, method, loop, scan):
  def compile_step(step, *_):
    assert step.model.scan == scan
    return Compiled()

  monkeypatch.setattr(gpu_memory, 'compile_step', compile_step)
  result = gpu_memory.of_method('test/8', method, layer_loop=loop)
  assert result['layer_loop'] == ('scan' if scan else 'unroll')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--dtype=float61'], "Unknown dtype 'float61'. Did you mean 'float16'"),
    (['--target=h100-40gb'], "Unknown GPU 'h100-40gb'. Did you mean 'h100-80gb'"),
    (['--target=v100-16gb'], "A v100-16gb multiplies no bfloat16 matrices: compute in 'float16'"),
    (['--optimizer=adam'], "Unknown optimizer 'adam'. Did you mean 'adamw'"),
    (['--layer_loop=scam'], "Did you mean 'scan'"),
    (['--attention=fuse'], "Did you mean 'fused'"),
    (['--batch_size=0'], 'batch_size must be an integer of at least 1'),
    (['--num_classes=0'], 'num_classes must be'),
    (['--devices=0'], 'devices must be an integer of at least 1'),
    (['--fsdp=0'], 'fsdp must be an integer of at least 1'),
    (['--set', 'rnk=3'], "Did you mean 'rank'"),
    (['--backbone_quantisation=int9'], "Did you mean 'int8'"),
    (['--frozen_memory=hots'], "Did you mean 'host'"),
    (['--stream_microbatches=2'], 'would have no effect'),
    (['--frozen_memory=host', '--fsdp=2', '--devices=2'], 'use one of the two'),
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
  assert "pip install 'losa_scenic[plan]'" in error and error.count('\n') == 1


def test_attention_is_that_of_the_gpu():
  short, long = (bench.params.models(name, 'linear', {}, {}, 5)[0].spec for name in NAMES)
  assert [gpu_memory.way_of('a100-40gb', spec) for spec in (short, long)] == ['fused'] * 2
  assert [gpu_memory.way_of('v100-16gb', spec) for spec in (short, long)] == ['plain', 'chunked']


@pytest.mark.parametrize('name', gpu_targets.TARGETS)
def test_data_sheets_agree_with_each_other(name):
  gpu = gpu_targets.find(name)
  # What `bench` and a run's log call the device must be in the one table of peaks.
  assert gpu.peak('float16') == device_speed.peak(gpu.kind, 'float16') > gpu.peak('float32') > 1e12
  assert (gpu.peak('bfloat16') is not None) == gpu.has_bfloat16
  gigabytes = re.search(r'\d+gb', name)
  sold = int(gigabytes[0][:-2]) if gigabytes else 24
  assert 0.9 * sold < gpu.memory / 2**30 < sold + 1e-9
  text = gpu.described()
  assert text.count('{') == text.count('}') and f'device_memory_size: {gpu.memory} ' in text
  # Float32 units, two operations a clock, make up what the data sheet says of plain float32.
  plain = {'v100-16gb': 15.7, 'h100-80gb': 66.9, 'l4': 30.3}.get(name, 19.5)
  assert gpu.cores * gpu.units * 2 * gpu.clock / 1e3 == pytest.approx(plain, rel=0.01)


@pytest.mark.plan
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
