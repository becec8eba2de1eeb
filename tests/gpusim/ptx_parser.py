"""Reads PTX: the parameters, registers, shared arrays, labels and instructions of one kernel."""
import dataclasses
import functools
import re
from typing import NamedTuple

import numpy as np

IDENTIFIER = re.compile(r"%?[A-Za-z_$][\w$]*(?:\.[xyz])?")
TYPE = re.compile(r"[usbf](?:8|16|32|64)|bf16|tf32|f16x2|bf16x2|f32x2|pred")
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
STATIC_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.[usbf](\d+)\s+([\w$]+)(?:\[(\d+)\])?\s*;")
DYNAMIC_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]")
TABLE = re.compile(r"\.(?:const|global)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\](?:\s*=\s*\{([\d,\s]*)\})?\s*;")
PARAMETER = re.compile(r"\.([usbf]\d+)\b.*?([\w$]+)\s*(?:\[(\d+)\])?$", re.DOTALL)
DYNAMIC_ALIGNMENT = 1024
COMPUTED = {"bf16": np.float32, "tf32": np.float32, "pred": np.bool_}
NUMPY_KINDS = {"s": "int", "u": "uint", "b": "uint", "f": "float"}
NUMPY = {(kind, bits): getattr(np, f"{kind}{bits}") for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)
         if (kind, bits) != ("float", 8)}


class PtxError(Exception):
    """What a kernel did wrong, or what of its PTX is not modelled here."""


class Type(NamedTuple):
    """A PTX type. kind: s, u, b, f, bf16, tf32 or pred; bits: of its register."""
    kind: str
    bits: int

    @property
    def dtype(self):
        """The numpy type to compute in: float32 for bf16 and tf32."""
        return COMPUTED.get(self.kind) or NUMPY[NUMPY_KINDS[self.kind], self.bits]

    @property
    def raw(self):
        """The unsigned type of the same size."""
        return NUMPY["uint", self.bits]


SPECIAL_TYPES = {"bf16": Type("bf16", 16), "tf32": Type("tf32", 32), "pred": Type("pred", 1), "f16x2": Type("b", 32),
                 "bf16x2": Type("b", 32), "f32x2": Type("b", 64)}


def to_type(name):
    return SPECIAL_TYPES.get(name) or Type(name[0], int(name[1:]))


@dataclasses.dataclass
class Instruction:
    """opcode: up to the first dot; modifiers: the parts after it. Operands are texts, with registers' unique names."""
    text: str
    opcode: str
    modifiers: tuple
    operands: list
    predicate: str | None
    negated: bool

    @functools.cached_property
    def types(self):
        return [to_type(modifier) for modifier in self.modifiers if TYPE.fullmatch(modifier)]

    @property
    def type(self):
        """The last type named, which is the operands' where there is but one."""
        if not self.types:
            raise PtxError(f"no type known: {self.text}")
        return self.types[-1]

    def has(self, *names):
        return any(name in self.modifiers for name in names)


@dataclasses.dataclass
class Program:
    """parameters: name -> Type, of a struct its bytes as one number of bits; registers: name -> Type; shared: array name ->
    offset in shared memory; tables: of the whole text, name -> bytes in global or constant memory."""
    parameters: dict
    shared: dict
    static_shared: int
    dynamic_offset: int
    tables: dict
    registers: dict = dataclasses.field(default_factory=dict)
    instructions: list = dataclasses.field(default_factory=list)
    labels: dict = dataclasses.field(default_factory=dict)


@functools.lru_cache(maxsize=64)
def parse(ptx, name=None):
    """The Program of the entry `name`, or of the first entry; not to be changed, for it is given again."""
    ptx, found = entries(ptx)
    entry = next(iter(found.values()), None) if name is None else found.get(name)
    if entry is None:
        raise PtxError(f"no entry {name}, only: {', '.join(found)}")
    body, before = _body(ptx, entry.end()), ptx[:next(iter(found.values())).start()]
    tables = {table[1]: _table(table[2], table[3]) for table in TABLE.finditer(before)}
    program = Program(_parameters(entry[2]), *_shared_arrays(before + body), tables)
    _Reader(program).read(body)
    return program


@functools.lru_cache(maxsize=32)
def entries(ptx):
    """(the text without its comments, name of an entry -> the match of its head there)."""
    ptx = COMMENT.sub("", ptx)
    return ptx, {found[1]: found for found in ENTRY.finditer(ptx)}


def alone(ptx, name):
    """The text without the other entries."""
    ptx, found = entries(ptx)
    entry = found[name]
    before = re.sub(r"\.(?:visible|weak)\s*$", "", ptx[:next(iter(found.values())).start()])
    return f"{before}.visible {entry[0]}{_body(ptx, entry.end())}}}\n"


def split_operands(text):
    """The comma-separated parts of an operand list; commas inside brackets don't count."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def vector(operand):
    """The parts of {a, b, ...}, or the operand alone."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


def _body(ptx, start):
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[end], 0)
        end += 1
    return ptx[start:end - 1]


def _parameters(text):
    found = [PARAMETER.search(parameter).groups() for parameter in split_operands(text)]
    return {name: Type("b", 8 * int(size)) if size else to_type(kind) for kind, name, size in found}


def _table(size, values):
    """Its bytes; those that no value is given for are 0."""
    given = bytes(int(value) for value in (values or "").split(",") if value.strip())
    return given.ljust(int(size), b"\0")


def _shared_arrays(text):
    """(name -> offset, bytes of the static arrays, offset of the dynamic one)."""
    offsets, size = {}, 0
    for array in STATIC_SHARED.finditer(text):
        size = _aligned(size, max(int(array[1]), 16))
        offsets[array[3]] = size
        size += int(array[4] or 1) * int(array[2]) // 8
    dynamic = _aligned(size, DYNAMIC_ALIGNMENT)
    for array in DYNAMIC_SHARED.finditer(text):
        offsets[array[1]] = dynamic
    return offsets, size, dynamic


def _aligned(offset, alignment):
    return -(-offset // alignment) * alignment


class _Reader:
    """Fills a Program from the text of its body. Registers of inner scopes get names of their own."""

    def __init__(self, program):
        self.program = program
        self.scopes, self.scope_count = [{}], 0

    def read(self, body):
        body = re.sub(r"^\s*\.(loc|file|section)\b.*$", "", body, flags=re.MULTILINE)
        for statement in self._statements(body):
            if statement == "{":
                self.scopes.append({})
                self.scope_count += 1
            elif statement == "}":
                self.scopes.pop()
            else:
                self._statement(statement)

    @staticmethod
    def _statements(body):
        """Statements without their semicolon, and { or } where a scope begins or ends: at the start of a statement."""
        text = ""
        for piece in re.split(r"([{};])", body):
            labels = re.fullmatch(r"(\s*[$\w]+:)*\s*", text)
            if piece == ";" or (piece in "{}" and labels and piece):
                if text.strip():
                    yield text.strip()
                if piece != ";":
                    yield piece
                text = ""
            else:
                text += piece

    def _statement(self, text):
        while label := re.match(r"([$\w]+):\s*", text):
            self.program.labels[label[1]] = len(self.program.instructions)
            text = text[label.end():]
        if text.startswith(".reg"):
            self._declare(text)
        elif text and not text.startswith("."):
            self.program.instructions.append(self._instruction(text))

    def _declare(self, text):
        kind, names = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", text, re.DOTALL).groups()
        for name in split_operands(names):
            numbered = re.fullmatch(r"(%?[\w$]+?)<(\d+)>", name)
            members = [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [name]
            for member in members:
                unique = f"{member}@{self.scope_count}" if len(self.scopes) > 1 else member
                self.scopes[-1][member] = unique
                self.program.registers[unique] = to_type(kind)

    def _instruction(self, text):
        guard = re.match(r"@(!?)(%?[\w$]+)\s+", text)
        parts = re.fullmatch(r"([a-z]\w*)([\w.:]*)\s*(.*)", text[guard.end():] if guard else text, re.DOTALL)
        if parts is None:
            raise PtxError(f"cannot parse: {text[:80]}")
        operands = IDENTIFIER.sub(lambda found: self._unique(found[0]), parts[3].replace("\n", " "))
        predicate = self._unique(guard[2]) if guard else None
        return Instruction(" ".join(text.split()), parts[1], tuple(parts[2].split(".")[1:]), split_operands(operands),
                           predicate, bool(guard and guard[1]))

    def _unique(self, name):
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name
