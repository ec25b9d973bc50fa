"""Operations of a real train step, and the peaks of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from losa_scenic.adapt_lib import methods
from losa_scenic.adapt_lib.method import partition
from losa_scenic.model_lib import macs, presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.classification_model import classification_metrics
from losa_scenic.train_lib import device_speed, steps
from losa_scenic.train_lib.state import TrainState

BATCH = 4


def loss_fn(logits, batch):
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()


def step_of(method, accumulate=1, **options):
  """A jitted train step, and the shapes of its arguments."""
  spec = presets.preset('test/8')
  model = Adapted(spec, methods.build(method, spec), num_classes=5, **options)
  tx = optax.adamw(1e-3)
  trainable, frozen = partition(model.param_shapes(), model.method)
  key, model_state = jax.random.key(0), model.init_model_state()
  state = jax.eval_shape(lambda t: TrainState.create(t, tx, key, model_state), trainable)
  batch = {
    'inputs': jax.ShapeDtypeStruct(model.input_shape(BATCH), jnp.float32),
    'label': jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    'batch_mask': jax.ShapeDtypeStruct((BATCH,), jnp.float32),
  }
  step = functools.partial(
    steps.train_step,
    flax_model=model,
    loss_fn=loss_fn,
    metrics_fn=classification_metrics,
    tx=tx,
    accumulate=accumulate,
  )
  return jax.jit(step, donate_argnums=0), (state, frozen, batch), model


def forward_flops(model):
  inputs = jax.ShapeDtypeStruct(model.input_shape(BATCH), jnp.float32)
  return 2 * macs.count(model.apply, model.variable_shapes(), inputs)


def test_training_all_weights_costs_three_forward_passes():
  step, shapes, model = step_of('full')
  spec = model.spec
  patches = 2 * BATCH * np.prod(spec.grid) * spec.width * 3 * spec.patch**2
  # But for the gradient with respect to the images.
  assert device_speed.step_flops(step, *shapes) == 3 * forward_flops(model) - patches


def test_a_frozen_backbone_costs_its_forward_pass_and_the_classifier_two_more():
  step, shapes, model = step_of('linear')
  flops = device_speed.step_flops(step, *shapes)
  # The classifier's input needs no gradient: nothing before it trains.
  assert flops == forward_flops(model) + 2 * BATCH * model.spec.width * 5


@pytest.mark.parametrize(
  ('method', 'options'),
  # Of LoSA products of weights alone come once in each part.
  [('losa', {'scan': True}), ('losa', {'remat': True}), ('lst', {'accumulate': 2})],
)
def test_a_loop_over_layers_or_parts_of_a_batch_and_repetition_change_nothing(method, options):
  plain, shapes, _ = step_of(method)
  step, others, _ = step_of(method, **options)
  assert device_speed.step_flops(plain, *shapes) == device_speed.step_flops(step, *others)


def test_arrays_that_were_donated_still_have_their_shapes():
  step = jax.jit(lambda x, w: (x @ w).sum() * x, donate_argnums=0)
  x = jnp.ones((4, 6))
  step(x, jnp.ones((6, 8)))
  assert x.is_deleted()
  assert device_speed.step_flops(step, x, jnp.ones((6, 8))) == 2 * 4 * 6 * 8


def test_what_cannot_be_counted_is_unknown():
  def endless(x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

  assert device_speed.step_flops(endless, jnp.ones((2, 2))) is None
  assert device_speed.step_flops(lambda x: x @ x, jnp.ones((2, 3))) is None
  assert device_speed.step_flops(lambda x: x.no_such_thing, jnp.ones(2)) is None
  assert device_speed.step_flops(lambda x: x, 'no array') is None


@pytest.mark.parametrize(
  ('kind', 'float16', 'bfloat16', 'float32'),
  [
    ('Tesla V100-SXM2-16GB', 125, None, 15.7),
    ('Tesla V100-PCIE-32GB', 112, None, 14),
    ('Tesla T4', 65, None, 8.1),
    ('NVIDIA A100-SXM4-40GB', 312, 312, 156),
    ('NVIDIA A100-SXM4-80GB', 312, 312, 156),
    ('NVIDIA A100-PCIE-40GB', 312, 312, 156),
    ('NVIDIA A100 80GB PCIe', 312, 312, 156),
    ('NVIDIA L4', 121, 121, 60),
    ('NVIDIA H100 80GB HBM3', 989, 989, 494),
    ('NVIDIA H100 PCIe', 756, 756, 378),
    ('NVIDIA H200', 989, 989, 494),
    ('NVIDIA B200', 2250, 2250, 1125),
    ('TPU v4', None, 275, 275),
    ('TPU v5 lite', None, 197, 197),
    ('TPU v5', None, 459, 459),
    ('TPU v5p', None, 459, 459),
    ('TPU v6 lite', None, 918, 918),
    # Unknown here, however much the name looks like one that is known.
    ('cpu', None, None, None),
    ('NVIDIA A10', None, None, None),
    ('NVIDIA L40', None, None, None),
    ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None, None, None),
    ('NVIDIA H100 80GB HBM3 MIG 3g.40gb', None, None, None),
    ('TPU v4 lite', None, None, None),
  ],
)
def test_peaks_of_devices(kind, float16, bfloat16, float32):
  for dtype, tera in (('float16', float16), (jnp.bfloat16, bfloat16), (jnp.float32, float32)):
    assert device_speed.peak(kind, dtype) == (None if tera is None else pytest.approx(1e12 * tera))
  assert device_speed.peak(kind, 'float64') is None


def test_float32_has_a_known_peak_only_in_the_default_precision():
  with jax.default_matmul_precision('highest'):
    assert device_speed.peak('NVIDIA A100-SXM4-80GB', 'float32') is None
    assert device_speed.peak('NVIDIA A100-SXM4-80GB', 'bfloat16') == 312e12
  with jax.default_matmul_precision('default'):
    assert device_speed.peak('NVIDIA A100-SXM4-80GB', 'float32') == 156e12
