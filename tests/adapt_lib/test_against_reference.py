"""Features and gradients of every method against a second implementation in NumPy, float64."""

import inspect

import jax
import numpy as np
import pytest
from reference import derivative
from reference.models import MODELS

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import combine, partition
from losa_scenic.common_lib import trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted

QUICK_TO_COMPILE = {'xla_cpu_use_fusion_emitters': False}  # Less than half the time.
CLS = {'name': 'test/8', 'depth': 2}
GAP = {'name': 'test/8', 'pool': 'gap', 'activation': 'gelu_erf', 'depth': 2}
MAP = {'name': 'test/8', 'pool': 'map', 'depth': 2}
CLIP = {'name': 'vivit-test/8x2', 'depth': 2}  # Pools with a MAP head.
# (method, its options, backbone); what is not given is at its default.
CASES = [
  ('full', {}, {**CLS, 'depth': 3}),
  ('full', {}, GAP),
  ('full', {}, MAP),
  ('full', {}, CLIP),
  ('vpt_shallow', {'prompts': 3}, CLS),
  ('vpt_shallow', {'prompts': 3}, GAP),
  ('vpt_shallow', {'prompts': 3}, MAP),
  ('vpt_deep', {'prompts': 3}, CLS),
  ('vpt_deep', {'prompts': 3}, MAP),
  ('prompt_accumulate', {'prompts': 2, 'layers': 2}, {**CLS, 'depth': 3}),
  ('prompt_accumulate', {'prompts': 2}, GAP),
  ('prompt_accumulate', {'prompts': 2, 'layers': 1}, MAP),
  ('prompt_accumulate', {'prompts': 2, 'map_sees_prompts': False}, CLIP),
  ('express', {'prompts': 3}, CLS),
  ('express', {'prompts': 3, 'places': 'norm1,qkv,out'}, MAP),
  ('prefix', {'length': 3}, CLS),
  ('prefix', {'length': 3}, MAP),
  ('res_tuning', {'length': 3}, CLS),
  ('res_tuning', {'length': 3}, MAP),
  ('noah', {'prompts': '3,2,0', 'rank': '2,0,1', 'bottleneck': '0,2,3'}, {**CLS, 'depth': 3}),
  ('noah', {'prompts': '0,3', 'rank': '2,1', 'bottleneck': '1,2'}, MAP),
  ('lora', {'rank': 2, 'alpha': 3.0}, CLS),
  ('lora', {'rank': 2, 'targets': 'qkv', 'shared_down': True}, CLS),
  ('lora', {'rank': 2, 'targets': 'qkv', 'shared_down': True, 'map_head': True}, MAP),
  ('lora', {'rank': 2, 'targets': 'query,key,value,out,mlp', 'map_head': True}, MAP),
  ('lora', {'rank': 2, 'targets': 'out,fc1,fc2'}, CLIP),
  ('dora', {'rank': 2, 'alpha': 3.0, 'targets': 'query,value,out'}, CLS),
  ('dora', {'rank': 2, 'targets': 'qkv,fc1,fc2'}, MAP),
  ('vera', {'rank': 6}, CLS),
  ('vera', {'rank': 6, 'targets': 'qkv,out,fc1,fc2'}, MAP),
  ('fact_tt', {'rank': 3, 'scale': 0.7}, CLS),
  ('fact_tt', {'rank': 3}, {**MAP, 'mlp': 136}),
  ('fact_tk', {'rank': 3, 'scale': 0.7}, {**CLS, 'mlp': 128}),
  ('fact_tk', {'rank': 3, 'tk_layout': 'released'}, {**GAP, 'mlp': 128}),
  ('ssf', {}, CLS),
  ('ssf', {}, CLIP),
  ('repadapter', {'bottleneck': 4, 'scale': 0.5}, CLS),
  ('repadapter', {'bottleneck': 4, 'groups': 4, 'placement': 'attn'}, MAP),
  ('adapter', {'bottleneck': 3}, CLS),
  ('adapter', {'bottleneck': 3, 'placement': 'houlsby'}, CLS),
  ('adapter', {'bottleneck': 3, 'activation': 'relu'}, MAP),
  ('adapter_plus', {'bottleneck': 3}, CLS),
  ('adapter_plus', {'bottleneck': 3}, MAP),
  ('adaptformer', {'bottleneck': 3, 'scale': 0.3}, CLS),
  ('adaptformer', {'bottleneck': 3}, MAP),
  ('convpass', {'bottleneck': 3, 'scale': 0.5}, CLS),
  ('convpass', {'bottleneck': 3}, CLIP),
  ('convpass_attn', {'bottleneck': 3, 'scale': 0.5}, MAP),
  ('st_adapter', {'bottleneck': 3}, CLIP),
  ('st_adapter', {'bottleneck': 3, 'kernel': '3,1,1', 'placement': 'mlp'}, CLIP),
  ('st_adapter', {'bottleneck': 6, 'activation': 'relu'}, CLS),
  ('temporal', {'depth': 2}, {**CLIP, 'factorised': True}),
  ('temporal', {'depth': 1, 'residual': False}, {**GAP, 'frames': 3, 'factorised': True}),
  ('losa', {'rank': 3}, {**CLS, 'depth': 3}),
  ('losa', {'rank': 3, 'map_head_lora_rank': 2}, MAP),
  ('losa', {'rank': 3, 'map_head_lora_rank': 2}, CLIP),
  ('losa', {'rank': 3, 'activation': 'both', 'y0': 'b_0'}, CLS),
  ('losa', {'rank': 3, 'num_layers': 2, 'activation': 'mhsa'}, {**GAP, 'depth': 3}),
  ('losa', {'rank': 3, 'adaptor': 'low_rank_mlp', 'activation': 'mlp'}, CLIP),
  ('dtl', {}, {**CLS, 'depth': 4}),
  ('dtl', {'rank': 3, 'kernel': 4, 'pool': 'mean', 'first_block': 1}, {**CLS, 'depth': 3}),
  ('dtl', {'rank': 3, 'kernel': 3, 'first_block': 2}, CLIP),
  ('last', {'rank': 3}, CLS),
  ('last', {'rank': 3, 'group': 2, 'modules': 2}, {**MAP, 'depth': 4}),
  ('res_tuning_bypass', {'bottleneck': 3}, CLS),
  ('res_tuning_bypass', {'bottleneck': 3, 'form': 'weighted'}, CLIP),
  ('lst', {'width': 8, 'heads': 2}, CLS),
  ('lst', {'width': 6, 'heads': 3, 'mlp_dim': 'backbone'}, MAP),
  ('toast', {'value_bias': True}, CLS),
  ('toast', {'value_bias': False}, MAP),
  ('toast_lite', {'rank': 3, 'value_bias': True}, CLS),
  ('toast_lite', {'rank': 3}, CLIP),
  ('hst', {'meta_tokens': 2}, {**CLS, 'depth': 4, 'activation': 'gelu_erf'}),
  ('hst', {'stages': 1}, MAP),
]


def name_of(case):
  method, options, backbone = case
  return ','.join([method, *(f'{key}={value}' for key, value in {**backbone, **options}.items())])


# Nothing but masks over the backbone's own parameters ('full' covers those); head2toe's selected
# features have a test of their own.
NO_CASE = {'attention_only', 'bitfit', 'head2toe', 'last_k', 'linear', 'mlp_only'}


def test_no_method_is_left_out():
  assert {method for method, _, _ in CASES} == set(methods.METHODS) - NO_CASE


@pytest.mark.parametrize('case', CASES, ids=name_of)
def test_features_and_gradients(case, random_like):
  method, options, backbone = case
  spec = presets.preset(**backbone)
  model = Adapted(spec, methods.build(method, spec, options), 5, scan=False)
  params = around_one(random_like(model.param_shapes(), scale=0.3))
  trainable, frozen = partition(params, model.method)
  images = np.random.default_rng(3).standard_normal(model.input_shape(2)).astype(np.float32)
  state = random_state(model)

  def inner_product(trainable):
    variables = {'params': combine(trainable, frozen), **state}
    features = model.apply(variables, images, method='features')
    return (features * cotangent(features.shape)).sum(), features

  gradient = jax.jit(jax.grad(inner_product, has_aux=True), compiler_options=QUICK_TO_COMPILE)
  gradients, features = gradient(trainable)
  gradients = trees.flatten({k: v for k, v in gradients.items() if k != 'output_projection'})
  direction = balanced_direction(gradients)
  want, slope = derivative.features_and_derivative(
    MODELS[method],
    trees.flatten(params | given(method, model)),
    direction,
    images,
    spec,
    options=defaults(methods.METHODS[method]) | options,
    state=trees.flatten(state.get('batch_stats', {})),
  )
  assert np.abs(features - want).max() <= 2e-5 * np.abs(want).max()
  parts = [np.vdot(gradients[path], direction[path]) for path in direction]
  assert abs(sum(parts) - (slope * cotangent(slope.shape)).sum()) <= 1e-4 * np.linalg.norm(parts)


def around_one(params):
  """Moves what multiplies: with scales around 0 some paths would hardly reach the features."""
  flat = trees.flatten(params)
  return trees.unflatten({path: v + path.endswith('scale') for path, v in flat.items()})


def cotangent(shape):
  return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def given(name, model):
  """What a model computes with but is no parameter: VeRA's frozen matrices, from a seed."""
  return {'shared': model.method.shared().apply({})} if name == 'vera' else {}


def defaults(build):
  return {
    name: p.default
    for name, p in inspect.signature(build).parameters.items()
    if p.default is not p.empty
  }


def balanced_direction(gradients):
  """A random direction to which every parameter array contributes about as much as the others.

  So a wrong gradient of a small array is not lost in the sum. Gradients that are zero but for
  rounding are not blown up.
  """
  rng = np.random.default_rng(5)
  raw = {path: rng.standard_normal(g.shape) for path, g in sorted(gradients.items())}
  sizes = {path: np.linalg.norm(gradients[path]) for path in raw}
  smallest = 1e-3 * max(sizes.values(), default=0)
  return {path: v / max(sizes[path], smallest) for path, v in raw.items()}


def random_state(model):
  """Statistics as no batch has them; variances are positive."""
  rng = np.random.default_rng(6)
  return jax.tree.map(
    lambda a: rng.uniform(0.3, 2.0, a.shape).astype(np.float32),
    jax.eval_shape(model.init_model_state),
  )
