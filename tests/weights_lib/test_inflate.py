"""Clip backbones made of image backbones, against what inflation and tiling mean."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference.backbone import Backbone

from losa_scenic.common_lib import errors, trees
from losa_scenic.model_lib import encoder, layers, presets
from losa_scenic.model_lib.vit import ViT
from losa_scenic.train_lib import run_config
from losa_scenic.weights_lib import backbones, checkpoint, inflate, resize

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'backbones'
PLAIN = {'pool': 'gap', 'class_token': False}
DTYPES = [np.dtype('float32'), np.dtype(ml_dtypes.bfloat16), np.dtype('float16')]
rng = np.random.default_rng(0)


def flat_params(spec, random_like):
  shapes = {p: jax.ShapeDtypeStruct(s, 'f4') for p, s in checkpoint.param_shapes(spec).items()}
  return random_like(shapes, scale=0.3)


def clip_of(flat, old, new):
  return {p: checkpoint.resized(p, leaf, old, new) for p, leaf in flat.items()}


def specs(frames, tubelet, inflation='average', **fields):
  old = presets.preset('test/8', **fields)
  return old, dataclasses.replace(old, frames=frames, tubelet=tubelet, inflation=inflation)


def features(spec, flat, images):
  """By the model in NumPy, which needs no compiling: that ViT equals it is shown elsewhere."""
  return Backbone(flat, spec).features(images)


def by_vit(spec, flat, images, inserts=None):
  model = ViT(spec, inserts or {}, scan=True)
  return jax.jit(model.apply)({'params': encoder.stack_layers(trees.unflatten(flat))}, images)


@pytest.mark.parametrize('tubelet', [1, 2, 3])
def test_an_averaged_kernel_sees_a_still_clip_as_the_image(tubelet):
  old, new = specs(2 * tubelet, tubelet)
  image, kernel = rng.standard_normal((2, 32, 32, 3)), rng.standard_normal((192, 32))
  bias = rng.standard_normal(32)

  def embed(spec, x, kernel):
    return layers.PatchEmbed(spec).apply({'params': {'proj': {'kernel': kernel, 'bias': bias}}}, x)

  want = embed(old, image, kernel)
  still = np.repeat(image[:, None], 2 * tubelet, axis=1)
  have = embed(new, still, inflate.patch_kernel(kernel, tubelet, 'average'))
  np.testing.assert_allclose(have, np.concatenate([want, want], axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('tubelet', 'seen'), [(1, (0, 1)), (2, (1, 3)), (3, (1, 4)), (4, (2, 6))])
def test_a_central_kernel_sees_one_frame_of_each_tubelet(tubelet, seen):
  old, new = specs(2 * tubelet, tubelet)
  kernel = rng.standard_normal((192, 32)).astype(np.float32)
  clip = rng.standard_normal((2, 2 * tubelet, 32, 32, 3)).astype(np.float32)

  def embed(spec, x, kernel):
    params = {'proj': {'kernel': kernel, 'bias': np.zeros(32, np.float32)}}
    return layers.PatchEmbed(spec).apply({'params': params}, x)

  have = embed(new, clip, inflate.patch_kernel(kernel, tubelet, 'central_frame'))
  want = np.concatenate([embed(old, clip[:, frame], kernel) for frame in seen], axis=1)
  np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('method', inflate.METHODS)
def test_the_dtype_stays(method, dtype):
  kernel = rng.standard_normal((192, 4)).astype(dtype)
  have = inflate.patch_kernel(kernel, 3, method)
  assert have.dtype == dtype and have.shape == (576, 4)
  whole = have.astype(np.float64).reshape(3, 192, 4).sum(axis=0)
  np.testing.assert_allclose(whole, kernel.astype(np.float64), rtol=4 * ml_dtypes.finfo(dtype).eps)
  old, new = specs(8, 2, image_size=16)
  table = rng.standard_normal((1, old.tokens, 32)).astype(dtype)
  assert inflate.positions(table, old, dataclasses.replace(new, image_size=32)).dtype == dtype


@pytest.mark.parametrize('fields', [PLAIN, {}, {'registers': 2}], ids=['plain', 'class', 'more'])
def test_positions_are_resampled_in_space_then_repeated_in_time(fields):
  old, new = specs(8, 2, **fields)
  new = dataclasses.replace(new, image_size=48)
  table = rng.standard_normal((1, old.tokens, 32)).astype(np.float32)
  have = inflate.positions(table, old, new)
  assert have.shape == (1, new.tokens, 32)
  np.testing.assert_array_equal(have[:, : old.prefix], table[:, : old.prefix])
  image = resize.position_embedding(table, (4, 4), (6, 6), old.prefix, old.position_resize)
  for frame in have[:, old.prefix :].reshape(4, 36, 32):
    np.testing.assert_array_equal(frame, image[0, old.prefix :])


def test_positions_of_a_clip_keep_their_frames_in_another_size():
  _, old = specs(4, 2, **PLAIN)
  table = rng.standard_normal((1, 32, 32)).astype(np.float32)
  have = inflate.positions(table, old, dataclasses.replace(old, image_size=16))
  for i in range(2):
    frame = table[:, 16 * i : 16 * (i + 1)]
    want = resize.position_embedding(frame, (4, 4), (2, 2), 0, old.position_resize)
    np.testing.assert_array_equal(have[:, 4 * i : 4 * (i + 1)], want)


@pytest.mark.parametrize('inflation', inflate.METHODS)
@pytest.mark.parametrize('pool', ['gap', 'map'])
@pytest.mark.parametrize(('frames', 'tubelet'), [(2, 2), (6, 2), (3, 1)])
def test_features_of_a_still_clip_are_the_images(pool, inflation, frames, tubelet, random_like):
  old, new = specs(frames, tubelet, inflation, pool=pool, class_token=False)
  flat = flat_params(old, random_like)
  image = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
  want, clip = features(old, flat, image), np.repeat(image[:, None], frames, axis=1)
  inflated = clip_of(flat, old, new)
  np.testing.assert_allclose(features(new, inflated, clip), want, rtol=1e-5, atol=1e-5)
  if (pool, inflation, frames) == ('map', 'average', 6):
    np.testing.assert_allclose(by_vit(new, inflated, clip), want, rtol=1e-4, atol=1e-4)
  assert np.abs(want).max() > 0.1


@pytest.mark.parametrize(
  'name', ['own', 'timm_siglip', 'timm_vit_reg_gap', 'timm_dinov3', 'hf_beit']
)
def test_a_factorised_backbone_sees_a_still_clip_as_the_image_whatever_its_tokens(name, saved):
  name = saved if name == 'own' else str(GOLDEN / name)
  image = backbones.find(name)
  fields = {'frames': 6, 'tubelet': 2, 'factorised': True, 'inflation': 'average'}
  clip = backbones.find(name, fields)
  assert clip.spec.tokens == 3 * image.spec.tokens
  x = rng.standard_normal((2, *image.spec.input_shape)).astype(np.float32)
  still = np.repeat(x[:, None], 6, axis=1)
  flat, inflated = (
    {p: np.float32(leaf) for p, leaf in trees.flatten(backbones.load(b, stack=False)).items()}
    for b in (image, clip)
  )
  want = features(image.spec, flat, x)
  np.testing.assert_allclose(features(clip.spec, inflated, still), want, rtol=1e-4, atol=1e-4)
  if clip.spec.rope != 'none':
    have = by_vit(clip.spec, inflated, still)
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4)


class PatchesOften(nn.Module):
  """Attention to `times` copies of every key and value that is on the grid."""

  times: int

  @nn.compact
  def __call__(self, f, x, ctx):
    q, *rest = x
    copies = (jnp.concatenate([t, *[t[:, ctx.prefix :]] * (self.times - 1)], 1) for t in rest)
    return f((q, *copies))


@pytest.mark.parametrize(
  'fields', [{}, {'registers': 2, 'pool': 'cls_dist'}, {'pool': 'gap', 'class_token': True}]
)
def test_beside_a_class_token_repeated_patches_count_as_often_as_they_occur(fields, random_like):
  old, new = specs(6, 2, **fields)
  flat = flat_params(old, random_like)
  image = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
  have = features(new, clip_of(flat, old, new), np.repeat(image[:, None], 6, axis=1))
  often = by_vit(old, flat, image, {'attend': lambda: PatchesOften(3)})
  np.testing.assert_allclose(have, often, rtol=1e-4, atol=1e-4)
  assert np.abs(have - features(old, flat, image)).max() > 1e-3


@pytest.fixture(scope='module')
def saved(tmp_path_factory, random_like):
  spec = presets.preset('test/8')
  params = random_like(
    jax.eval_shape(ViT(spec, {}, scan=True).init, jax.random.key(0), zeros(spec))
  )
  path = tmp_path_factory.mktemp('own') / 'small.json'
  return str(backbones.save(path, spec, params['params']).weights.path)


def zeros(spec):
  return jnp.zeros((1, *spec.input_shape))


@pytest.mark.parametrize('stack', [True, False])
@pytest.mark.parametrize('name', ['own', 'timm_siglip', 'timm_vit_clip'])
def test_an_image_checkpoint_is_found_and_loaded_as_a_clip_backbone(name, saved, stack):
  name = saved if name == 'own' else str(GOLDEN / name)
  image = backbones.find(name)
  size = image.spec.image_size + 2 * image.spec.patch
  changes = {'frames': 6, 'tubelet': 3, 'inflation': 'average', 'image_size': size}
  clip = backbones.find(name, changes)
  assert clip.spec == dataclasses.replace(image.spec, **changes)
  assert clip.spec.pool == image.spec.pool and clip.spec.mean == image.spec.mean
  have = trees.flatten(backbones.load(clip, stack=stack))
  want = trees.flatten(backbones.load(image, stack=stack))
  assert have.keys() == want.keys()
  for path, leaf in want.items():
    again = checkpoint.resized(path, np.asarray(leaf), image.spec, clip.spec)
    assert have[path].dtype == leaf.dtype
    np.testing.assert_array_equal(have[path], again)
  shapes = jax.eval_shape(ViT(clip.spec, {}, scan=stack).init, jax.random.key(0), zeros(clip.spec))
  assert {p: s.shape for p, s in trees.flatten(shapes['params']).items()} == {
    p: leaf.shape for p, leaf in have.items()
  }


def test_the_inflation_is_part_of_what_a_backbone_is(saved):
  one = backbones.find(saved, {'frames': 4, 'tubelet': 2})
  assert one.spec.inflation == 'central_frame'
  other = backbones.find(saved, {'frames': 4, 'tubelet': 2, 'inflation': 'average'})
  assert one.identity() != other.identity()
  public = backbones.find(str(GOLDEN / 'timm_siglip'), {'frames': 4, 'tubelet': 2})
  assert (public.facts['frames'], public.facts['inflation']) == ('given', 'convention')


def test_a_clip_backbone_is_stored_and_stays_one(saved, tmp_path):
  clip = backbones.find(saved, {'frames': 4, 'tubelet': 2, 'inflation': 'average'})
  params = backbones.load(clip)
  stored = str(backbones.save(tmp_path / 'clip.json', clip.spec, params).weights.path)
  again = backbones.find(stored)
  assert again.spec == dataclasses.replace(clip.spec, name='clip')
  have, want = trees.flatten(backbones.load(again)), trees.flatten(params)
  for path, leaf in want.items():
    np.testing.assert_array_equal(have[path], leaf)
  with pytest.raises(errors.UserError, match='is for clips of 4 frames in tubelets of 2, not 8 fr'):
    backbones.find(stored, {'frames': 8})
  with pytest.raises(errors.UserError, match="'clip' is for clips already"):
    backbones.find(stored, {'inflation': 'average'})


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('own', {'frames': 5, 'tubelet': 2}, '5 frames are not a multiple of the tubelet length 2'),
    ('own', {'frames': 4, 'inflation': 'avrage'}, "inflation 'avrage'. Did you mean 'average'"),
    ('own', {'inflation': 'average'}, r'Give backbone_configs\.frames, too'),
    ('own', {'tubelet': 2}, '0 frames are not a multiple of the tubelet length 2'),
    ('S/16', {'frames': 4, 'inflation': 'average'}, "'S/16' has random weights: .* to inflate"),
    ('timm_dinov3', {'frames': 4}, 'Rotary and relative positions are for images, not for clips'),
    ('hf_beit', {'frames': 4}, 'Rotary and relative positions are for images, not for clips'),
    ('own', {'factorised': True}, 'factorised=True is for clips: it needs frames'),
  ],
)
def test_what_cannot_become_a_clip_backbone_is_refused(name, changes, message, saved):
  name = saved if name == 'own' else name
  name = str(GOLDEN / name) if (GOLDEN / name).exists() else name
  with pytest.raises(errors.UserError, match=message):
    backbones.find(name, changes)


def test_a_converter_is_told_where_clips_are_made():
  with pytest.raises(errors.UserError, match=r'when they are used: --config\.backbone_configs\.fr'):
    checkpoint.open_checkpoint(GOLDEN / 'timm_siglip', {'frames': 4})


def test_the_fields_are_options_of_a_run():
  assert set(inflate.FIELDS) <= set(run_config.default_config().backbone_configs)
