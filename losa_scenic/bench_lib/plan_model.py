"""A model of a train step's memory, for machines that cannot compile for the GPU in question.

Weights, optimizer state and batch are exact. What lies in between is estimated from the traced
program: what the loss keeps for its backward pass, and the largest products beside it. Compilers
differ, so each figure is a guess at what XLA's would plan:

  kept       Of arrays of one shape at most two a layer: XLA computes chains of element-wise
             operations again rather than keep each link.
  workspace  Two of the largest products while nothing is differentiated, four while layers are;
             the gradient; a layer's weights where devices share them; frozen weights in the dtype
             of compute, if that is another: of stacked layers all, else a quarter beside a side
             network, and of one layer without one.

Where only the side network is differentiated, the peak is either at the end of the encoder (what is
kept of the outputs that the side network reads, and the encoder's workspace) or in the side
network's backward pass. How near that comes to XLA's plans: see docs/planning.md.
"""

import collections
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from losa_scenic.adapt_lib import side_memory
from losa_scenic.adapt_lib.method import combine
from losa_scenic.bench_lib import gpu_memory, gpu_targets
from losa_scenic.bench_lib.plan_step import Memory, Step, total_bytes
from losa_scenic.model_lib import attention
from losa_scenic.train_lib import steps

_PRODUCTS = ('dot_general', 'conv_general_dilated')


def of_step(step: Step, target: str, devices: int = 1) -> Memory:
  """Estimated memory of a train step on each GPU; what `gpu_memory.of_step` plans.

  Args:
    step: the step.
    target: the GPU, a key of `gpu_targets.TARGETS`.
    devices: number of GPUs.

  Raises:
    errors.UserError: for an unknown GPU, compute in bfloat16 on one that has none, and if the mesh
      or the batch does not suit the devices.
  """
  gpu_memory.check_dtype(target, step.model.dtype)
  sizes = step.sizes(devices)
  images = step.batch_size // (devices * step.accumulate)
  with as_on(target, step):
    between = _between(step, images)
  between += _casts(step) + total_bytes(step.state[0].trainable) * min(step.accumulate, 2)
  layer = total_bytes(step.state[1]) // step.model.spec.depth
  if sizes.pop('host'):
    between += 2 * layer  # The one that runs and the one that arrives.
  elif step.mesh.get('fsdp', 1) != 1:
    between += layer
  return Memory(sum(sizes.values()), 0, between)


@contextlib.contextmanager
def as_on(target: str | None, step: Step) -> Iterator[None]:
  """Attention is traced much as on that GPU, where its kernel need not be; None: as it is here."""
  spec, way = step.model.spec, None
  if target is not None:
    fits = attention.fits_kernel(
      step.model.dtype, spec.width // spec.heads, spec.sequence, spec.sequence
    )
    fused = gpu_targets.find(target).has_bfloat16 and fits
    way = 'chunked' if fused or spec.sequence >= attention.LEAST_KEYS else 'plain'
  with contextlib.ExitStack() as stack:
    if target is not None and way is not None:
      stack.enter_context(attention.using(way))
      # Traced is what one device does.
      stack.enter_context(side_memory.planned_for(gpu_memory.usable(target), 1))
    yield


def kept(step: Step, images: int) -> int:
  """Bytes that the loss of so many images keeps for its backward pass, weights not among them.

  An estimate from the traced program, see the module's text.
  """
  state, frozen = step.state
  loss = _loss(step)
  left = jax.eval_shape(
    lambda trainable, frozen, batch, encoded: jax.vjp(
      lambda t: loss(t, frozen, batch, encoded), trainable
    )[1],
    *(state.trainable, frozen, _batch(step, images), None),
  )
  count, given = (
    collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
    for tree in (left, (state.trainable, frozen))
  )
  # No layer before the first one that is differentiated keeps anything.
  most = 2 * (step.model.spec.depth - step.model.method.first)
  return sum(
    min(n, most) * math.prod(shape) * np.dtype(dtype).itemsize
    for (shape, dtype), n in (count - given).items()
  )


def _between(step: Step, images: int) -> int:
  """Bytes between the arguments and the results, but for gradients and copies of weights."""
  loss, most = _loss(step), kept(step, images)
  (state, frozen), batch = step.state, _batch(step, images)
  if not step.model.method.spares_backbone:
    return most + 4 * _largest(loss, state.trainable, frozen, batch, None)

  def encode(trainable: Any, frozen: Any, batch: Any) -> Any:
    variables = {'params': combine(trainable, frozen), **state.model_state}
    return step.model.apply(variables, batch['inputs'], method='encode')

  given = state.trainable, frozen, batch
  encoded = jax.eval_shape(encode, *given)
  taps = min(total_bytes(encoded.layers), most)  # They may be kept in 8 bits, or not at all.
  return max(
    taps + 2 * _largest(encode, *given),
    most + 2 * _largest(loss, *given, encoded),
  )


def _loss(step: Step) -> Callable[..., Any]:
  """(trainable, frozen, batch, what the encoder gave or None) -> the loss in training."""
  state, _ = step.state

  def loss(trainable: Any, frozen: Any, batch: Any, encoded: Any) -> Any:
    variables = {'params': combine(trainable, frozen), **_zeros(state.model_state)}
    logits, _ = step.model.apply(
      variables,
      None if encoded is not None else batch['inputs'],
      train=True,
      encoded=encoded,
      rngs={'dropout': jax.random.key(0)},
      mutable=list(state.model_state),
    )
    return step.head.loss_function(logits, batch)

  return loss


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def _batch(step: Step, images: int) -> Any:
  batch, classes = step.batch(images), step.model.num_classes
  return jax.eval_shape(lambda b: steps.with_mixed_labels(b, classes), batch)


def _largest(fn: Callable[..., Any], *shapes: Any) -> int:
  """Bytes of the largest matrix product or convolution in `fn`."""
  return max(_products(jax.make_jaxpr(fn)(*shapes).jaxpr), default=0)


def _products(jaxpr: core.Jaxpr) -> Iterator[int]:
  for equation in jaxpr.eqns:
    if equation.primitive.name in _PRODUCTS:
      yield from (total_bytes(out.aval) for out in equation.outvars)
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
        if isinstance(inner, core.Jaxpr):
          yield from _products(inner)


def _casts(step: Step) -> int:
  """Bytes of the frozen weights that exist a second time, in the dtype of compute."""
  dtype = np.dtype(step.model.dtype)
  leaves = jax.tree.leaves(step.state[1])
  copy = sum(leaf.size for leaf in leaves if np.dtype(leaf.dtype) != dtype) * dtype.itemsize
  if step.model.stream:
    return 0
  if step.model.scan:
    return copy
  return copy // 4 if step.model.method.side else copy // step.model.spec.depth
