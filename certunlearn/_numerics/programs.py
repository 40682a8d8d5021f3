"""What a traced function holds: a look into programs, however they are nested."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def inner(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs among an equation's parameters: bodies of loops, branches, called functions."""
    for leaf in jax.tree.leaves(list(parameters.values())):
        if isinstance(leaf, ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, Jaxpr):
            yield leaf


def holds(program: Jaxpr, primitive: str) -> bool:
    """Whether an operation of this name is anywhere in a program.

    >>> import jax.numpy as jnp
    >>> program = jax.make_jaxpr(jax.jit(jnp.sin))(1.0)
    >>> holds(program.jaxpr, "sin"), holds(program.jaxpr, "cos")
    (True, False)
    """
    return any(
        equation.primitive.name == primitive
        or any(holds(each, primitive) for each in inner(equation.params))
        for equation in program.eqns
    )


def constants(program: Jaxpr) -> Iterator[Any]:
    """The arrays that functions called by a program hold; not those of the program itself."""
    for equation in program.eqns:
        for leaf in jax.tree.leaves(list(equation.params.values())):
            if isinstance(leaf, ClosedJaxpr):
                yield from leaf.consts
        for each in inner(equation.params):
            yield from constants(each)
