"""What XLA's compiler for GPUs makes of layers that are in the host's memory, or split."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from losa_scenic.bench_lib import streamed

PLUGIN = importlib.util.find_spec('jax_plugins') and importlib.util.find_spec(
  'jax_plugins.xla_cuda12'
)
MIB = 2**20
LEAST_PRODUCTS = 4  # Of a layer: XLA may make queries, keys and values in one.

# A loop as XLA prints it: {a} and {b} stand before and after its products.
PROGRAM = """HloModule m, is_scheduled=true

%copied (p.0: bf16[4,1,8], p.1: u32[]) -> bf16[1,1,8] {{
  %p.0 = bf16[4,1,8]{{2,1,0:S(5)}} parameter(0)
  ROOT %slice.0 = bf16[1,1,8]{{2,1,0}} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={{1,1,8}}
}}

%inner (p.2: bf16[4,8]) -> bf16[4,8] {{
  %attended.0 = (bf16[4,8]{{1,0}}, u8[0]{{0}}) custom-call(%p.2), custom_call_target="__cudnn$fmha"
  ROOT %y.0 = bf16[4,8]{{1,0}} dot(%p.2, %p.2), lhs_contracting_dims={{1}}
}}

%body (p.3: (s32[], bf16[4,1,8])) -> (s32[], bf16[4,1,8]) {{
  %host.0 = bf16[4,1,8]{{2,1,0:S(5)}} get-tuple-element(%p.3), index=1
{a}
  %x.1 = (bf16[4,8], s8[32]) custom-call(%host.0), custom_call_target="__cublas$lt$matmul"
  %parts.0 = bf16[4,8]{{1,0}} while(%x.1), condition=%test, body=%inner
{b}
}}

ENTRY %main (p.4: bf16[4,1,8]) -> bf16[4,1,8] {{
  %w.0 = (s32[], bf16[4,1,8]{{2,1,0:S(5)}}) while(%p.4), condition=%test, body=%body
}}
"""
START = """\
  %ahead.0 = ((bf16[4,1,8]{2,1,0:S(5)}, u32[]), bf16[1,1,8]{2,1,0}, u32[]) \
fusion-start(%host.0, %i.0), kind=KIND, calls=%copied"""
DONE = '  %now.0 = bf16[1,1,8]{2,1,0} fusion-done(%ahead.0), metadata={}'


@pytest.mark.parametrize(
  ('a', 'b', 'want'),
  [
    ([START], [DONE], (1, 1, ('product', 'attention', 'product'), ())),
    ([], [START, DONE], (1, 1, (), ('product', 'attention', 'product'))),
    ([START.replace('KIND', 'kCustom')], [DONE], (1, 0, ('product', 'attention', 'product'), ())),
    ([START, DONE], [START, DONE], (2, 2, (), ('product', 'attention', 'product'))),
  ],
)
def test_a_schedule_says_what_a_transfer_hides_behind(a, b, want):
  text = PROGRAM.format(a='\n'.join(a), b='\n'.join(b))
  assert streamed.visits(text) == (streamed.Visit(*want),)


UNROLLED = """HloModule m, is_scheduled=true

ENTRY %main (p.4: bf16[1,8], p.5: bf16[1,8]) -> bf16[4,8] {
  %p.4 = bf16[1,8]{1,0:S(5)} parameter(0)
  %start.0 = (bf16[1,8]{1,0}, bf16[1,8]{1,0:S(5)}, u32[]) copy-start(%p.4)
  %done.0 = bf16[1,8]{1,0} copy-done(%start.0)
  %early.0 = bf16[4,8]{1,0} dot(%done.0, %done.0), lhs_contracting_dims={1}
  %start.1 = (bf16[1,8]{1,0}, bf16[1,8]{1,0:S(5)}, u32[]) copy-start(%p.5)
  %x.1 = (bf16[4,8], s8[32]) custom-call(%done.0), custom_call_target="__cudnn$fmha"
  %done.1 = bf16[1,8]{1,0} copy-done(%start.1)
  %late.0 = bf16[4,8]{1,0} dot(%done.1, %done.1), lhs_contracting_dims={1}
}
"""


def test_transfers_outside_of_loops_are_told_apart():
  # The rest of the program, after the last transfer, is no layer's.
  assert streamed.visits(UNROLLED) == (
    streamed.Visit(1, 0, (), ('product',)),
    streamed.Visit(1, 0, ('attention',), ()),
  )


def test_a_program_that_never_reads_the_host_has_no_visits():
  assert streamed.visits(PROGRAM.format(a='', b='').replace('S(5)', '')) == ()


COMPILE = """
import json, sys
import jax
jax.config.update('jax_platforms', 'cpu')
from losa_scenic.bench_lib import streamed
from losa_scenic.train_lib import run_config

def planned(devices, **fields):
  config = run_config.default_config()
  config.update({
    'method': 'linear', 'random_backbone': True, 'optimizer': 'momentum', 'layer_loop': 'scan',
    'num_training_steps': 1, 'lr_configs': {'base_learning_rate': 0.1}, **fields,
  })
  config.model_dtype_str = config.frozen_dtype_str = 'bfloat16'
  return streamed.compile_run(run_config.resolve(config), 1000, 'h100-80gb', devices)

for devices, fields in json.loads(sys.argv[1]):
  made = planned(devices, **fields)
  print(json.dumps({**made.parts(), 'text': made.text}))
"""


def planned(*steps):
  """`Streamed.parts` of each (devices, fields of the config), with the program's text."""
  if not PLUGIN:
    pytest.skip("JAX's CUDA plugin is not installed: pip install 'losa_scenic[plan]'")
  # In a process of its own: without the tests' compiler options, and before a device is used.
  keep = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS' and not k.startswith('JAX_')}
  root = str(pathlib.Path(__file__).parents[2])
  keep |= {'PYTHONPATH': os.pathsep.join([root, *filter(None, [keep.get('PYTHONPATH')])])}
  done = subprocess.run(
    [sys.executable, '-c', COMPILE, json.dumps(steps)], env=keep, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.plan
def test_one_copy_a_layer_spans_its_products_and_its_attention():
  host = {'frozen_memory': 'host', 'layer_loop': 'scan'}
  steps = {
    'losa': (1, {'backbone': 'B/16', 'method': 'losa', 'batch_size': 16, **host}),
    'microbatches': (1, {'backbone': 'g/14', 'batch_size': 16, 'stream_microbatches': 4, **host}),
    'int8': (1, {'backbone': 'g/14', 'batch_size': 16, 'backbone_quantisation': 'int8', **host}),
    'eight': (8, {'backbone': 'g/14', 'batch_size': 128, **host}),
  }
  steps['losa'][1]['backbone_configs'] = {'pool': 'map'}  # An even number of tokens.
  for name, made in zip(steps, planned(*steps.values()), strict=True):
    (visit,) = made['visits']
    assert (visit['transfers'], visit['by_kernel']) == (1, 0), name
    assert visit['exposed'] == [], name
    assert visit['hidden'].count('attention') == 1, name
    assert visit['hidden'].count('product') >= LEAST_PRODUCTS, name


@pytest.mark.plan
def test_copies_of_unrolled_layers_span_their_products_too():
  images = {'backbone': 'g/14', 'batch_size': 16, 'frozen_memory': 'host', 'layer_loop': 'auto'}
  images['backbone_configs'] = {'depth': 5, 'pool': 'gap'}
  losa = {'method': 'losa', 'method_configs': {'losa': {'map_head_lora_rank': 0}}}
  int8 = {'backbone_quantisation': 'int8', 'stream_microbatches': 4}
  for fields in ({}, int8, losa):
    (made,) = planned((1, {**images, **fields}))
    # One copy a layer, none for nothing. That of the first layer has nothing to hide behind.
    _, *visits = made['visits']
    assert len(visits) == 4
    for visit in visits:
      assert (visit['transfers'], visit['by_kernel'], visit['exposed']) == (1, 0, []), fields
      # LoSA's products with what it reads of the layer come to those of the layer.
      assert visit['hidden'].count('attention') == 1
      assert visit['hidden'].count('product') >= LEAST_PRODUCTS, fields


@pytest.mark.plan
def test_split_weights_are_gathered_in_the_loop_and_no_activations_are_summed():
  fields = {'backbone': 'g/14', 'batch_size': 64, 'mesh': {'fsdp': 8}}
  alone, made = planned((1, {**fields, 'batch_size': 8, 'mesh': {}}), (8, fields))
  bodies = set(re.findall(r'body=(%[\w.-]+)', made['text']))
  loops = [part for part in re.split(r'\n(?=%|ENTRY)', made['text']) if part.split()[0] in bodies]
  collectives = [re.findall(r' (all-[a-z]+|reduce-scatter)[a-z-]*\(', loop) for loop in loops]
  (gathers,) = (found for found in collectives if found)
  assert set(gathers) == {'all-gather'}  # Of several weights at once.
  assert made['total'] < alone['total'] - 0.7 * 40 * 2 * 25.2e6
