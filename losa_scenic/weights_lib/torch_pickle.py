"""The pickle inside a PyTorch checkpoint, interpreted here opcode by opcode: it can run nothing.

Python's unpickler imports and calls what a file names. One that only restricts the imports can
still be crashed (hashing deeply nested tuples overflows the C stack) or made to allocate gigabytes
(one memo index of 2**28; copies of one list), so the few opcodes that state dicts consist of are
interpreted here, from the public disassembler `pickletools.genops`. Their number is limited, and
none copies a long list. A global is a name: looked up in the short list below, never imported.
"""

import dataclasses
import io
import pickletools
import re
from typing import Any

import numpy as np

from losa_scenic.common_lib import errors
from losa_scenic.weights_lib import tensors

STORAGES = {
  'torch.FloatStorage': np.dtype(np.float32),
  'torch.HalfStorage': np.dtype(np.float16),
  'torch.BFloat16Storage': tensors.BFLOAT16,
  'torch.DoubleStorage': np.dtype(np.float64),
  'torch.LongStorage': np.dtype(np.int64),
  'torch.IntStorage': np.dtype(np.int32),
  'torch.ShortStorage': np.dtype(np.int16),
  'torch.CharStorage': np.dtype(np.int8),
  'torch.ByteStorage': np.dtype(np.uint8),
  'torch.BoolStorage': np.dtype(np.bool_),
}
_TENSOR = 'torch._utils._rebuild_tensor_v2'
_PARAMETER = 'torch._utils._rebuild_parameter'
_ORDERED_DICT = 'collections.OrderedDict'
_SIZE = 'torch.Size'
_NAMESPACE = 'argparse.Namespace'
_MAX_OPCODES = 2**21  # Each makes at most one item; 1000 tensors and their optimizer need 2**18.
_MAX_ARGUMENTS = 8  # A tensor has 6 or 7.
_GLOBALS = frozenset({_TENSOR, _PARAMETER, _ORDERED_DICT, _SIZE, _NAMESPACE, *STORAGES})
_DTYPES = re.compile(
  r'torch\.(bfloat16|float(16|32|64)|complex(64|128)|int(8|16|32|64)|uint8|bool)'
)

# Opcodes whose argument is what they push. LONG4 is not among them: an integer of megabytes.
_LITERALS = re.compile(
  'BININT[12]?|LONG1|BINFLOAT|(SHORT_)?BINUNICODE8?|(SHORT_)?BINSTRING|(SHORT_)?BINBYTES8?'
)
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_EMPTY = {'EMPTY_TUPLE': tuple, 'EMPTY_LIST': list, 'EMPTY_DICT': dict}
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


@dataclasses.dataclass(frozen=True)
class Global:
  """A function or class that a pickle names, e.g. 'torch.float32'; just the name."""

  name: str


@dataclasses.dataclass(frozen=True)
class Storage:
  """The bytes of one or more tensors.

  Attributes:
    key: name of the archive's member.
    dtype: type of its elements.
    numel: number of its elements.
  """

  key: str
  dtype: np.dtype
  numel: int


@dataclasses.dataclass(frozen=True)
class PickledTensor:
  """A tensor: a strided view of a storage.

  Attributes:
    storage: the storage.
    offset: its first element there.
    shape: its shape.
    strides: elements of the storage from one element to the next, along each axis.
  """

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class Namespace:
  """Stands for an `argparse.Namespace`; its content is not kept."""


def load(data: bytes, name: str) -> Any:
  """Interprets the pickle of a state dict.

  Args:
    data: the pickle, protocol 2 or later.
    name: what to call it in errors.

  Returns:
    What it describes: dicts, lists, tuples, numbers and text; tensors are `PickledTensor`, and
    other globals are `Global` or `Namespace`.

  Raises:
    errors.UserError: if it names any global that a plain state dict does not need, or is damaged.
  """
  machine = _Machine(name)
  try:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
      if opcode.name == 'STOP':
        return machine.pop()
      if count == _MAX_OPCODES:
        raise errors.UserError(
          f'{name}: the pickle holds more than {_MAX_OPCODES:,} items, far more than weights need. '
          f"Save only the weights in PyTorch: torch.save(torch.load(FILE)['model'], NEW_FILE)."
        )
      machine.step(opcode.name, argument)
  except errors.UserError:
    raise
  # A damaged file leads to nearly anything: IndexError, KeyError, TypeError, UnicodeDecodeError.
  except Exception as error:
    message = str(error)[:200] or type(error).__name__
    raise errors.UserError(f'{name}: a damaged pickle ({message}).') from None
  raise errors.UserError(f'{name}: a damaged pickle (no end).')


class _Machine:
  """Stack, marks and memo of a running pickle."""

  def __init__(self, name: str) -> None:
    self._name = name
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []  # The stacks under each mark.
    self._memo: dict[int, Any] = {}

  def pop(self) -> Any:
    return self._stack.pop()

  def step(self, opcode: str, argument: Any) -> None:
    """Runs one opcode."""
    if _LITERALS.fullmatch(opcode):
      self._stack.append(argument)
    elif opcode in _CONSTANTS:
      self._stack.append(_CONSTANTS[opcode])
    elif opcode in _EMPTY:
      self._stack.append(_EMPTY[opcode]())
    elif opcode in _TUPLES:
      count = _TUPLES[opcode]
      if len(self._stack) < count:
        raise IndexError('a tuple lacks items')
      self._stack[-count:] = [tuple(self._stack[-count:])]
    elif opcode in ('GLOBAL', 'STACK_GLOBAL', 'BINPERSID', 'REDUCE', 'NEWOBJ', 'BUILD'):
      self._object(opcode, argument)
    elif opcode not in ('PROTO', 'FRAME'):
      self._structure(opcode, argument)

  def _structure(self, opcode: str, argument: Any) -> None:
    """Marks, the memo, and filling of containers."""
    match opcode:
      case 'MARK':
        self._below.append(self._stack)
        self._stack = []
      case 'POP':
        self._stack.pop()
      case 'BINPUT' | 'LONG_BINPUT':
        self._memo[argument] = self._stack[-1]
      case 'MEMOIZE':
        self._memo[len(self._memo)] = self._stack[-1]
      case 'BINGET' | 'LONG_BINGET':
        self._stack.append(self._memo[argument])
      case 'TUPLE':
        items = tuple(self._pop_mark())  # First, because it changes the stack.
        self._stack.append(items)
      case 'APPEND':
        self._extend([self._stack.pop()])
      case 'APPENDS':
        self._extend(self._pop_mark())
      case 'SETITEM':
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])
      case 'SETITEMS':
        self._update(self._pop_mark())
      case _:
        raise errors.UserError(f'{self._name}: the pickle uses {opcode}, which is not allowed.')

  def _pop_mark(self) -> list[Any]:
    items, self._stack = self._stack, self._below.pop()
    return items

  def _extend(self, items: list[Any]) -> None:
    target = self._stack[-1]
    if type(target) is not list:
      raise TypeError('items for something that is no list')
    target.extend(items)

  def _update(self, items: list[Any]) -> None:
    target = self._stack[-1]
    if type(target) is not dict or len(items) % 2:
      raise TypeError('keys and values for something that is no dict')
    for key, value in zip(items[::2], items[1::2], strict=True):
      # Only flat keys: hashing nested ones can overflow the stack.
      if key is not None and type(key) not in (str, int, float, bool):
        raise TypeError(f'a dict key of type {type(key).__name__}')
      if key in target:
        raise errors.UserError(f"{self._name}: '{str(key)[:100]}' stands twice in a dict.")
      target[key] = value

  def _object(self, opcode: str, argument: Any) -> None:
    """Globals, and what is made of them."""
    match opcode:
      case 'GLOBAL':
        self._stack.append(self._global('.'.join(argument.split(' ', 1))))
      case 'STACK_GLOBAL':
        attribute, module = self._stack.pop(), self._stack.pop()
        if type(module) is not str or type(attribute) is not str:
          raise TypeError('a global whose name is no text')
        self._stack.append(self._global(f'{module}.{attribute}'))
      case 'BINPERSID':
        self._stack.append(_storage(self._stack.pop()))
      case 'REDUCE':
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))
      case 'NEWOBJ':
        arguments, cls = self._stack.pop(), self._stack.pop()
        if cls != Global(_NAMESPACE) or arguments != ():
          raise TypeError(f'an object of {getattr(cls, "name", "something that is no class")}')
        self._stack.append(Namespace())
      case 'BUILD':
        self._stack.pop()  # Attributes, such as the versions of modules that torch notes.
        if type(self._stack[-1]) not in (dict, Namespace):
          raise TypeError('attributes for something that has none')

  def _global(self, name: str) -> Global:
    if name not in _GLOBALS and not _DTYPES.fullmatch(name):
      raise errors.UserError(
        f"{self._name}: the pickle refers to '{name[:200]}', which a plain state dict does not "
        f'need and which might run code: refused. Save only its weights in PyTorch: '
        f"torch.save(torch.load(FILE)['model'], NEW_FILE). Where torch.load refuses it, too, "
        f'weights_only=False would run what is in the file: only if you trust who made it.'
      )
    return Global(name)

  def _call(self, function: Any, arguments: Any) -> Any:
    if type(function) is not Global or type(arguments) is not tuple:
      raise TypeError('a call of something that is no function')
    if len(arguments) > _MAX_ARGUMENTS:
      raise TypeError(f'a call with {len(arguments)} arguments')
    match function.name:
      case name if name == _TENSOR:
        return _tensor(self._name, *arguments)
      case name if name == _PARAMETER:
        if type(arguments[0]) is not PickledTensor:
          raise TypeError('a parameter without a tensor')
        return arguments[0]
      case name if name == _ORDERED_DICT and arguments == ():
        return {}
      case name if name == _SIZE and len(arguments) == 1:
        return tensors.check_shape(f'{self._name}: {_SIZE}', arguments[0], 1)
      case name if name == _NAMESPACE and arguments == ():
        return Namespace()
    raise TypeError(f'a call of {function.name}')


def _storage(identity: Any) -> Storage:
  """The storage of a persistent id: ('storage', type, key, where it once was, elements)."""
  kind, storage_type, key, _, numel = identity
  if kind != 'storage' or type(key) is not str or type(numel) is not int or numel < 0:
    raise TypeError('a persistent id that is no storage')
  return Storage(key, STORAGES[storage_type.name], numel)


def _tensor(
  name: str, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> PickledTensor:
  """A tensor that lies within its storage."""
  if type(storage) is not Storage or type(offset) is not int or offset < 0:
    raise TypeError('a tensor without a storage')
  shape = tensors.check_shape(f'{name}: a tensor', shape, storage.dtype.itemsize)
  strides = tensors.check_shape(f'{name}: strides of a tensor', strides, 1)
  if 0 not in shape and tensors.span(offset, shape, strides, 1)[1] > storage.numel:
    raise ValueError(f'a tensor of shape {shape} reaches beyond its storage')
  return PickledTensor(storage, offset, shape, strides)
