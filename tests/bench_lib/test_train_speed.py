"""The table of training speed: its rows, how they are timed, what it prints, and its mistakes."""

import dataclasses
import json
import math
import types

import jax
import pytest

from losa_scenic import bench
from losa_scenic.bench_lib import (
  compile_speed,
  peers,
  speed_process,
  speed_report,
  speed_request,
  speed_rows,
  train_speed,
)
from losa_scenic.bench_lib.speed_process import Peak
from losa_scenic.bench_lib.speed_rows import OWN, Setting
from losa_scenic.bench_lib.train_speed import ROWS, Timing
from losa_scenic.common_lib import compiler, errors
from losa_scenic.model_lib import presets

SMALL = Setting('test/8', batch_size=2, num_classes=3)


@pytest.fixture
def one_device(monkeypatch):
  """The tests' second device is not there; each row is timed once in a round."""
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  monkeypatch.setattr(train_speed, 'LEAST_SECONDS', 0.0001)


@pytest.fixture
def no_peers(monkeypatch):
  monkeypatch.setattr(peers, 'lack', lambda name, device: f"No module named '{name}'")


@pytest.mark.parametrize('name', [name for name, row in OWN.items() if row.fields])
def test_every_row_is_a_config_that_a_run_can_have(name):
  fields = OWN[name].fields or {}
  config = speed_rows.config_of(SMALL, fields)
  assert (config.backbone, config.batch_size, config.optimizer) == ('test/8', 2, 'momentum')
  for field, value in fields.items():
    if field.count('.') == 0 and field != 'population':
      assert config[field] == value


def test_a_field_that_configs_lack_is_an_error():
  with pytest.raises(errors.UserError, match="'method', 'rank'"):
    speed_rows.config_of(SMALL, {'method': 'losa', 'rank': 3})


def test_a_row_runs_the_step_of_a_run_and_hands_its_state_on(monkeypatch):
  seen = []

  def build_program(**given):
    seen.append((given['config'].method, given['dataset'].meta_data['input_shape']))
    made = types.SimpleNamespace(layout=None, frozen='frozen', train_step=train_step)
    return made, 'state 0'

  def train_step(state, frozen, batch):
    seen.append((state, frozen, batch['inputs'].dtype.name, batch['inputs'].shape))
    return f'state {int(state[6:]) + 1}', {}

  monkeypatch.setattr(speed_rows.program, 'build_program', build_program)
  run = OWN['losa16'].make(SMALL)
  run(2)
  run(1)
  assert seen[0] == ('losa', (-1, 32, 32, 3))
  assert seen[1:] == [(f'state {i}', 'frozen', 'uint8', (2, 32, 32, 3)) for i in range(3)]


def test_a_rounded_forward_pass_is_compiled_with_int8_products(monkeypatch):
  asked = []
  monkeypatch.setattr(compiler, 'options', lambda kind, **_: asked.append(kind))
  for name in ('forward', 'forward_int8'):
    OWN[name].make(SMALL)
  assert asked == [None, 'w8a8']


def test_processes_leave_time_for_the_measurement(one_device, no_peers, monkeypatch):
  ends = {}

  def peaks(names, setting, failed, row_limit, deadline):
    ends['peaks'] = deadline
    return {}

  def measure(runs, rounds, failed, deadline):
    ends['measure'] = deadline
    return {}

  monkeypatch.setattr(speed_process, 'peaks', peaks)
  monkeypatch.setattr(train_speed, 'measure', measure)
  given = {'backbone': 'test/8', 'rows': 'linear', 'memory': True, 'time_limit': 1000.0}
  list(speed_report.report(None, given))
  assert ends['measure'] - ends['peaks'] == pytest.approx(400)


def test_rows_are_timed_in_turn_and_another_one_begins_each_round():
  calls = []
  rows = {
    name: (lambda steps, name=name: calls.append(f'{name}{steps}'), n)
    for name, n in (('a', 1), ('b', 2), ('c', 3))
  }
  timings = train_speed.measure(rows, 3, {})
  assert calls == ['a1', 'b2', 'c3', 'b2', 'c3', 'a1', 'c3', 'a1', 'b2']
  assert {len(times) for timing in timings.values() for times in timing} == {3}


def test_rounds_end_before_a_deadline_but_for_the_first():
  timings = train_speed.measure({'a': (lambda steps: None, 1)}, 3, {}, deadline=-math.inf)
  assert len(timings['a'].wall) == len(timings['a'].cpu) == 1


@pytest.mark.parametrize(
  ('error', 'reason'),
  [
    (MemoryError(), 'out of memory'),
    (RuntimeError('RESOURCE_EXHAUSTED: allocating 3 bytes'), 'out of memory'),
    (RuntimeError('CUDA out of memory. Tried to allocate'), 'out of memory'),
    (RuntimeError('two\nlines'), 'two lines'),
    (KeyError(), 'KeyError'),
  ],
)
def test_a_failure_has_a_short_reason(error, reason):
  assert train_speed.reason(error) == reason


def test_a_failure_on_the_way_leaves_the_others_whole():
  count, failed = [], {}

  def fails(steps):
    count.append(steps)
    if len(count) == 2:
      raise MemoryError

  timings = train_speed.measure({'a': (fails, 1), 'b': (lambda steps: None, 1)}, 4, failed)
  assert failed == {'a': 'out of memory'} and len(count) == 2
  assert list(timings) == ['b'] and len(timings['b'].wall) == 4


def test_a_ratio_is_the_median_of_those_of_the_rounds():
  timings = {'a': Timing([1, 1, 4], [2, 2, 2]), 'b': Timing([2, 3, 4], [2, 4, 6])}
  assert train_speed.ratio(timings, 'a', 'b', 'wall') == 2
  assert train_speed.ratio(timings, 'b', 'a', 'cpu') == 0.5
  assert train_speed.ratio(timings, 'a', 'c', 'cpu') is None


def test_the_command_prints_rows_and_names_what_is_missing(one_device, no_peers, capsys):
  argv = ['run', '--backbone=test/8', '--batch_size=2', '--num_classes=3', '--rounds=2']
  assert bench.main([*argv, '--rows=timm_forward,forward,linear']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert "Left out: timm forward only: timm: No module named 'timm'." in lines
  assert any(
    line.startswith('**test/8, 32 px, batch 2, float32, 3 classes; 2 of') for line in lines
  )
  rows = {line.split(' | ')[0]: line.split(' | ')[1:] for line in lines if line[:2] == '| '}
  assert rows['| row'][-1] == 'x forward only |'
  assert rows['| forward only'][-1] == '1.000 / 1.000 |'
  assert float(rows['| linear probe'][0].split()[0]) > 0


def test_json_has_every_round(one_device, no_peers, capsys):
  argv = ['run', '--backbone=test/8', '--batch_size=2', '--num_classes=3', '--rounds=3', '--json']
  assert bench.main([*argv, '--rows=linear,peft_lora32']) == 0
  found = json.loads(capsys.readouterr().out)
  assert len(found['rows']['linear']['wall_seconds']) == 3
  assert min(found['rows']['linear']['cpu_seconds']) > 0
  assert found['rows']['peft_lora32']['failed'] == "peft: No module named 'peft'"
  assert found['setting']['backbone'] == 'test/8' and found['setting']['device'] == 'cpu'


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    ('--rounds=0', '--rounds must be an integer of at least 1'),
    ('--rows=losa17', "Unknown row 'losa17'. Did you mean 'losa16'?"),
    ('--rows=forward,forward', 'names a row twice'),
    ('--preset=tpu', "Unknown preset 'tpu'"),
    ('--backbone=B', "Unknown backbone 'B'"),
    ('--dtype=float16', "Unknown dtype 'float16'"),
    ('--device=gpu', "JAX finds a 'cpu' here, not a gpu"),
    ('--row_limit=3', 'give --memory'),
    ('--time_limit=0', '--time_limit must be above 0'),
  ],
)
def test_a_mistake_is_one_line(argument, message, one_device, no_peers, capsys):
  assert bench.main(['run', argument]) == 1
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_several_devices_are_an_error(capsys):
  assert bench.main(['run', '--backbone=test/8']) == 1
  assert 'JAX finds 2 devices' in capsys.readouterr().err


def test_what_is_given_goes_before_a_preset():
  gpu = speed_request.PRESETS['gpu']
  request = speed_request.Request.of('gpu', {'backbone': 'S/16', 'rounds': None})
  assert request == dataclasses.replace(speed_request.Request(**gpu), backbone='S/16')
  assert request.rounds == 9 and request.batch_size == 64


@pytest.mark.parametrize('preset', speed_request.PRESETS)
def test_what_a_preset_wants_is_among_its_rows(preset):
  rows = speed_request.Request(**speed_request.PRESETS[preset]).rows.split(',')
  names = [name for name, row in ROWS.items() if row.default] if rows == ['default'] else rows
  wanted = [(row, other) for where, row, other, _ in speed_request.WANTED if where == preset]
  assert wanted and {name for pair in wanted for name in pair} <= set(names)


def test_wanted_speeds_stand_beside_those_found():
  timings = {'forward': Timing([2.0], [3.0]), 'losa16': Timing([4.0], [4.0])}
  text = speed_report.comparison('cpu', SMALL, timings)
  assert text.splitlines()[2:] == ['| LoSA r=16 | forward only | 0.500 / 0.750 | 0.97 |']
  text = speed_report.comparison('gpu', SMALL, timings)
  assert text.splitlines()[2:] == ['| forward only | one image a second | 1 | 970 |']
  assert speed_report.comparison('cpu', SMALL, {}) == ''
  assert speed_request.Request.of('cpu', {'rounds': 3}).is_preset('cpu')
  assert not speed_request.Request.of('cpu', {'batch_size': 3}).is_preset('cpu')


def test_peaks_stand_beside_plans():
  peaks = {'linear': Peak(104 * 2**20, 0), 'full': Peak(2**30, 2**30)}
  plans = {'linear': 100 * 2**20, 'full': 2**29}
  lines = speed_report.memory_table(SMALL, peaks, plans).splitlines()
  assert lines[-2:] == [
    '| linear probe | 104 | 100 | 1.04 (as planned) |',
    '| full fine-tuning | at most 1,024 | 512 | 2.00 (off) |',
  ]


def test_a_process_of_its_own_says_its_peak_or_why_it_failed(capsys):
  text = json.dumps(dataclasses.asdict(SMALL))
  speed_process.main(['peak', 'linear', text])
  found = json.loads(capsys.readouterr().out)
  assert found['bytes'] >= found['before'] > 2**27
  speed_process.main(['peak', 'linear', text.replace('test/8', 'test/7')])
  assert 'patch size 7' in json.loads(capsys.readouterr().out)['failed']


def test_rows_that_take_too_long_are_ended():
  failed = {}
  assert speed_process.peaks(['linear'], SMALL, failed, 0.1, math.inf) == {}
  assert failed == {'linear': 'not ready after 0.1 s'}
  assert speed_process.peaks(['linear'], SMALL, failed, 9, -math.inf) == {}
  assert failed == {'linear': 'no time was left for it'}


def test_a_peer_has_the_shape_of_the_backbone(monkeypatch):
  given = {}
  fake = types.SimpleNamespace(VisionTransformer=lambda **kwargs: given.update(kwargs))
  monkeypatch.setattr(peers, 'library', lambda name: fake)
  peers.vision_transformer(presets.preset('g/14'), 7)
  assert given['embed_dim'] * given['mlp_ratio'] == 6144
  assert (given['depth'], given['num_heads'], given['num_classes']) == (40, 16, 7)
  assert (given['global_pool'], given['class_token'], given['patch_size']) == ('map', False, 14)
  peers.vision_transformer(presets.preset('test/8'), 7)
  assert (given['global_pool'], given['class_token'], given['img_size']) == ('token', True, 32)


@pytest.mark.parametrize(
  ('name', 'changes'),
  [('vivit-test/8x2', {}), ('test/8', {'gated': True}), ('B/16', {'rope': 'eva'})],
)
def test_a_backbone_without_a_peer_is_named(name, changes):
  with pytest.raises(errors.UserError, match=f"no peer of backbone '{name}'"):
    peers.vision_transformer(presets.preset(name, **changes), 7)


@pytest.mark.skipif(peers.lack('timm', 'cpu') is not None, reason='timm is not installed')
@pytest.mark.parametrize('name', peers.NAMES)
def test_peers_are_those_that_timm_has_by_name(name):
  with peers.library('torch').device('meta'):
    own = peers.vision_transformer(presets.preset(name, pool='cls'), 7)
    theirs = peers.library('timm').create_model(peers.NAMES[name], num_classes=7)
  shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (own, theirs)]
  assert shapes[0] == shapes[1]


def test_compilation_is_timed_scanned_and_unrolled(capsys):
  found = compile_speed.of_method('test/8', 'losa', {'rank': 2}, rounds=1)
  for loop in ('scan', 'unroll'):
    assert min(found[loop].values()) > 0
  assert found['set'] == {'rank': 2} and jax.config.jax_enable_compilation_cache
  assert bench.main(['compile', '--backbone=test/8', '--method=linear', '--rounds=0']) == 1
  assert 'rounds must be' in capsys.readouterr().err
