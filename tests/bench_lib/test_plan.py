"""The command that plans a run: memory by part, the bound on time, options, and mistakes."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from losa_scenic import app, plan
from losa_scenic.adapt_lib.method import partition
from losa_scenic.bench_lib import (
  gpu_memory,
  gpu_targets,
  plan_batch,
  plan_options,
  plan_step,
  planner,
)
from losa_scenic.common_lib import errors, trees
from losa_scenic.dataset_lib import dataset_utils
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import optimizers, program, run_config

QUICK = '--config=configs/quickstart.py'
SMALL = (QUICK, '--config.backbone=test/8', '--config.random_backbone=True', '--num_classes=7')
MIB = 2**20


@pytest.fixture
def no_plugin(monkeypatch):
  def missing(**_):
    raise NotImplementedError('topology not\nimplemented for cuda')

  monkeypatch.setattr(gpu_memory.topologies, 'get_topology_desc', missing)


def config_of(*overrides):
  arguments = ['x', *SMALL[:-1], *(f'--config.{override}' for override in overrides)]
  return run_config.resolve(app.parse(arguments)[0])


def printed(capsys, *arguments):
  assert plan.main([*arguments]) == 0
  return capsys.readouterr().out


def test_a_plan_for_this_cpu_has_every_part(capsys):
  more = ['--config.optimizer=momentum', '--config.batch_size=6']
  found = json.loads(printed(capsys, *SMALL, *more, '--device=cpu', '--quick', '--json'))
  step = plan_step.of_config(config_of('optimizer=momentum', 'batch_size=6'), 7)
  trainable, frozen = partition(step.model.param_shapes(), step.model.method)
  memory = {name: round(size * MIB) for name, size in found['memory'].items()}
  near = {'abs': 0.06 * MIB}
  assert memory['frozen'] == pytest.approx(4 * trees.count(frozen), **near)
  assert memory['trainable'] == pytest.approx(4 * trees.count(trainable), **near)
  assert memory['optimizer'] == pytest.approx(memory['trainable'], **near)
  assert memory['total'] == pytest.approx(sum(memory.values()) - memory['total'], abs=0.5 * MIB)
  assert found['exact'] and found['fits'] and found['steps'] == 1
  assert found['config'] == 'configs/quickstart.py' and found['batch_size'] == 6
  assert 'options' not in found and 'largest_batch' not in found


def test_arguments_are_what_the_compiled_program_takes():
  # The model's weights by their shapes, and those that XLA counts.
  step = plan_step.of_config(config_of('frozen_dtype_str=bfloat16', 'data_dtype_str=float32'), 7)
  sizes = step.sizes(1)
  assert sizes['batch'] == 32 * (32 * 32 * 3 * 4 + 8) and not sizes['host']
  compiled = step.compile(jax.devices('cpu')[:1], None, None)
  # Small ones are padded to a multiple of some bytes.
  assert plan_step.memory_of(compiled).arguments == pytest.approx(sum(sizes.values()), rel=0.02)


def test_what_is_planned_is_what_a_run_compiles():
  config = config_of('grad_accum_steps=2', 'label_smoothing=0.1', 'max_bad_steps=2', 'remat=True')
  step = plan_step.of_config(config, 7)
  meta = {'num_classes': 7, 'num_train_examples': 100, 'input_shape': (-1, 32, 32, 3)}
  data = dataset_utils.Dataset(None, None, None, meta)
  made, state = program.build_program(
    rng=jax.random.key(0), config=config, model_cls=ClassificationModel, dataset=data
  )
  # Shapes and dtypes of what is stored.
  assert jax.tree.map(lambda x: (x.shape, x.dtype), (state, made.frozen)) == jax.tree.map(
    lambda x: (x.shape, x.dtype), step.state
  )
  # The same program, where the schedule of the learning rate is.
  step = dataclasses.replace(step, tx=optimizers.get_optimizer(config, made.learning_rate))

  def traced(fn):
    text = str(jax.make_jaxpr(lambda *args: fn(*args))(*step.state, step.batch()))
    return re.sub(r'0x[0-9a-f]+', '', text)

  assert traced(made.train_step.__wrapped__) == traced(step.function())


def test_mixed_images_have_labels_of_both():
  batch = plan_step.of_config(config_of('augment.mixup_alpha=0.2'), 7).batch(4)
  assert batch['partner_label'].dtype == jnp.int32 and batch['label_share'].shape == (4,)


def test_devices_share_frozen_layers_and_split_batches():
  step = plan_step.of_config(config_of('mesh.fsdp=2', 'layer_loop=scan'), 7)
  shared = step.sizes(2)
  whole = dataclasses.replace(step, mesh={}).sizes(1)
  layers = 4 * trees.count(step.state[1]['backbone']['encoder']['layers'])
  assert whole['frozen'] - shared['frozen'] == layers / 2
  assert (shared['trainable'], shared['batch']) == (whole['trainable'], whole['batch'] / 2)
  with pytest.raises(errors.UserError, match='batch_size 32 must be a positive multiple of 6'):
    step.sizes(6)


@pytest.mark.parametrize('method', ['linear', 'lora'])
def test_options_are_those_that_can_help(method):
  config = config_of(f'method={method}', 'grad_accum_steps=2')
  seen = []

  class Device:
    gpu, count = gpu_targets.find('l4'), 2

    def memory(self, step):
      seen.append(step)
      if step.accumulate > 2:
        raise errors.UserError('no')
      return plan_step.Memory(3 * MIB, 0, 0)

  step = plan_step.of_config(config, 7)
  rows = plan_options.tried(config, step, Device(), 7, 5 * MIB)
  wanted = {
    ('frozen_dtype_str', 'bfloat16'): 3.0,
    ('model_dtype_str', 'bfloat16'): 3.0,
    ('backbone_quantisation', 'int8'): 3.0,
    ('grad_accum_steps', 8): 'no',
    ('mesh.fsdp', 2): 3.0,
    **({('remat', True): 3.0} if method == 'lora' else {('frozen_memory', 'host'): 3.0}),
  }
  found = {next(iter(r['set'].items())): r.get('impossible', r.get('total')) for r in rows}
  assert found == wanted
  assert all(row['change'] == -2.0 for row in rows if 'total' in row)
  assert {s.accumulate for s in seen} == {2, 8} and config.grad_accum_steps == 2
  assert any(s.model.remat for s in seen) == (method == 'lora')


@pytest.mark.parametrize(
  ('total', 'capacity', 'size', 'least'),
  [
    (lambda n: 1000 + 7 * n, 8000, 32, 970),  # a line: 1,000 images
    (lambda n: 1000 + 7 * n, 8000, 4096, 970),  # from above
    (lambda n: 100 * n + n**2 // 20, 400_000, 64, 1850),  # bends up: 2,000
    (lambda n: 100 * n if n < 300 else 80 * n, 31_000, 64, 300),  # saves where it must: 384
    (lambda n: 10**9 + n, 100, 64, 0),
    (lambda n: 10, 100, 64, 0.97 * plan_batch.MOST),
  ],
)
def test_the_largest_batch_is_found_in_a_few_steps(total, capacity, size, least):
  asked = []

  def ask(n):
    asked.append(n)
    return total(n)

  found, size_of_it = plan_batch.largest(ask, size, total(size), 4, capacity)
  assert found >= least and len(asked) <= 4 and not any(n % 4 for n in asked)
  assert size_of_it == (total(found) if found else 0) and size_of_it <= capacity


def test_one_batch_is_planned_after_the_other(capsys, monkeypatch):
  monkeypatch.setattr(planner.Device, 'capacity', 6 * MIB)
  text = printed(capsys, *SMALL, '--device=cpu', '--config.method=linear')
  size = int(re.search(r'largest batch that fits: ([\d,]+) ', text)[1].replace(',', ''))
  step = plan_step.of_config(config_of('method=linear', f'batch_size={size}'), 7)
  device = planner.Device('cpu')
  assert size != 32 and 4 * MIB < device.memory(step).total <= 6 * MIB
  assert '--config.frozen_dtype_str=bfloat16: ' in text and 'no data sheet' in text


def test_time_is_bounded_by_operations_or_by_traffic(no_plugin):
  config = config_of('method=linear', 'model_dtype_str=bfloat16', 'batch_size=512')
  step, device = plan_step.of_config(config, 7), planner.Device('l4')
  kept = 5 * MIB
  many = planner.speed(step, device, kept)
  flops = 1e12 * many['tera_flops']
  assert many['compute_ms'] == pytest.approx(1e3 * flops / 121e12)
  assert many['step_ms'] == max(many['compute_ms'], many['bandwidth_ms'])
  assert many['images_per_second'] == pytest.approx(512e3 / many['step_ms'])
  one = planner.speed(dataclasses.replace(step, batch_size=1), device, kept)
  assert one['compute_ms'] < one['bandwidth_ms'] == one['step_ms']
  sizes = dataclasses.replace(step, batch_size=1).sizes(1)
  changes = sizes['trainable'] + sizes['optimizer'] + kept
  least = sizes['frozen'] + 2 * changes + sizes['batch']
  assert one['bandwidth_ms'] == pytest.approx(1e3 * least / 300.096e9)
  # A method that reaches into the layers reads their weights twice.
  deep = dataclasses.replace(
    plan_step.of_config(config_of('method=bitfit', 'model_dtype_str=bfloat16'), 7), batch_size=1
  )
  alone = planner.speed(dataclasses.replace(step, batch_size=1), device, 0)
  assert planner.speed(deep, device, 0)['bandwidth_ms'] > 1.5 * alone['bandwidth_ms']


def test_without_the_plugin_it_says_that_it_estimates(capsys, no_plugin):
  linear = '--config.method=linear'
  text = printed(capsys, *SMALL, linear, '--device=h100-80gb', '--devices=2')
  assert 'ESTIMATED' in text and 'what is kept, workspace and so the total are not' in text
  assert "pip install 'losa_scenic[plan]'" in text
  assert 'Compiled' not in text and 'fits into 80,482.9 MiB' in text
  found = json.loads(printed(capsys, *SMALL, '--device=l4', '--json', '--quick'))
  assert not found['exact'] and 'losa_scenic[plan]' in found['reason']


def test_a_v100_is_told_what_it_cannot_do(capsys, no_plugin):
  short = ['--config.model_dtype_str=bfloat16', '--device=v100-16gb', '--quick']
  assert plan.main([*SMALL, *short]) == 1
  assert "no bfloat16 matrices: compute in 'float16'" in capsys.readouterr().err
  short = ['--config.model_dtype_str=float16', '--config.method=linear', '--device=v100-16gb']
  text = printed(capsys, *SMALL, *short)
  assert 'cuDNN before 9.11' in text and 'attention plain' in text
  assert '--config.frozen_dtype_str=float16: ' in text and 'bfloat16' not in text


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--device=h100'], "Unknown device 'h100'. Did you mean 'h100-80gb'"),
    (['--device=cpu', '--devices=0'], 'devices must be an integer of at least 1'),
    (['--device=cpu', '--devices=99'], 'JAX has 2 CPU device'),
    (['--device=cpu', '--num_classes=0'], 'num_classes must be an integer of at least 1'),
    (['--device=cpu', '--config.bach_size=3'], "Did you mean 'batch_size'"),
    (['--device=cpu', '--config.method=lossa'], "Did you mean 'losa'"),
    (['--device=cpu', '--devices=2', '--config.batch_size=3'], 'positive multiple of 2 devices'),
    (['--device=cpu', '--config=configs/quick.py'], 'no config file configs/quick.py'),
  ],
)
def test_mistakes_end_with_one_message(capsys, arguments, message):
  assert plan.main([*SMALL, '--quick', *arguments]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert re.search(message, error), error


def test_options_of_a_run_that_have_no_effect_are_refused(capsys):
  with pytest.raises(SystemExit) as e:
    plan.main([*SMALL, '--device=cpu', '--workdir=runs'])
  assert e.value.code == 2 and '--workdir' in capsys.readouterr().err


def test_fields_that_it_does_not_know_are_left_alone():
  config = config_of()
  fields = config.to_dict() | {'of_tomorrow': {'a': 1}}
  step = plan_step.of_config(ml_collections.ConfigDict(fields), 7)
  assert np.dtype(step.frozen_dtype) == 'float32' and step.batch_size == 32
