"""LoSA on clips: hidden units of the token mixers are computed again and never kept."""

import collections

import jax
import numpy as np
import pytest

from losa_scenic.adapt_lib import losa, mixer
from losa_scenic.adapt_lib.method import combine, partition
from losa_scenic.bench_lib import cost
from losa_scenic.common_lib import trees
from losa_scenic.model_lib import presets
from losa_scenic.model_lib.adapted import Adapted
from losa_scenic.model_lib.encoder import Encoded

RANK, CLASSES, BATCH = 5, 3, 2


@pytest.fixture
def model():
  spec = presets.preset('vivit-test/8x2', frames=12)
  return Adapted(spec, losa.build(spec, rank=RANK, map_head_lora_rank=2), CLASSES)


def kept_anyway(monkeypatch):
  monkeypatch.setattr(jax, 'checkpoint', lambda f, **_: f)


def kept_on_grids(model):
  """What the loss keeps of arrays over frames or places and channels, with how many of each."""
  frames, height, width = model.spec.grid
  b, d, places = BATCH, model.spec.width, height * width
  names = {
    (b, frames, places, d): 'input',
    (b, frames, d, places): 'turned',
    (b, places, d, frames): 'turned',
    (b, frames, d, RANK): 'spatial hidden',
    (b, places, d, RANK): 'temporal hidden',
  }
  return collections.Counter(names[s] for s, _ in cost.residuals(model, b) if s in names)


def test_hidden_units_of_token_mixers_are_not_kept(model, monkeypatch):
  # One of the three mixers is of tokens; it keeps what it is given, and nothing else.
  assert kept_on_grids(model) == {'input': 1}
  kept_anyway(monkeypatch)
  assert kept_on_grids(model).keys() == {'turned', 'spatial hidden', 'temporal hidden'}


def test_gradients_are_the_same_as_with_hidden_units_kept(model, monkeypatch, random_like):
  trainable, frozen = random_like(partition(model.param_shapes(), model.method))
  clips = random_like(np.zeros((BATCH, *model.spec.input_shape)), scale=1.0)

  def gradients():
    def loss(trainable):
      logits = model.apply({'params': combine(trainable, frozen)}, clips)
      return (logits**2).sum()

    return trees.flatten(jax.jit(jax.grad(loss))(trainable))

  have = gradients()
  kept_anyway(monkeypatch)
  want = gradients()
  assert set(have) == set(want)
  assert {p for p in have if 'temporal' in p and np.abs(have[p]).max() > 0}
  for path, value in want.items():
    np.testing.assert_allclose(
      have[path], value, rtol=1e-5, atol=1e-6 * float(np.abs(value).max()), err_msg=path
    )


def test_without_temporal_mixers_each_frame_is_adapted_as_an_image(random_like):
  image = presets.preset('test/8')  # with a class token, which takes part in the mixing
  clip = presets.preset('test/8', frames=6, tubelet=1, factorised=True)
  frames = Adapted(image, losa.build(image, rank=RANK), CLASSES)
  clips = Adapted(clip, losa.build(clip, rank=RANK, mix_time=False), CLASSES)
  params = random_like(frames.param_shapes())
  moved = {
    path.replace('/spatial/', '/token/'): path for path in trees.flatten(clips.param_shapes())
  }
  assert set(moved) == set(trees.flatten(params)) and any('/spatial/' in p for p in moved.values())
  same = trees.unflatten({moved[path]: value for path, value in trees.flatten(params).items()})
  inputs = random_like(np.zeros((BATCH, *clip.input_shape)), scale=1.0)
  have = clips.apply({'params': same}, inputs, method='features')
  each = frames.apply({'params': params}, inputs.reshape(-1, *image.input_shape), method='features')
  want = each.reshape(BATCH, 6, -1).mean(axis=1)
  np.testing.assert_allclose(have, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('sequences', [1, 3])
def test_tokens_by_time(sequences):
  times, prefix, places, d = 3, 2, 4, 5
  rng = np.random.default_rng(0)
  own = rng.standard_normal((BATCH, sequences, prefix, d))
  grid = rng.standard_normal((BATCH, times, places, d))
  x = np.concatenate([own.reshape(BATCH, -1, d), grid.reshape(BATCH, -1, d)], axis=1)
  given = Encoded(x, x, {}, (times, 2, 2), sequences * prefix, sequences)
  by_time = mixer.by_time(x, given)
  assert by_time.shape == (BATCH, times, prefix + places, d)
  for time in range(times):
    leading = own[:, time if sequences > 1 else 0]
    np.testing.assert_allclose(by_time[:, time, :prefix], leading, rtol=1e-6)
    np.testing.assert_allclose(by_time[:, time, prefix:], grid[:, time], rtol=1e-6)
  np.testing.assert_allclose(mixer.in_a_row(by_time, given), x, rtol=1e-6)
  grown = by_time * np.arange(1, times + 1)[None, :, None, None]
  row = np.asarray(mixer.in_a_row(grown, given))
  if sequences == 1:  # The class token of a whole clip: the mean of what comes out at every time.
    np.testing.assert_allclose(row[:, :prefix], 2 * own[:, 0], rtol=1e-6)
  else:
    want = own * np.arange(1, times + 1)[None, :, None, None]
    np.testing.assert_allclose(row[:, : sequences * prefix], want.reshape(BATCH, -1, d), rtol=1e-6)


def test_temporal_mixers_of_a_class_token_reach_the_features(random_like):
  """What is pooled depends on the order of the frames, with one class token or one a frame.

  A single class token knows of it from the second token mixer on, hence six mixers here.
  """
  for factorised in (False, True):
    spec = presets.preset('test/8', frames=4, tubelet=1, factorised=factorised)
    for mix_time in (True, False):
      model = Adapted(
        spec, losa.build(spec, rank=RANK, mix_time=mix_time, activation='both'), CLASSES
      )
      params = trees.flatten(random_like(model.param_shapes()))
      position = params.get('backbone/pos_embedding')
      if not factorised:  # Every time alike, as inflated: the backbone does not know the order.
        own, grid = np.split(np.asarray(position), [1], axis=1)
        params['backbone/pos_embedding'] = np.concatenate([own, *[grid[:, :16]] * 4], axis=1)
      inputs = random_like(np.zeros((1, *spec.input_shape)), scale=1.0)
      have, turned = (
        np.asarray(model.apply({'params': trees.unflatten(params)}, x, method='features'))
        for x in (inputs, inputs[:, ::-1])
      )
      assert (np.abs(have - turned).max() > 1e-3) == mix_time, (factorised, mix_time)
