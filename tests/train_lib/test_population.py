"""Members of a population are trained exactly as alone, and leave what a run alone leaves."""

import functools
import json
import pathlib
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from losa_scenic import app
from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import Method, partition
from losa_scenic.bench_lib import results, tables
from losa_scenic.common_lib import errors
from losa_scenic.dataset_lib import dataset_utils, datasets
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import ClassificationModel, classification_metrics
from losa_scenic.model_lib.vit import ViT
from losa_scenic.train_lib import (
  checkpoint_files,
  members,
  population,
  program,
  progress,
  run_config,
  sharding,
  steps,
)
from losa_scenic.train_lib.state import TrainState
from losa_scenic.weights_lib import backbones

SCHEMA = run_config.default_config()
RANK, RATE = 'method_configs.losa.rank', 'lr_configs.base_learning_rate'


@pytest.mark.parametrize(
  ('text', 'parsed', 'names'),
  [
    (
      f'{RANK}=4|8 rng_seed=0|1; config.method=linear',
      [*({RANK: r, 'rng_seed': s} for r in (4, 8) for s in (0, 1)), {'method': 'linear'}],
      [*(f'rank={r},rng_seed={s}' for r in (4, 8) for s in (0, 1)), 'method=linear'],
    ),
    (
      [{f'config.{RATE}': 1, 'optimizer': 'sgd'}, f'{RATE}=1e-3 optimizer=sgd'],
      [{RATE: 1, 'optimizer': 'sgd'}, {RATE: 1e-3, 'optimizer': 'sgd'}],
      ['base_learning_rate=1', 'base_learning_rate=0.001'],
    ),
    (
      ({}, 'optimizer_configs.nesterov=true', 'lr_configs.decay_events=(1,2)'),
      [{}, {'optimizer_configs.nesterov': True}, {'lr_configs.decay_events': [1, 2]}],
      ['overrides=none', 'nesterov=True', 'decay_events=1_2'],
    ),
    (['max_grad_norm=1'], [{'max_grad_norm': 1}], ['max_grad_norm=1']),
    (
      [{'method_configs.head2toe.selection': f'/{x}/a.npy'} for x in 'pq'],
      [{'method_configs.head2toe.selection': f'/{x}/a.npy'} for x in 'pq'],
      ['selection=a', 'selection=a-*'],
    ),
  ],
)
def test_words_of_sweeps_are_members(text, parsed, names):
  found = members.parse(text, SCHEMA)
  assert found == parsed == members.parse(json.loads(json.dumps(found)), SCHEMA)
  got = members.names(found)
  assert len(set(got)) == len(got) and not any('/' in name for name in got)
  for name, wanted in zip(got, names, strict=True):
    assert name == wanted or (wanted.endswith('*') and name.startswith(wanted[:-1]))


def test_no_population():
  assert members.parse(None, SCHEMA) is None and members.parse('', SCHEMA) is None


@pytest.mark.parametrize(
  ('given', 'parts'),
  [
    (3, ('takes a text',)),
    ([], ('takes a text',)),
    ([3], ('a text or a dict', '3')),
    (' ; ', ('no member',)),
    ('rng_seed', ('KEY=VALUE',)),
    ('rng_seed=1|', ('KEY=VALUE',)),
    ('rng_seed=1; rng_seed=1', ('members 1 and 2 are the same',)),
    ('rank=4', ('in full', RANK)),
    ('batch_size=8', ("'batch_size' must be the same",)),
    ('shuffle_seed=8', ('the order of the batches',)),
    ('backbone_configs.pool=gap', ('backbone_configs.pool',)),
    ('method_configs.losa.rnk=4', (f"Did you mean '{RANK}'",)),
    ('method_configs.losa=4', ('is a block',)),
    ('optimizer.x=4', ('is a value',)),
    ([{'max_grad_norm': None}], ('a flag cannot carry None',)),
  ],
)
def test_what_is_no_member_is_refused(given, parts):
  with pytest.raises(errors.UserError) as e:
    members.parse(given, SCHEMA)
  for part in parts:
    assert part in str(e.value)


def of_flags(tiny, *flags):
  config, _ = app.parse(['main', *tiny, *flags])
  return run_config.resolve(config)


@pytest.mark.parametrize(
  ('flags', 'parts'),
  [
    (['--config.population=method=losa|lsta'], ("Did you mean 'lst'",)),
    ([f'--config.population={RATE}=x'], ('member base_learning_rate=x', 'of type float')),
    ([f'--config.population=method=lst {RANK}=4'], ('member', 'no effect', "'losa'")),
    (
      ['--config.population=method=lst', '--config.method_configs.losa.rank=4'],
      ('no effect', "'lst'"),
    ),
    (['--config.population=rng_seed=1', '--config.grad_accum_steps=2'], ('grad_accum_steps',)),
    (['--config.population=rng_seed=1', '--config.export_backbone=x'], ('export_backbone',)),
  ],
)
def test_members_that_no_run_can_have_are_refused_before_any_data_is_read(tiny, flags, parts):
  with pytest.raises(errors.UserError) as e:
    of_flags(tiny, *flags)
  for part in parts:
    assert part in str(e.value)


def test_a_member_has_the_config_of_a_run_alone(tiny):
  text = f'method=losa {RANK}=4 rng_seed=3; method=linear'
  config = of_flags(tiny, f'--config.population={text}')
  found = run_config.of_members(config)
  alone = of_flags(tiny, f'--config.{RANK}=4', '--config.rng_seed=3', '--config.shuffle_seed=0')
  assert found['method=losa,rank=4,rng_seed=3'].to_dict() == alone.to_dict()
  linear = of_flags(tiny, '--config.method=linear')
  assert found['method=linear'].to_dict() == linear.to_dict()
  assert linear.lr_configs.base_learning_rate != alone.lr_configs.base_learning_rate


class Dropped(nn.Module):
  """A side network of a layer's tokens, half of which are dropped in training."""

  @nn.compact
  def __call__(self, run, inputs, *, train):
    encoded = run.encode(inputs, train=train)
    assert set(encoded.layers) == {'mlp'}  # As in a pass for this one alone.
    x = nn.Dense(16)(encoded.layers['mlp'][1]) @ jnp.ones((16, encoded.tokens.shape[-1]))
    return run.features(encoded.tokens + nn.Dropout(0.5, deterministic=not train)(x), train=train)


def test_random_numbers_mixed_labels_and_dropped_steps_are_those_of_steps_alone(make_batch):
  spec = presets.preset('test/8')
  made = {
    'a=losa': methods.build('losa', spec, {'rank': 4}),
    'a=dropped': Method(collect=('mlp',), side=Dropped),
  }
  head = ClassificationModel(None, {'num_classes': 5})
  alone, of_all, states = {}, {}, {}
  for seed, (name, method) in enumerate(made.items()):
    model = Adapted(spec, method, num_classes=5)
    params = model.init(jax.random.key(0), jnp.zeros(model.input_shape()))['params']
    trainable, frozen = partition(params, method)
    tx = optax.adamw(1e-2 * (1 + seed))
    given = {'flax_model': model, 'loss_fn': head.loss_function, 'tx': tx, 'max_bad_steps': 2}
    of_all[name] = functools.partial(steps.train_step, metrics_fn=classification_metrics, **given)
    alone[name] = jax.jit(of_all[name])
    states[name] = TrainState.create(trainable, tx, jax.random.key(seed))
  trunk = population.trunk([step.keywords['flax_model'] for step in of_all.values()])
  step = jax.jit(functools.partial(population.train_step, trunk=trunk, members=of_all))
  state, seen = population.joined(states), set()
  for i in range(6):
    batch = make_batch(4, seed=i)
    batch |= {'partner_label': batch['label'][::-1], 'label_share': np.float32([0.1, 0.5, 0.9, 1])}
    if i in (1, 3, 4):  # At the last of them the second in a row.
      batch['inputs'] = np.full_like(batch['inputs'], np.nan)
    state, metrics = step(state, frozen, batch)
    for name in made:
      states[name], wanted = alone[name](states[name], frozen, batch)
      for key, (value, weight) in wanted.items():
        np.testing.assert_allclose(metrics[f'{name}/{key}'][0], value, rtol=1e-6, err_msg=key)
        assert metrics[f'{name}/{key}'][1] == weight
      seen.add((name, int(wanted['bad_steps'][0])))
      have = population.state_of(state, name)
      assert jax.tree.structure(have) == jax.tree.structure(states[name])
      for a, b in zip(*map(jax.tree.leaves, (have, states[name])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
  assert int(state.global_step) == 5  # Nothing has moved since.
  assert seen == {(name, bad) for name in made for bad in (0, 1, 2)}


@pytest.fixture(scope='module')
def stored(tmp_path_factory, random_like) -> str:
  spec = presets.preset('test/8')
  shapes = jax.eval_shape(
    ViT(spec, {}, scan=True).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
  )
  path = tmp_path_factory.mktemp('backbone') / 'small.json'
  backbones.save(path, spec, random_like(shapes['params']))
  return str(path)


def test_losses_are_those_of_runs_alone(tiny, stored):
  text = f"""
    {RANK}=4 {RATE}=0.3 rng_seed=3 optimizer=momentum max_grad_norm=0.5 label_smoothing=0.1;
    {RANK}=6 {RATE}=0.02;
    method=linear {RATE}=0.01
  """
  config = of_flags(
    tiny,
    f'--config.population={text}',
    f'--config.backbone={stored}',
    '--config.num_training_steps=8',
    '--config.augment.mixup_alpha=0.5',
  )
  spec = backbones.find(stored, {}).spec
  dataset = datasets.of_run(config, spec)
  given = {'model_cls': ClassificationModel, 'dataset': dataset}
  made, state = population.build_program(rng=jax.random.key(0), config=config, **given)
  batches = list(dataset_utils.iterate(dataset.train_ds, 0, 8))
  losses = []
  for batch in batches:
    state, metrics = made.train_step(state, made.frozen, sharding.put(batch, made.mesh))
    losses.append(metrics)
  test = sharding.put(next(dataset_utils.iterate(dataset.test_ds, 0, 1)), made.mesh)
  evaluated, predicted = made.eval_step(state, made.frozen, test)
  for name, own in run_config.of_members(config).items():
    alone, its = program.build_program(rng=jax.random.key(own.rng_seed), config=own, **given)
    for batch, seen in zip(batches, losses, strict=True):
      its, metrics = alone.train_step(its, alone.frozen, sharding.put(batch, made.mesh))
      for key in ('loss', 'l2_grads', 'l2_params'):
        np.testing.assert_allclose(seen[f'{name}/{key}'][0], metrics[key][0], rtol=1e-6)
    # It has learned something in between.
    assert abs(float(metrics['loss'][0]) - float(losses[0][f'{name}/loss'][0])) > 0.01
    wanted, classes = alone.eval_step(its, alone.frozen, test)
    np.testing.assert_array_equal(predicted[name], classes)
    np.testing.assert_allclose(evaluated[f'{name}/loss'], wanted['loss'], rtol=1e-6)


@pytest.mark.parametrize(
  ('text', 'parts'),
  [
    ('method=losa|lora', ('member method=lora', 'memory class A', 'a pass of its own')),
    ('rng_seed=0|1', ('member rng_seed=1', 'random weights')),
  ],
)
def test_members_that_cannot_share_a_pass_are_refused(cli, tmp_path, text, parts):
  status, printed = cli(f'--config.population={text}', workdir=tmp_path)
  assert status == 1 and printed.count('error: ') == 1, printed
  for part in parts:
    assert part in printed


# The first member has diverged after its second step; the warm-up begins with 0.
TWO = f'optimizer=momentum {RATE}=1e30; method=linear'
OFTEN = (
  '--config.checkpoint_steps=2',
  '--config.log_eval_steps=2',
  '--config.log_summary_steps=1',
)
RUN = (f'--config.population={TWO}', '--config.max_bad_steps=1', *OFTEN)


@pytest.fixture(scope='module')
def finished(cli, tmp_path_factory) -> tuple[pathlib.Path, str]:
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  status, printed = cli(*RUN, workdir=workdir)
  assert status == 0, printed
  return workdir, printed


def rows(path: pathlib.Path) -> list[dict]:
  found = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in row.items() if k not in progress.MEASUREMENTS} for row in found]


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
  leaves = json.loads((folder / 'meta.json').read_text())['leaves']
  return checkpoint_files.read_arrays(folder, leaves)


LINEAR = 'method=linear'


def test_a_member_that_diverges_is_reported_and_the_others_go_on(finished):
  workdir, printed = finished
  (fast,) = (f.name for f in (workdir / 'members').iterdir() if f.name != LINEAR)
  assert f'{fast} has diverged' in printed and '1 of the population go on' in printed
  assert 'diverged at step 2' in printed
  summary = json.loads((workdir / 'summary.json').read_text())
  assert summary['diverged'] == {fast: 2} and list(summary['members']) == [LINEAR]
  assert not (workdir / 'members' / fast / 'summary.json').exists()
  assert len((workdir / 'members' / fast / 'bad_steps.jsonl').read_text().splitlines()) == 1
  final = arrays(workdir / 'checkpoints' / 'last' / '4')
  assert all(np.isfinite(x.astype(float)).all() for x in final.values())
  assert final[f'bad_steps/{fast}'] == 1 and final['global_step'] == 4
  joined = rows(workdir / 'metrics.jsonl')
  assert f'{LINEAR}/train_loss' in joined[0] and f'{fast}/train_loss' in joined[0]
  assert not any(key.startswith(fast) for row in joined[1:] for key in row)


def test_a_members_folder_is_the_workdir_of_a_run_alone(finished, cli, tmp_path):
  workdir, _ = finished
  member, alone = workdir / 'members' / LINEAR, tmp_path / 'alone'
  status, printed = cli('--config.method=linear', *RUN[1:], workdir=alone)
  assert status == 0, printed
  config, own = (json.loads((f / 'config.json').read_text()) for f in (member, alone))
  assert config == own
  for have, want in zip(rows(member / 'metrics.jsonl'), rows(alone / 'metrics.jsonl'), strict=True):
    assert have == pytest.approx(want, rel=1e-6)
  for kind in ('last', 'best'):
    (step,) = (f.name for f in (member / 'checkpoints' / kind).iterdir())
    have, want = (arrays(f / 'checkpoints' / kind / step) for f in (member, alone))
    assert have.keys() == want.keys()
    for path in want:
      # Adam divides small gradients by small ones, so small weights differ more than losses do.
      close = {'rtol': 1e-6, 'atol': 1e-5 * float(np.abs(want[path]).max(initial=0))}
      np.testing.assert_allclose(have[path], want[path], **close, err_msg=path)
  moved = pathlib.Path(shutil.copytree(member, tmp_path / 'moved'))
  status, printed = cli('--config.method=linear', *RUN[1:], workdir=moved)
  assert status == 0 and 'continuing from step 4' in printed, printed
  have, want = (json.loads((f / 'summary.json').read_text()) for f in (moved, alone))
  assert have['test_loss'] == pytest.approx(want['test_loss'], rel=1e-6)


def test_results_are_rows_of_a_table(finished):
  workdir, _ = finished
  (row,) = results.read_rows(workdir / 'results.jsonl')
  assert row['run'] == LINEAR and row['config.method'] == 'linear' and row['population'] == 2
  text = tables.table([row], 'dataset', 'method', 'test_accuracy', scale=100)
  assert f'| digits | {100 * row["test_accuracy"]:.2f} (1) |' in text


def test_a_run_that_is_continued_is_the_run_that_was_left_alone(finished, cli, tmp_path):
  workdir = pathlib.Path(shutil.copytree(finished[0], tmp_path / 'copy'))
  for path in ('checkpoints/last/4', f'members/{LINEAR}/checkpoints'):
    shutil.rmtree(workdir / path)
  for path in ('summary.json', f'members/{LINEAR}/summary.json'):
    (workdir / path).unlink()
  status, printed = cli(*RUN, workdir=workdir)
  assert status == 0 and 'continuing from step 2' in printed, printed
  files = [f.relative_to(finished[0]) for f in finished[0].rglob('*.jsonl')]
  assert len(files) == 5
  for file in files:
    if file.name != 'results.jsonl':
      assert rows(workdir / file) == rows(finished[0] / file)
  for file in finished[0].rglob('state.safetensors'):
    if '/2/' not in f'{file}':
      here = workdir / file.relative_to(finished[0])
      assert here.read_bytes() == file.read_bytes(), file


def test_a_run_ends_when_all_have_diverged(cli, tmp_path):
  flags = (f'--config.population={RATE}=1e30|2e30', '--config.optimizer=momentum')
  flags += ('--config.method=linear', '--config.max_bad_steps=2', '--config.num_training_steps=9')
  for _ in range(2):  # Tried again, they stay as they are.
    status, printed = cli(*flags, workdir=tmp_path)
    assert status == 3 and 'All 2 members of the population have diverged' in printed, printed
    assert 'saved as step 3' in printed and printed.count('error: ') == 1
  assert [f.name for f in (tmp_path / 'checkpoints' / 'last').iterdir()] == ['3']
