"""Owns the calculator: numbers, + - * / // % **, brackets, and sum, min, max, round, abs. Nothing is run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field

from tiny_llm.agent.action import AgentTool, Arguments, Outcome, Prepared
from tiny_llm.errors import RequestError

_MOST_BITS = 4096
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_FUNCTIONS: Mapping[str, Any] = {"sum": lambda *x: sum(x), "min": min, "max": max, "round": round, "abs": abs}


class _Expression(Arguments):
    expression: Annotated[str, Field(description="For example 12 * 7.")]


def calculator() -> AgentTool:
    """The tool that computes."""

    def prepare(given: _Expression) -> Prepared:
        return Prepared(f"calculator {given.expression}", lambda: Outcome(calculate(given.expression)))

    return AgentTool.of("calculator", "Compute an arithmetic expression.", _Expression, prepare)


def calculate(expression: str) -> str:
    """The value of an expression, as text. Raises RequestError for what is none, or is too large."""
    try:
        if len(expression) > 4000:
            raise ValueError("it is longer than 4,000 characters")
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (ArithmeticError, SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise RequestError(f"{expression[:200]!r} cannot be computed: {error}.") from error


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.BinOp() if type(node.op) in _BINARY:
            left, right = _value(node.left), _value(node.right)
            if isinstance(node.op, ast.Pow) and _bits(left) * abs(right) > _MOST_BITS:
                raise ValueError("a power is too large")
            return _small(_BINARY[type(node.op)](left, right))
        case ast.UnaryOp() if type(node.op) in _UNARY:
            return _UNARY[type(node.op)](_value(node.operand))
        case ast.Call(func=ast.Name(id=name), args=[ast.List(elts=args)] | args, keywords=[]):
            if args and name in _FUNCTIONS:
                return _small(_FUNCTIONS[name](*map(_value, args)))
    raise ValueError("only numbers, + - * / // % **, brackets, sum, min, max, round and abs are known")


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 64


def _small(value: Any) -> Any:
    if _bits(value) > _MOST_BITS:
        raise ValueError("the value is too large")
    if isinstance(value, complex):
        raise ValueError("the value is no real number")
    return value
