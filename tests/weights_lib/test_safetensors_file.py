"""Safetensors: the header's metadata, and the rules that it must keep."""

import json
import re
import struct

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import sources


def raw_safetensors(path, header, data=b'', length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text) if length is None else length) + text + data)
  return path


def entry(start, end, shape, dtype='F32'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': [start, end]}


def test_safetensors_metadata(tmp_path):
  path = tmp_path / 'a.safetensors'
  safetensors_numpy.save_file({'a': np.ones(3, np.float32)}, path, {'format': 'pt'})
  assert sources.open_source(path).metadata == {'__metadata__': {'format': 'pt'}}


F = b'\0' * 64
BAD_HEADERS = {
  'length of 2**60': ({}, F, 2**60, 'the header should have'),
  'longer than the file': ({}, F, 100, 'cut off'),
  'no JSON': (b'{"a": ', F, None, 'not valid JSON'),
  'endless brackets': (b'{"a":' + b'[' * 100_000, F, None, 'not valid JSON'),
  'doubled name': (
    b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 64, [16])).encode(),) * 2),
    F,
    None,
    "'a' stands twice",
  ),
  'overlap': ({'a': entry(0, 64, [16]), 'b': entry(32, 64, [8])}, F, None, 'overlaps'),
  'hole': ({'a': entry(0, 16, [4]), 'b': entry(32, 64, [8])}, F, None, 'hole'),
  'late start': ({'a': entry(32, 64, [8])}, F, None, 'hole'),
  'past the end': ({'a': entry(0, 128, [32])}, F, None, 'cut off'),
  'bytes left over': ({'a': entry(0, 32, [8])}, F, None, '32 bytes of tensors'),
  'size of another shape': ({'a': entry(0, 64, [15])}, F, None, 'needs 60 bytes'),
  'negative range': ({'a': entry(64, 0, [16])}, F, None, 'needs 64 bytes'),
  'negative axes': ({'a': entry(0, 64, [-4, -4])}, F, None, 'no list of integers'),
  'boolean axis': ({'a': entry(0, 4, [True])}, F[:4], None, 'no list of integers'),
  'huge and empty': ({'a': entry(0, 0, [0, 2**62])}, b'', None, 'too large'),
  'huge': ({'a': entry(0, 64, [2**40, 2**40])}, F, None, 'too large'),
  'unknown dtype': ({'a': entry(0, 64, [16], 'F31')}, F, None, "'F31'. Did you mean 'F32'"),
  'no shape': ({'a': {'dtype': 'F32', 'data_offsets': [0, 64]}}, F, None, 'needs exactly'),
  'text offsets': ({'a': entry('0', '64', [16])}, F, None, 'two integers'),
}


@pytest.mark.parametrize('case', BAD_HEADERS)
def test_bad_safetensors_headers_are_refused(case, tmp_path):
  header, data, length, message = BAD_HEADERS[case]
  path = raw_safetensors(tmp_path / 'a.safetensors', header, data, length)
  with pytest.raises(errors.UserError, match=re.escape(message)) as error:
    sources.open_source(path)
  assert str(path) in str(error.value)
