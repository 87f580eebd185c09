"""Arithmetic on names of measures, as a study's report asks for it."""

import ast
import operator

import numpy as np

from nanochat.common import UserError

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.USub: operator.neg}


class Formula:
    """Arithmetic on names of measures, like "(nll_window - nll_lens) / (nll_window - nll_full)".
    UserError if it is anything else."""

    def __init__(self, text: str):
        self.text = text
        try:
            self.tree = ast.parse(text, mode="eval").body
        # of deep nesting, and of what is no text for a parser
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(f"{text!r} is no arithmetic on names of measures") from None
        self.names: set[str] = set()
        self._check(self.tree)

    def _check(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name):
            self.names.add(node.id)
        elif isinstance(node, ast.BinOp | ast.UnaryOp) and type(node.op) in OPERATORS:
            for child in (node.left, node.right) if isinstance(node, ast.BinOp) else (node.operand,):
                self._check(child)
        elif not (isinstance(node, ast.Constant) and isinstance(node.value, int | float)):
            raise UserError(f"{self.text!r} is no arithmetic on names of measures: {ast.unparse(node)!r}")

    def __call__(self, values: dict[str, np.ndarray]) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._value(self.tree, values)

    def _value(self, node: ast.AST, values: dict[str, np.ndarray]) -> np.ndarray:
        if isinstance(node, ast.Name):
            return values[node.id]
        if isinstance(node, ast.Constant):
            return np.float64(node.value)
        children = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.operand,)
        return OPERATORS[type(node.op)](*(self._value(child, values) for child in children))
