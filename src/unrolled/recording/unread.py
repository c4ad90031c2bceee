"""Numbers that stay unread: what a step would tell Python of its tensors, beyond True and False.

Where Python has a number, the tape cannot see what becomes of it. That two numbers were compared it can see, if they
are compared as tensors: so `item()` gives something that can be compared, and no more than that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from unrolled.recording.events import UnrecordableError, depends_on_numbers


class NumbersStayUnread(TorchFunctionMode):
    """Refuses what gives a tensor's numbers to Python, where the tape cannot see what becomes of them."""

    _readers = frozenset(["tolist", "numpy", "__array__", "__repr__", "__format__", "data_ptr"])

    def __init__(self) -> None:
        super().__init__()
        self._handed_out: list[weakref.ref[_Item]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func is Tensor.detach_:  # which tells nobody, least of all the tape
            raise UnrecordableError("it takes a tensor out of its graph in place; write x = x.detach()")
        if name in self._readers:
            raise UnrecordableError(f"what it does may depend on the numbers in its tensors ({name})")
        if any(isinstance(arg, _Item) for arg in (*args, *kwargs.values())):
            raise _computes(name)
        if func is torch.nn.functional.one_hot:
            return _one_hot(func, *args, **kwargs)
        if name == "__bool__" and args[0].dtype != torch.bool:
            return bool(args[0] != 0)
        if name == "item" and args[0].dtype != torch.bool and args[0].numel() == 1:
            item = _Item(args[0])
            self._handed_out.append(weakref.ref(item))
            return item
        return func(*args, **kwargs)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        if kind is TypeError and _Item.__name__ in str(error):  # torch has asked it for a number
            raise _computes("as an argument") from error

    def refuse_kept_items(self) -> None:
        """After the step: a number that is kept somewhere would be another one at every step.

        Raises:
            UnrecordableError: if there is one.
        """
        if any(kept() is not None for kept in self._handed_out):
            raise UnrecordableError("it keeps a number that item() gave it; keep the tensor")


def _one_hot(func: Any, classes: Tensor, num_classes: int = -1) -> Tensor:
    """What `one_hot` gives, by a comparison; that all classes are among the given number is asked."""
    if num_classes == -1:
        raise UnrecordableError("one_hot counts the classes at every step; pass num_classes")
    known = classes.dtype == torch.int64 and bool(((classes >= 0) & (classes < num_classes)).all())
    if not known:
        return cast(Tensor, func(classes, num_classes))  # it raises
    return (classes.unsqueeze(-1) == torch.arange(num_classes, device=classes.device)).to(torch.int64)


class _Item:
    """What `item()` gives while a step is recorded: it can be compared, which the tape sees, and nothing else.

    Args:
        tensor: of one entry.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.reshape(())

    def against(self, other: Any) -> Tensor:
        """The tensor in a dtype in which it is compared exactly, as Python compares numbers."""
        exact = not self.tensor.is_floating_point() and type(other) in (bool, int)
        return self.tensor if exact else self.tensor.double()

    def __bool__(self) -> bool:
        return bool(self.tensor != 0)


def _comparison(name: str) -> Callable[[_Item, Any], bool]:
    def compare(self: _Item, other: Any) -> bool:
        with_number = other.against(0.0) if isinstance(other, _Item) else other
        return bool(getattr(torch.Tensor, name)(self.against(with_number), with_number))

    return compare


def _computes(how: str) -> UnrecordableError:
    return depends_on_numbers(f"it computes with what item() gives ({how}); leave it in the tensor")


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise _computes(name)

    return refuse


for _name in "lt le gt ge eq ne".split():
    setattr(_Item, f"__{_name}__", _comparison(_name))
for _name in (
    "float int index complex round trunc floor ceil abs neg pos hash repr str format array add radd sub rsub mul rmul "
    "truediv rtruediv floordiv rfloordiv mod rmod pow rpow divmod"
).split():
    setattr(_Item, f"__{_name}__", _refusal(_name))
