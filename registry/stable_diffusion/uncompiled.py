"""Use diffusers, transformers and bitsandbytes quietly, and without torch's compiler.

They mark functions for `torch.compile`, and to do so load its two packages, `torch._dynamo` and
`torch._inductor`, as much code as all of torch. hdb compiles nothing. While such a library is
imported a stand-in takes the place of `torch._dynamo`: its marks do nothing. Afterwards it is gone,
and whoever compiles something in the same process loads the real one.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar, cast

import torch

from registry.errors import HdbError

T = TypeVar("T")
NAME = "torch._dynamo"
MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")  # of an Optimizer


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import libraries, and load models with them, inside the block without torch's compiler,
    unless it is loaded already; HdbError where Python has left out what they need."""
    _check_docstrings()
    if NAME in sys.modules:
        yield
        return
    compiler: Any = torch  # whose functions have overloads
    before = compiler.compile, compiler._disable_dynamo
    stand_in: Any = ModuleType(NAME)
    stand_in.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]  # small parts are read
    stand_in.allow_in_graph = stand_in.assume_constant_result = stand_in.disable = _as_it_is
    stand_in.eval_frame = SimpleNamespace(OptimizedModule=_Compiled)
    stand_in.config = SimpleNamespace(error_on_nested_fx_trace=True)  # asked by checkpointing
    sys.modules[NAME] = stand_in
    compiler.compile = compiler._disable_dynamo = _as_it_is
    fill = torch.nn.init.normal_
    torch.nn.init.normal_ = partial(_normal, fill)
    try:
        yield
    finally:
        compiler.compile, compiler._disable_dynamo = before
        torch.nn.init.normal_ = fill
        if sys.modules.get(NAME) is stand_in:
            del sys.modules[NAME]
        if vars(torch).get("_dynamo") is stand_in:
            del torch._dynamo


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' bars and advice off the terminal while a model loads; errors
    still raise."""
    light_transformers()
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    logs = (diffusers_log, transformers_log)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def light_transformers() -> None:
    """Import transformers so that it does nothing twice, and nothing for several machines.

    It looks through the files of its models, twice, since its cache holds 128 folders of 550. And
    it asks once whether torch can share tensors among machines, keeps the answer, and every import
    of that kind depends on it: half of its own time, sympy's most of all. In a process that works
    by itself it is told no; torch, and whoever else asks torch, is not.
    """
    if "transformers" in sys.modules:
        return
    few, distributed = functools.lru_cache, cast("Any", torch.distributed)
    functools.lru_cache = cast("Any", partial(_remember_all, few))
    try:
        from transformers.utils.import_utils import is_torch_distributed_available as available
    finally:
        functools.lru_cache = few
    there = distributed.is_available
    if not there() or distributed.is_initialized():
        return
    distributed.is_available = lambda: False
    try:
        available()
    finally:
        distributed.is_available = there


def _remember_all(cache: Any, maxsize: Any = 128, typed: bool = False) -> Any:
    """Make a cache that drops nothing where nobody said how much it is to hold."""
    return cache(None)(maxsize) if callable(maxsize) else cache(maxsize, typed)


def light_optimizers() -> None:
    """Let optimizers be made without loading torch's compiler, only for it to leave them alone.

    torch wraps some of their methods so that it loads the compiler at the first call and asks it
    for a function that it does not compile; outside of compiled code that is the function itself.
    """
    for name in MARKED:
        method = getattr(torch.optim.Optimizer, name)
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            vars(plain)["__dynamo_disable"] = plain


class _Compiled:
    """What a compiled module would be: none is."""


def _normal(
    fill: Callable[..., torch.Tensor], tensor: torch.Tensor, *given: Any, **more: Any
) -> torch.Tensor:
    """Fill a tensor with random numbers if it has any: on the meta device, where it has none, torch
    goes through code that the compiler shares, and sympy."""
    return tensor if tensor.is_meta else fill(tensor, *given, **more)


def _check_docstrings() -> None:
    """Raise HdbError where Python strips docstrings: diffusers and transformers put theirs
    together when they are imported, and fail on none."""
    if sys.flags.optimize > 1:
        raise HdbError(
            "Python runs with -OO (or PYTHONOPTIMIZE=2) and leaves out docstrings, without which "
            "diffusers and transformers do not load; use -O, or neither"
        )


def _as_it_is(function: Any = None, *_: Any, **__: Any) -> Any:
    """Return what is decorated, or what decorates nothing."""
    return _same if function is None else function


def _same(function: Callable[..., T]) -> Callable[..., T]:
    return function
