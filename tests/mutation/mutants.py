"""The mutants of a module: copies of its source, each with one small change that a test should notice.

Docstrings, imports, assertions, annotations and the text of messages are not changed.
"""

import ast
import copy
from collections import Counter
from dataclasses import dataclass, replace

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
# An exchange of their arguments changes nothing, or makes a call that always fails.
SYMMETRIC = {"min", "max", "isinstance", "issubclass", "hasattr", "getattr", "setattr", "cast", "suppress"}
SYMMETRIC |= {"np.maximum", "np.minimum", "scaled"}  # `scaled` multiplies
GENERIC = {"dict", "list", "tuple", "set", "type", "NDArray", "Mapping", "Sequence", "Iterable", "Iterator", "Callable"}
UNCHANGED = (ast.Import, ast.ImportFrom, ast.Assert, ast.Global, ast.Nonlocal, ast.JoinedStr)
NOT_CODE = {"annotation", "returns", "ctx", "op", "ops", "type_params"}
CONTEXT = 40


@dataclass(frozen=True)
class Mutant:
    """One change of a module.

    Attributes:
        number: position among the mutants of its module.
        function: qualified name of the function or class that is changed; empty at the top of a module.
        text: what was there and what takes its place. The same text again in one function ends with #2, #3 and so on.
        line: line of the changed code.
        lines: tests that execute one of these lines can notice the change.
        around: the lines of its function.
        name: what the statement defines, where it runs when the module is imported; otherwise None. Several names are
            separated by |.
        span: position of the first byte and position after the last byte that `new` replaces.
    """

    number: int
    function: str
    text: str
    line: int
    lines: range
    around: range
    name: str | None
    span: tuple[int, int]
    new: str

    @property
    def identity(self):
        """What stays the same while other code changes."""
        return self.function, self.text

    def apply(self, source):
        """The source with the change. Its other lines keep their numbers."""
        content = source.encode()
        start, end = self.span
        padding = "\n" * (content[start:end].count(b"\n") - self.new.count("\n"))
        new = self.new[:-1] + padding + ")" if self.new.endswith(")") and padding else self.new + padding
        return (content[:start] + new.encode() + content[end:]).decode()


def mutants(source):
    """All mutants of a module, in the order of its source."""
    found = sorted(_Finder(source).found, key=lambda each: each.span[0])
    return [replace(each, number=number) for number, each in enumerate(found)]


def changes(node, parent):
    """What may take the place of a node of the syntax tree."""
    if isinstance(parent, ast.If | ast.While | ast.IfExp) and node is parent.test and not _has_opposite(node):
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(node, ast.stmt | ast.ExceptHandler):
        yield from _of_statement(node)
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node, parent)
    elif isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp | ast.UnaryOp):
        yield from _of_operation(node)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.Slice):
        for end in ("lower", "upper"):
            if getattr(node, end) is not None:
                yield _changed(node, end, None, None)
    elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        for place, each in enumerate(node.generators):
            for condition in range(len(each.ifs)):
                rest = each.ifs[:condition] + each.ifs[condition + 1 :]
                yield _changed(node, "generators", place, _changed(each, "ifs", None, rest))


def _of_operation(node):
    if isinstance(node, ast.Compare):
        for place, each in enumerate(node.ops):
            for other in COMPARISONS[type(each)]:
                yield _changed(node, "ops", place, other())
    elif isinstance(node, ast.BinOp):
        if type(node.op) in OPERATORS and not _is_text(node):
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for place in range(len(node.values)):
            rest = node.values[:place] + node.values[place + 1 :]
            yield ast.BoolOp(node.op, rest) if len(rest) > 1 else rest[0]
    elif not isinstance(node.operand, ast.Constant):
        yield node.operand


def _of_statement(node):
    if isinstance(node, ast.Return):
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(None)
    elif isinstance(node, ast.ExceptHandler):
        if [type(each) for each in node.body] != [ast.Raise]:
            yield _changed(node, "body", None, [ast.Raise()])
    elif isinstance(node, ast.Expr | ast.Raise | ast.Continue | ast.Break) or (
        isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value and not _is_text(node.value)
    ):
        yield ast.Pass()
    if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)


def _of_constant(node, parent):
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int | float):
        yield ast.Constant(value + 1)
        yield ast.Constant(value - 1)
    elif isinstance(value, bytes):
        yield ast.Constant(value + b"X")
    elif isinstance(value, str) and isinstance(parent, ast.Compare):
        yield ast.Constant(value + "X")


def _of_call(node):
    """Calls with two arguments that follow one another exchanged."""
    if ast.unparse(node.func) in SYMMETRIC or any(isinstance(each, ast.Starred) for each in node.args):
        return
    for place, (left, right) in enumerate(zip(node.args, node.args[1:], strict=False)):
        if ast.dump(left) != ast.dump(right) and not (_is_text(left) or _is_text(right)):
            yield _changed(node, "args", None, [*node.args[:place], right, left, *node.args[place + 2 :]])


def _has_opposite(node):
    """Whether the change of an operator already negates a condition."""
    return isinstance(node, ast.UnaryOp) or (isinstance(node, ast.Compare) and len(node.ops) == 1)


def _is_text(node):
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _changed(node, field, place, new):
    """A copy of a node with one field, or one item of a field, replaced."""
    node = copy.copy(node)
    if place is not None:
        values = list(getattr(node, field))
        values[place] = new
        new = values
    setattr(node, field, new)
    return node


class _Finder:
    """A walk over the syntax tree that collects mutants."""

    def __init__(self, source):
        self.found, self.texts = [], Counter()
        content = source.encode().splitlines(keepends=True)
        self.starts = [sum(map(len, content[:row])) for row in range(len(content))]
        self.around = range(0)
        tree = ast.parse(source)
        self.zeros = set(_first_offsets(tree))
        self.walk(tree, [], "", None, "")

    def walk(self, node, above, function, statement, name):
        """Collect what changes a node. `above` has its ancestors: node, field and place of the next one."""
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, UNCHANGED) or is_docstring or _is_any_size(node, above):
            return
        adds_nothing = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and self.is_zero(node.right)
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            statement = node
            name = _defined(node, name)
        # At import a definition that is missing makes everything fail, which says nothing.
        if above and not (isinstance(node, ast.Assign | ast.AnnAssign) and name is not None) and not adds_nothing:
            for new in changes(node, above[-1][0]):
                self.add(node, new, above, function, statement, name)
        elif isinstance(node, ast.AugAssign):
            raise NotImplementedError("an augmented assignment at the top of a module")
        for field, value in ast.iter_fields(node):
            if field in NOT_CODE or (field == "slice" and getattr(node.value, "id", None) in GENERIC):
                continue
            inside, of = function, name
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and field == "body":
                inside = f"{function}.{node.name}".lstrip(".")
                of = None if isinstance(node, ast.FunctionDef) else name
            values = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
            for place, each in values:
                if isinstance(each, ast.AST):
                    outside = self.around
                    if isinstance(each, ast.FunctionDef):
                        self.around = range(each.lineno, each.end_lineno + 1)
                    self.walk(each, [*above, (node, field, place)], inside, statement, of)
                    self.around = outside

    def is_zero(self, node):
        """Whether a node is the name of an offset that is 0. To subtract it instead of adding it is the same."""
        return isinstance(node, ast.Name) and node.id in self.zeros

    def add(self, node, new, above, function, statement, name):
        before, after = _described(node, new, above)
        text = _window(before, after)
        self.texts[function, text] += 1
        if self.texts[function, text] > 1:
            text += f" #{self.texts[function, text]}"
        first, last, code = node, node, ast.unparse(new)
        if isinstance(node, ast.ExceptHandler):
            first, last, code = node.body[0], node.body[-1], "raise"
        elif isinstance(node, ast.expr) and not isinstance(node, ast.Slice):
            code = f"({code})"
        start = self.starts[first.lineno - 1] + first.col_offset
        end = self.starts[last.end_lineno - 1] + last.end_col_offset
        lines = _lines(statement)
        around = lines if name is not None else self.around
        self.found.append(Mutant(0, function, text, first.lineno, lines, around, name, (start, end), code))


def _first_offsets(tree):
    """The names of the first fields of blocks, whose offsets are 0: D in ``D, QS = field_offsets(LAYOUT)``."""
    for each in tree.body:
        if isinstance(each, ast.Assign) and ast.unparse(each.value).startswith("field_offsets("):
            yield each.targets[0].elts[0].id


def _is_any_size(node, above):
    """Whether this is the -1 of a `reshape`. For NumPy any other negative number is the same."""
    call = above[-1][0] if above else None
    is_reshape = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "reshape"
    return is_reshape and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)


def _defined(node, name):
    """What a statement that runs at import defines; None within a function."""
    if name is None:
        return None
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    names = [each.id for each in ast.walk(target) if isinstance(each, ast.Name)] if target else []
    return "|".join(names) or name


def _lines(statement):
    """The lines of a statement; of one that contains others, those before the others."""
    if isinstance(statement, ast.ExceptHandler):
        return _lines(statement.body[0])
    first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])
    body = getattr(statement, "body", None)
    return range(first, max(body[0].lineno, first + 1) if body else statement.end_lineno + 1)


def _described(node, new, above):
    """The simple statement, or the part of a compound one, that has the change: before and after."""
    for parent, field, place in reversed(above):
        is_compound = hasattr(parent, "body") and not isinstance(parent, ast.IfExp | ast.Lambda)
        if isinstance(node, ast.stmt | ast.ExceptHandler) or is_compound:
            break
        node, new = parent, _changed(parent, field, place, new)
    return (" ".join(ast.unparse(each).split()) for each in (node, new))


def _window(before, after):
    """What differs between two texts, with a little of what is around it."""
    shorter = min(len(before), len(after))
    left = next((at for at in range(shorter) if before[at] != after[at]), shorter)
    right = next((at for at in range(shorter - left) if before[-1 - at] != after[-1 - at]), shorter - left)
    left, right = max(0, left - CONTEXT), max(0, right - CONTEXT)
    return " => ".join(
        ("..." if left else "") + _short(each[left : len(each) - right]) + ("..." if right else "")
        for each in (before, after)
    )


def _short(text):
    return text if len(text) <= 3 * CONTEXT else f"{text[: 2 * CONTEXT]} ... {text[-CONTEXT + 5 :]}"
