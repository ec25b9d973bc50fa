"""Runs from a feature cache: the same numbers as without it, and never the features of another."""

import json
import operator
import signal
import time
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from losa_scenic.common_lib import compiler, errors
from losa_scenic.common_lib import config as config_lib
from losa_scenic.dataset_lib import datasets, loader
from losa_scenic.model_lib.classification_model import ClassificationModel
from losa_scenic.train_lib import feature_cache, feature_trace, run_config, sharding
from losa_scenic.weights_lib import backbones

DIR = {'feature_cache.dir': '/tmp'}
LOSSES = ('train_loss', 'valid_loss', 'test_loss')


def weights(workdir):
  newest = max((workdir / 'checkpoints' / 'last').iterdir(), key=lambda path: int(path.name))
  return load_file(newest / 'state.safetensors')


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], name)


def logged(workdir):
  """{(step, name): value} of all losses."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {(row['step'], k): v for row in rows for k, v in row.items() if k in LOSSES}


def said(printed):
  """What was there at the start, '12 of 800 training, 0 of 200 validation'."""
  line = next(x for x in printed.splitlines() if x.startswith('features from cache: '))
  return line.split(': ')[1].split(';')[0]


@pytest.fixture(scope='module')
def run(cli, tmp_path_factory):
  """`fn(name, dtype=None)`: workdir and print of a run over one epoch and a bit."""
  folder = tmp_path_factory.mktemp('runs')

  def run(name, dtype=None):
    workdir = folder / name
    if workdir.exists():
      return workdir, (workdir / 'printed').read_text()
    cache = () if dtype is None else (f'dir={folder}/cache', f'dtype={dtype}')
    status, printed = cli(
      '--config.num_training_steps=60',
      '--config.log_summary_steps=10',
      '--config.eval_batch_size=16',
      '--config.evaluate_test=False',
      '--config.method_configs.losa.num_layers=2',
      *(f'--config.feature_cache.{text}' for text in cache),
      workdir=workdir,
    )
    assert status == 0, printed
    (workdir / 'printed').write_text(printed)
    return workdir, printed

  return run


def test_a_float32_cache_changes_nothing(run):
  wanted, got = (logged(run(*args)[0]) for args in (('plain',), ('float32', 'float32')))
  assert len(wanted) == 6 + 2 and got.keys() == wanted.keys()
  for key in wanted:
    assert got[key] == pytest.approx(wanted[key], rel=1e-6), key


@pytest.mark.slow
def test_an_int8_cache_changes_little(run):
  wanted, (workdir, printed) = logged(run('plain')[0]), run('int8', 'int8')
  got = logged(workdir)
  assert got != wanted
  for key in wanted:
    assert got[key] == pytest.approx(wanted[key], rel=0.02), key
  # Of test/8: 2 taps of 17 tokens of 32 channels, and a scale for each token.
  line = next(x for x in printed.splitlines() if 'features from cache' in x)
  assert '1,280 bytes each in int8, 0.00128 GB when all are there (' in line


def test_a_full_cache_gives_the_bits_of_the_run_that_filled_it(run):
  first, printed = run('float32', 'float32')
  second, later = run('again', 'float32')
  assert said(printed) == '0 of 800 training, 0 of 200 validation'
  assert said(later) == '800 of 800 training, 200 of 200 validation'
  assert logged(first) == logged(second)
  assert_same(weights(first), weights(second))


def test_a_population_reads_the_same_features(run, cli, tmp_path):
  rank = 'method_configs.losa.rank'
  for name, more in (
    ('plain', ()),
    ('cached', (f'dir={run("float32", "float32")[0].parent}/cache', 'dtype=float32')),
  ):
    status, printed = cli(
      '--config.num_training_steps=3',
      '--config.log_summary_steps=1',
      '--config.evaluate_test=False',
      '--config.method_configs.losa.num_layers=2',
      f'--config.population=method=losa {rank}=4; method=linear',
      *(f'--config.feature_cache.{text}' for text in more),
      workdir=tmp_path / name,
    )
    assert status == 0, printed
  # What LoSA reads of the backbone is all that they read.
  assert said(printed) == '800 of 800 training, 200 of 200 validation'
  for member in ('method=linear', 'method=losa,rank=4'):
    wanted, got = (logged(tmp_path / x / 'members' / member) for x in ('plain', 'cached'))
    assert len(wanted) == 4 and got.keys() == wanted.keys()
    for key in wanted:
      assert got[key] == pytest.approx(wanted[key], rel=1e-6), key


def test_no_image_is_decoded_for_training_from_a_full_cache(run, cli, tmp_path, monkeypatch):
  read, original = [], loader.Loader.batch

  def noted(self, indices, *args):
    read.append((self.split, len(indices)))
    return original(self, indices, *args)

  monkeypatch.setattr(loader.Loader, 'batch', noted)
  folder = run('float32', 'float32')[0].parent / 'cache'
  read.clear()
  status, printed = cli(
    '--config.num_training_steps=60',
    '--config.evaluate_test=False',
    '--config.eval_batch_size=16',
    '--config.method_configs.losa.num_layers=2',
    '--config.feature_cache.dtype=float32',
    f'--config.feature_cache.dir={folder}',
    workdir=tmp_path,
  )
  assert status == 0, printed
  # The picture of predictions alone, at both evaluations.
  assert read == [('valid', 16)] * 2


def opened(folder, weights=None, **changes):
  """The cache that a run with these changes would open; no weights are loaded."""
  config = run_config.default_config()
  config.num_training_steps, config.lr_configs.base_learning_rate = 1, 0.1
  for name, value in {'feature_cache.dir': str(folder), **changes}.items():
    block, _, field = name.rpartition('.')
    (operator.attrgetter(block)(config) if block else config)[field] = value
  config = run_config.resolve(config)
  found = backbones.find(config.backbone, config_lib.to_dict(config.backbone_configs))
  dataset = datasets.of_run(config, found.spec)
  model = ClassificationModel(config, dataset.meta_data)
  layout = feature_trace.of_model(model.flax_model, config.feature_cache.dtype)
  mesh = sharding.make_mesh({'data': -1})
  program = types.SimpleNamespace(
    model=model, encoder=model.flax_model, layout=layout, frozen=weights, mesh=mesh
  )
  return feature_cache.open_cache(config, program, dataset)


def folders(*args, **kwargs):
  return {part: store.path.name for part, store in opened(*args, **kwargs).stores.items()}


@pytest.fixture(scope='module')
def usual(tmp_path_factory):
  """A folder of caches, and what a run uses in it."""
  folder = tmp_path_factory.mktemp('cache')
  return folder, folders(folder)


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('method_configs.losa.num_layers', 3),
    pytest.param(*('method_configs.losa.activation', 'mlp'), marks=pytest.mark.slow),
    ('method', 'linear'),
    pytest.param(*('backbone', 'test/16'), marks=pytest.mark.slow),
    pytest.param(*('backbone_configs.pool', 'gap'), marks=pytest.mark.slow),
    ('backbone_configs.image_size', 48),
    pytest.param(*('backbone_configs.mean', (0.4, 0.4, 0.4)), marks=pytest.mark.slow),
    ('dataset_configs.interpolation', 'bilinear'),
    pytest.param(*('dataset_configs.central_crop', 0.9), marks=pytest.mark.slow),
    pytest.param(*('data_dtype_str', 'float32'), marks=pytest.mark.slow),
    pytest.param(*('model_dtype_str', 'bfloat16'), marks=pytest.mark.slow),
    pytest.param(*('frozen_dtype_str', 'bfloat16'), marks=pytest.mark.slow),
    pytest.param(*('backbone_quantisation', 'int8'), marks=pytest.mark.slow),
    ('feature_cache.dtype', 'float32'),
  ],
)
def test_what_changes_features_never_finds_the_old_ones(field, value, usual):
  folder, before = usual
  after = folders(folder, {'a': np.zeros(2)}, **{field: value})
  assert after.keys() == before.keys() and not set(after.values()) & set(before.values())


def test_what_does_not_change_features_finds_them(usual):
  folder, before = usual
  for field, value in (
    ('method_configs.losa.rank', 4),
    ('rng_seed', 3),
    ('batch_size', 32),
  ):
    assert folders(folder, **{field: value}) == before


def test_a_cache_is_filled_by_a_program_for_its_kind_of_products(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(compiler, 'options', lambda kind, **_: asked.append(kind))
  opened(tmp_path, backbone_quantisation='w8a8')
  assert asked == ['w8a8']


def test_random_weights_are_told_apart_by_their_values(usual):
  folder, _ = usual
  zeros, ones = (folders(folder, {'a': f(2)}, backbone='test/8') for f in (np.zeros, np.ones))
  assert not set(zeros.values()) & set(ones.values())


def test_views_are_rows_of_their_own(usual):
  folder, before = usual
  flip = {'augment.flip': True, 'feature_cache.views': 3}
  cache = opened(folder, **flip)
  assert cache.stores['train'].count == 3 * 800 and cache.stores['valid'].count == 200
  # Nothing is drawn for validation; and drawn images are the same for every seed.
  assert cache.stores['valid'].path.name == before['valid']
  assert folders(folder, rng_seed=1, **flip)['train'] == cache.stores['train'].path.name
  more = {'augment.flip': True, 'feature_cache.views': 2}
  assert folders(folder, **more)['train'] not in (before['train'], cache.stores['train'].path.name)


def test_the_test_split_is_kept_on_demand(usual):
  folder, before = usual
  cache = opened(folder, **{'feature_cache.test': True})
  assert list(cache.stores) == ['train', 'valid', 'test']
  assert '0 of 800 training, 0 of 200 validation, 0 of 797 test' in cache.line
  assert cache.stores['train'].path.name == before['train']


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'feature_cache.dtype': 'float32'}, 'feature_cache.dtype has no effect without'),
    ({'feature_cache.test': True}, 'feature_cache.test has no effect without'),
    (DIR | {'feature_cache.dtype': 'int4'}, "Unknown feature_cache.dtype 'int4'"),
    (DIR | {'augment.mixup_alpha': 0.1}, 'mixup and cutmix'),
    (DIR | {'augment.flip': True}, 'Give feature_cache.views=K'),
    (DIR | {'feature_cache.views': 0}, 'feature_cache.views must be'),
    (DIR | {'num_workers': 2}, 'num_workers 2 has no effect'),
  ],
)
def test_mistakes_are_found_before_anything_is_read(overrides, message):
  config = run_config.default_config()
  config.num_training_steps = 1
  for name, value in overrides.items():
    block, _, field = name.rpartition('.')
    (config[block] if block else config)[field] = value
  with pytest.raises(errors.UserError, match=message):
    run_config.check(config)


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('feature_cache.views=2', 'views=2 has no effect: images are not augmented'),
    ('method=lora', 'never change what the encoder computes'),
    ('layer_loop=scan', "layer_loop 'unroll'"),
  ],
)
def test_what_cannot_be_cached_is_said(override, message, cli, tmp_path):
  folder = f'--config.feature_cache.dir={tmp_path}/cache'
  status, printed = cli(folder, f'--config.{override}', workdir=tmp_path / 'run')
  assert status == 1 and message in printed


def test_a_disk_without_room_is_said(cli, tmp_path, monkeypatch):
  monkeypatch.setattr('shutil.disk_usage', lambda _: type('Usage', (), {'free': 1000}))
  status, printed = cli(f'--config.feature_cache.dir={tmp_path}/cache', workdir=tmp_path / 'run')
  assert status == 1 and 'the features will take 0.00 GB more' in printed


SLOW = ('num_training_steps=120', 'checkpoint_steps=10', 'log_summary_steps=10')


def start(spawn, cache, workdir, *more):
  options = (*SLOW, f'feature_cache.dir={cache}', *more)
  return spawn(*(f'--config.{text}' for text in options), workdir=workdir)


def have(cache):
  """Whole rows of all parts."""
  marks = [np.fromfile(path, '<u4')[::4] for path in cache.glob('*/marks.bin')]
  return sum(int((m != 0).sum()) for m in marks)


@pytest.mark.slow
@pytest.mark.parametrize('rows', [30, 333])
def test_a_run_killed_while_it_fills_the_cache_goes_on(rows, spawn, tmp_path):
  whole = start(spawn, tmp_path / 'a', tmp_path / 'whole')
  assert whole.wait(120) == 0
  killed = start(spawn, tmp_path / 'b', tmp_path / 'killed')
  deadline = time.monotonic() + 100
  while have(tmp_path / 'b') < rows and killed.poll() is None and time.monotonic() < deadline:
    time.sleep(0.002)
  killed.send_signal(signal.SIGKILL)
  killed.wait(20)
  kept = have(tmp_path / 'b')
  assert rows <= kept < 1000
  later = start(spawn, tmp_path / 'b', tmp_path / 'killed')
  printed, _ = later.communicate(timeout=120)
  assert later.returncode == 0, printed
  counts = said(printed).replace(',', '').split()
  assert int(counts[0]) + int(counts[4]) == kept
  assert_same(weights(tmp_path / 'killed'), weights(tmp_path / 'whole'))
  assert logged(tmp_path / 'killed') == logged(tmp_path / 'whole')
  # And a third run, on the full cache of the second, takes the same steps.
  third = start(spawn, tmp_path / 'b', tmp_path / 'third')
  assert third.wait(120) == 0
  assert_same(weights(tmp_path / 'third'), weights(tmp_path / 'whole'))


@pytest.mark.slow
def test_two_runs_fill_a_cache_together(spawn, tmp_path):
  alone = start(spawn, tmp_path / 'a', tmp_path / 'alone')
  assert alone.wait(120) == 0
  both = [start(spawn, tmp_path / 'b', tmp_path / name) for name in ('one', 'two')]
  assert [run.wait(120) for run in both] == [0, 0]
  assert have(tmp_path / 'b') == have(tmp_path / 'a') == 1000
  for name in ('one', 'two'):
    assert_same(weights(tmp_path / name), weights(tmp_path / 'alone'))
  rows = [sorted((tmp_path / name).glob('*/rows.bin')) for name in 'ab']
  for one, other in zip(*rows, strict=True):
    assert one.parent.name == other.parent.name and one.read_bytes() == other.read_bytes()
