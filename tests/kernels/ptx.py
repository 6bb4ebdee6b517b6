"""Executes the machine-independent assembly (PTX) that Triton compiles, with numpy: a card for tests, sm_80 to sm_90.

Triton's interpreter runs the Python of a kernel; this runs what the compiler made of it: layouts, masks, pointers
that it took to be aligned, tensor cores with bf16 operands, asynchronous copies. As a card does it stops at a
misaligned access, and unlike a card at every access outside of the tensors that the kernel was given, and where warps
race for shared memory: what one reads another wrote, or the other way round, with no barrier between. Shared memory and
registers start as NaN; what an asynchronous copy brings arrives when it is waited for and not before. Products of
matrices are exact ones summed in fp32, and the approximate division and exponential exact: a card's may differ in the
last bits.

Many programs of a launch go through an instruction together. Only what our kernels need is here; another
instruction is a NotImplementedError. Registers are unsigned integers of their width, in
arrays (programs, threads); predicates are booleans.

Source: PTX ISA 8.8 (fragments of mma and wgmma, descriptors of shared memory, swizzles).
"""

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
LANES = 32
THREADS_AT_ONCE = 2**15
HALVES = ("bf16", "f16")
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


class Fault(Exception):
    """What a card would stop at, or should."""


@dataclass(frozen=True)
class Instruction:
    """One line; `guard` is the predicate before it, `operands` are names, numbers, or groups of them."""

    line: int
    name: str
    guard: str
    negated: bool
    operands: tuple[Any, ...]


@dataclass
class State:
    """Some programs of a launch that have taken the same branches so far."""

    programs: Array  # (C, 3): where in the grid
    shared: Array  # (C, bytes)
    wrote: Array  # (C, bytes / 2): a bit for each warp that wrote there since the last barrier
    looked: Array  # (C, bytes / 2): and that read there
    held: Array  # (C, bytes / 2): how many asynchronous products are reading there
    registers: dict[str, Array] = field(default_factory=dict)
    at: int = 0
    # Of both, the last group is open: copies as what they will do, products as the places that they read.
    copies: list[list[Callable[["State"], None]]] = field(default_factory=lambda: [[]])
    products: list[list[tuple[Array, Array]]] = field(default_factory=lambda: [[]])

    @classmethod
    def start(cls, programs: Array, shared_bytes: int) -> "State":
        size = -(-shared_bytes // 16) * 16
        wrote, looked, held = (np.zeros((len(programs), size // 2), np.uint16) for _ in range(3))
        return cls(programs, np.full((len(programs), size), 0xFF, np.uint8), wrote, looked, held)

    def of(self, chosen: Array) -> "State":
        assert not any(self.copies) and not any(self.products), "programs part while something is under way"
        parts = (self.programs, self.shared, self.wrote, self.looked, self.held)
        registers = {name: value[chosen] for name, value in self.registers.items()}
        copies, products = [list(group) for group in self.copies], [list(group) for group in self.products]
        return State(*(part[chosen] for part in parts), registers, self.at, copies, products)


class Program:
    """A compiled kernel."""

    def __init__(self, ptx: str) -> None:
        head, body = ptx.split(".visible .entry", 1)
        entry, body = body.split("{", 1)
        self.parameters = re.findall(r"\.param \.(\w+)[^,\n]*?(\w+)(?:,|\n)", entry)
        self.threads = int(re.search(r"\.reqntid (\d+)", entry)[1])  # type: ignore[index]
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        first = head.count("\n") + entry.count("\n") + 1
        for number, text in enumerate(body.split("\n"), first):
            for statement in re.sub(r"//.*", "", text).split(";"):
                self._add(number, statement.strip())

    def _add(self, line: int, text: str) -> None:
        while label := re.match(r"(\$\w+):\s*", text):
            self.labels[label[1]] = len(self.code)
            text = text[label.end() :]
        parts = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", text)
        if parts is None:
            assert not text or text[0] in "{}." or text[0] == ")", text
            return
        negated, guard, name, rest = parts.groups()
        self.code.append(Instruction(line, name, guard or "", bool(negated), tuple(_operands(rest))))

    def run(
        self,
        grid: Sequence[int],
        arguments: Sequence[int],
        memory: "Memory",
        shared_bytes: int,
        traffic: "Traffic | None" = None,
    ) -> None:
        """Run all programs. `arguments` are the numbers and addresses of the parameters."""
        counts = [range(n) for n in grid]
        where = np.array(np.meshgrid(*counts, indexing="ij"), dtype=np.uint32).reshape(3, -1).T
        at_once = max(1, THREADS_AT_ONCE // self.threads)
        for start in range(0, len(where), at_once):
            states = [State.start(where[start : start + at_once], shared_bytes)]
            while states:
                with np.errstate(all="ignore"):
                    states += Machine(self, arguments, memory, states.pop(), traffic).run()


def _operands(text: str) -> Iterator[Any]:
    for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+", text):
        if part[0] == "{":
            yield tuple(piece.strip() for piece in part[1:-1].split(","))
        elif part[0] == "[":
            base, _, offset = part[1:-1].partition("+")
            yield [base.strip(), int(offset, 0) if offset.strip() else 0]
        else:
            yield part


class Memory:
    """The tensors that a kernel was given: (address, bytes) of each."""

    def __init__(self, regions: Sequence[tuple[int, int]]) -> None:
        self.regions = [(start, start + size) for start, size in regions if size]

    def load(self, addresses: Array, width: int, count: int) -> Array:
        """(n, count) elements of `width` bytes from n addresses."""
        values = np.empty((len(addresses), count), UNSIGNED[8 * width])
        for elements, index, inside in self._places(addresses, width, count):
            values[inside] = elements[index]
        return values

    def store(self, addresses: Array, values: Array) -> None:
        """Write values (n, count) to n addresses."""
        for elements, index, inside in self._places(addresses, values.dtype.itemsize, values.shape[1]):
            elements[index] = values[inside]

    def _places(self, addresses: Array, width: int, count: int) -> Iterator[tuple[Array, Array, Array]]:
        """For every tensor that is met: its elements, the index of those meant, and which addresses lie inside."""
        size = width * count
        if (addresses % np.uint64(size)).any():
            raise Fault(f"misaligned access of {size} bytes")
        left = np.ones(len(addresses), bool)
        for start, end in self.regions:
            inside = left & (addresses >= np.uint64(start)) & (addresses + np.uint64(size) <= np.uint64(end))
            if inside.any():
                base = start // 16 * 16
                elements = (ctypes.c_uint8 * ((end - base) // width * width)).from_address(base)
                first = (addresses[inside] - np.uint64(base)).astype(np.int64) // width
                yield np.frombuffer(elements, UNSIGNED[8 * width]), first[:, None] + np.arange(count), inside
                left &= ~inside
        if left.any():
            raise Fault(f"access of {size} bytes at {int(addresses[left][0]):#x}, outside of every tensor")


@dataclass
class Traffic:
    """What warps ask of memory: for each kernel and instruction the least that would do, and what it takes.

    Sectors of 32 bytes of memory; cycles of shared memory, whose 32 banks of 4 bytes serve 128 bytes in each.
    """

    kernel: str = ""
    counts: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def sectors(self, name: str, addresses: Array, active: Array, size: int) -> None:
        """Addresses (C, N), of `size` bytes each."""
        sectors = np.where(active, addresses // np.uint64(32) + np.uint64(1), np.uint64(0)).reshape(-1, LANES)
        least = -(-active.reshape(-1, LANES).sum(-1) * size // 32)
        self._count(name, int(least.sum()), int(_different(sectors).sum()))

    def cycles(self, name: str, addresses: Array, active: Array, size: int) -> None:
        """Addresses (C, N) in shared memory; wide accesses go in groups of 128 bytes."""
        words = max(size // 4, 1)
        lanes = LANES // words
        asked = np.where(active[..., None], addresses[..., None] // 4 + np.arange(words), -1).reshape(-1, lanes * words)
        asked = asked[(asked >= 0).any(-1)]
        worst = np.zeros(len(asked), np.int64)
        for bank in range(32):
            worst = np.maximum(worst, _different(np.where(asked % 32 == bank, asked + 1, 0)).sum(-1))
        self._count(name, len(asked), int(worst.sum()))

    def _count(self, name: str, least: int, taken: int) -> None:
        counts = self.counts.setdefault((self.kernel, name), [0, 0])
        counts[0] += least
        counts[1] += taken


def _different(values: Array) -> Array:
    """Where a value stands for the first time in its row, zeros left out."""
    ordered = np.sort(values, -1)
    first = ordered != 0
    first[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    return first


class Machine:
    """Runs a state until it ends or its programs part."""

    def __init__(
        self, program: Program, arguments: Sequence[int], memory: Memory, state: State, traffic: "Traffic | None"
    ) -> None:
        self.program, self.memory, self.state, self.traffic = program, memory, state, traffic
        names = [name for _, name in program.parameters]
        self.parameters = dict(zip(names, arguments, strict=True))
        self.threads = np.arange(program.threads, dtype=np.uint32)
        self.shape = (len(state.programs), program.threads)

    def run(self) -> list[State]:
        state, code = self.state, self.program.code
        while True:
            instruction = code[state.at]
            state.at += 1
            root = instruction.name.split(".")[0]
            if root == "ret":
                return []
            if root == "bra":
                if parted := self._branch(instruction):
                    return parted
            elif root in ARITHMETIC:
                self._calculate(instruction, ARITHMETIC[root])
            else:
                try:
                    getattr(self, "_" + root, self._unknown)(instruction)
                except Fault as fault:
                    raise Fault(f"{fault} (line {instruction.line}: {instruction.name})") from None

    def _unknown(self, i: Instruction) -> None:
        raise NotImplementedError(f"line {i.line}: {i.name}")

    # Registers

    def read(self, operand: Any, kind: str = "b32") -> Array:
        """An operand as an array (C, N): a register, a special one, a number, the address of shared memory."""
        value: Any
        if operand[0] == "%" and operand in self.state.registers:
            value = self.state.registers[operand]
        elif operand[0] == "%":
            value = self._special(operand)
        elif operand == "global_smem":
            value = np.zeros((1, 1), np.uint32)
        elif operand.startswith("0f"):
            value = np.full((1, 1), int(operand[2:], 16), np.uint32)
        else:
            value = np.full((1, 1), int(operand, 0) % (1 << _bits(kind)), UNSIGNED[_bits(kind)])
        value = np.broadcast_to(value, self.shape)
        return _as(value, kind)

    def _special(self, name: str) -> Array:
        """A register that the card sets, or one that nobody has set."""
        if name == "%tid.x":
            return self.threads[None]
        if name.startswith("%ctaid."):
            return self.state.programs[:, "xyz".index(name[-1]), None]
        if "." in name:
            raise NotImplementedError(name)
        return np.full((1, 1), 2 ** _width(name) - 1, UNSIGNED[max(_width(name), 8)])

    def write(self, i: Instruction, name: str, value: Array) -> None:
        """Set a register, in the threads that the guard lets."""
        if value.dtype.kind == "f":
            value = value.view(UNSIGNED[8 * value.dtype.itemsize])
        value = value.astype(bool if _width(name) == 1 else UNSIGNED[_width(name)])
        if i.guard:
            before = self.read(name, "pred" if _width(name) == 1 else f"b{_width(name)}")
            value = np.where(self.active(i), value, before)
        self.state.registers[name] = np.broadcast_to(value, self.shape)

    def active(self, i: Instruction) -> Array:
        if not i.guard:
            return np.ones(self.shape, bool)
        return self.read(i.guard, "pred") ^ i.negated

    # Control

    def _branch(self, i: Instruction) -> list[State]:
        state, target = self.state, self.program.labels[i.operands[0]]
        taken = self.active(i)
        if (taken != taken[:, :1]).any():
            raise NotImplementedError(f"line {i.line}: threads of one program take different branches")
        jump = taken[:, 0]
        if jump.all():
            state.at = target
        elif jump.any():
            there, here = state.of(jump), state.of(~jump)
            there.at = target
            return [here, there]
        return []

    def _bar(self, i: Instruction) -> None:
        self.state.wrote[:] = 0
        self.state.looked[:] = 0

    def _fence(self, i: Instruction) -> None: ...

    # Numbers

    def _mov(self, i: Instruction) -> None:
        to, of = i.operands
        kind = i.name.split(".")[1]
        if isinstance(of, tuple):
            width = _bits(kind) // len(of)
            parts = [self.read(part, f"b{width}").astype(np.uint64) for part in of]
            self.write(i, to, sum(part << np.uint64(width * k) for k, part in enumerate(parts)))
        elif isinstance(to, tuple):
            width = _bits(kind) // len(to)
            value = self.read(of, kind)
            for k, part in enumerate(to):
                if part != "_":
                    self.write(i, part, (value >> (width * k)) & ((1 << width) - 1))
        else:
            self.write(i, to, self.read(of, kind))

    def _calculate(self, i: Instruction, function: Callable[..., Array], kind: str = "") -> None:
        to, *of = i.operands
        kind = kind or i.name.split(".")[-1]
        if i.name.startswith("fma.") and kind.removesuffix("x2") in HALVES:
            a, b, c = of
            bits = _bits_of_halves(kind)
            if (self.read(c, f"b{bits}") & 0x7FFF7FFF % 2**bits).any():
                self._unknown(i)
            self._multiply_halves(i, to, a, b, kind)  # sm_80 has no other product
            return
        if kind not in ("pred", "f32") and not re.fullmatch(r"[bsu](16|32|64)", kind):
            self._unknown(i)
        self.write(i, to, function(*[self.read(operand, kind) for operand in of]))

    def _shl(self, i: Instruction) -> None:
        self._shift(i, np.left_shift)

    def _shr(self, i: Instruction) -> None:
        self._shift(i, np.right_shift)

    def _shift(self, i: Instruction, function: Callable[..., Array]) -> None:
        to, of, by = i.operands
        value, places = self.read(of, i.name.split(".")[-1]), self.read(by, "b32")
        if (places >= 8 * value.itemsize).any():
            self._unknown(i)
        self.write(i, to, function(value, places.astype(value.dtype)))

    def _mul(self, i: Instruction) -> None:
        self._multiply(i, *i.operands, None)

    def _mad(self, i: Instruction) -> None:
        self._multiply(i, *i.operands)

    def _multiply(self, i: Instruction, to: str, a: str, b: str, c: str | None) -> None:
        kind = i.name.split(".")[-1]
        if kind.removesuffix("x2") in HALVES and c is None:
            self._multiply_halves(i, to, a, b, kind)
            return
        wide = kind
        if ".wide." in i.name:
            wide = f"{kind[0]}{2 * _bits(kind)}"
        elif ".lo." not in i.name and kind != "f32":
            self._unknown(i)
        dtype = _dtype(wide)
        product = self.read(a, kind).astype(dtype) * self.read(b, kind).astype(dtype)
        self.write(i, to, product if c is None else product + self.read(c, wide))

    def _multiply_halves(self, i: Instruction, to: str, a: str, b: str, kind: str) -> None:
        """One or two products of 16 bits, which fp32 holds exactly."""
        narrow, bits = kind.removesuffix("x2"), _bits_of_halves(kind)
        product = np.zeros(self.shape, np.uint32)
        for shift in range(0, bits, 16):
            left, right = (_as(self.read(operand, f"b{bits}") >> shift & 0xFFFF, narrow) for operand in (a, b))
            product |= _rounded(left * right, narrow).astype(np.uint32) << np.uint32(shift)
        self.write(i, to, product)

    def _bfe(self, i: Instruction) -> None:
        to, of, position, length = i.operands
        kind, bits = i.name.split(".")[-1], int(length, 0)
        left = _bits(kind) - bits - int(position, 0)
        value = self.read(of, kind)
        self.write(i, to, (value << left) >> (_bits(kind) - bits))

    def _setp(self, i: Instruction) -> None:
        _, comparison, *between, kind = i.name.split(".")
        if between not in ([], ["ftz"]) or comparison not in COMPARISONS:
            self._unknown(i)
        self._calculate(i, COMPARISONS[comparison], kind)

    def _selp(self, i: Instruction) -> None:
        to, a, b, p = i.operands
        kind = i.name.split(".")[-1]
        self.write(i, to, np.where(self.read(p, "pred"), self.read(a, kind), self.read(b, kind)))

    def _cvt(self, i: Instruction) -> None:
        *_, target, kind = i.name.split(".")
        to, *of = i.operands
        values = [self.read(operand, kind) for operand in of]
        if target in ("bf16x2", "f16x2"):  # the first one above the second
            high, low = (_rounded(value, target[:-2]).astype(np.uint32) for value in values)
            self.write(i, to, high << np.uint32(16) | low)
        elif target in ("bf16", "f16"):
            self.write(i, to, _rounded(values[0], target))
        elif values[0].dtype.kind == "f" and target != "f32":
            self._unknown(i)
        else:
            self.write(i, to, values[0].astype(_dtype(target)))

    # Memory

    def _ld(self, i: Instruction) -> None:
        to, (base, offset) = i.operands
        if ".param." in i.name:
            value = np.full((1, 1), self.parameters[base] & (2**64 - 1), np.uint64)
            bits, signed = _bits(i.name.split(".")[-1]), ".s" in i.name
            value = value & np.uint64(2**bits - 1) if bits < 64 else value
            self.write(i, to, value.astype(UNSIGNED[bits]).view(SIGNED[bits]).astype(np.int64) if signed else value)
            return
        registers = to if isinstance(to, tuple) else (to,)
        width = _bits(i.name.split(".")[-1]) // 8
        loaded = self._gather(i, base, offset, width, len(registers))
        for k, register in enumerate(registers):
            self.write(i, register, loaded[..., k])

    def _st(self, i: Instruction) -> None:
        (base, offset), of = i.operands
        registers = of if isinstance(of, tuple) else (of,)
        kind = i.name.split(".")[-1]
        values = np.stack([self.read(register, f"b{_bits(kind)}") for register in registers], -1)
        self._scatter(i, base, offset, values, self.active(i))

    def _gather(self, i: Instruction, base: str, offset: int, width: int, count: int) -> Array:
        """(C, N, count) elements; zeros in threads that do not take part."""
        active = self.active(i)
        found = np.zeros((*self.shape, count), UNSIGNED[8 * width])
        if not active.any():
            return found
        if ".shared" in i.name:
            addresses = self.read(base, "b32").astype(np.int64) + offset
            found[active] = self.shared(addresses, width, count, active)[active]
            self._look(addresses, active, width * count)
            self._note(i, "shared", addresses, active, width * count)
        else:
            found[active] = self.memory.load(self.addresses(base, offset)[active], width, count)
            self._note(i, "global", self.addresses(base, offset), active, width * count)
        return found

    def _note(self, i: Instruction, space: str, addresses: Array, active: Array, size: int) -> None:
        if self.traffic is not None:
            count = self.traffic.cycles if space == "shared" else self.traffic.sectors
            count(f"{i.name.split('.')[0]}.{space} of {size} bytes", addresses, active, size)

    def _scatter(self, i: Instruction, base: str, offset: int, values: Array, active: Array) -> None:
        if not active.any():
            return
        if ".shared" in i.name:
            addresses = self.read(base, "b32").astype(np.int64) + offset
            self.place(self.state, addresses, values, active)
            self._note(i, "shared", addresses, active, values.itemsize * values.shape[-1])
        else:
            self.memory.store(self.addresses(base, offset)[active], values[active])
            self._note(i, "global", self.addresses(base, offset), active, values.itemsize * values.shape[-1])

    def addresses(self, base: str, offset: int) -> Array:
        return self.read(base, "b64") + np.uint64(offset)

    def shared(self, addresses: Array, width: int, count: int, active: Array | None = None) -> Array:
        """(..., count) elements of shared memory; the first axis of `addresses` (C, ...) is the programs'."""
        taking = addresses if active is None else addresses[active]
        self._check_shared(taking, width * count)
        elements = self.state.shared.view(UNSIGNED[8 * width])
        index = np.clip(addresses, 0, self.state.shared.shape[1] - width * count) // width
        programs = np.arange(len(index)).reshape(-1, *[1] * index.ndim)
        return elements[programs, index[..., None] + np.arange(count)]

    def _check_shared(self, addresses: Array, size: int) -> None:
        if (addresses % size).any():
            raise Fault(f"misaligned access of {size} bytes of shared memory")
        if addresses.min() < 0 or addresses.max() + size > self.state.shared.shape[1]:
            raise Fault(f"access to bytes {addresses.min()} to {addresses.max() + size} of shared memory")

    def place(self, state: State, addresses: Array, values: Array, active: Array) -> None:
        width, count = values.dtype.itemsize, values.shape[-1]
        self._check_shared(addresses[active], width * count)
        self._change(state, addresses, active, width * count)
        elements = state.shared.view(values.dtype)
        programs, _ = np.nonzero(active)
        elements[programs[:, None], addresses[active][:, None] // width + np.arange(count)] = values[active]

    def _look(self, addresses: Array, active: Array, size: int) -> None:
        """Remember who reads shared memory, at addresses (C, ...) in the order of the threads."""
        for bit, places in self._by_warp(addresses, active, size):
            if (self.state.wrote[places] & ~bit).any():
                raise Fault("race: a warp reads what another wrote since the last barrier")
            self.state.looked[places] |= bit

    def _change(self, state: State, addresses: Array, active: Array, size: int) -> None:
        """Remember who writes to shared memory. Warps that hold the same values may write them to one place."""
        for bit, places in self._by_warp(addresses, active, size):
            if (state.looked[places] & ~bit).any():
                raise Fault("race: a warp writes where another has read since the last barrier")
            if state.held[places].any():
                raise Fault("race: a warp writes where an asynchronous product reads")
            state.wrote[places] |= bit

    def _by_warp(self, addresses: Array, active: Array, size: int) -> Iterator[tuple[np.uint16, tuple[Array, Array]]]:
        warps = self.program.threads // LANES
        parts = np.split(addresses, warps, 1), np.split(active, warps, 1)
        for warp, (those, taking) in enumerate(zip(*parts, strict=True)):
            programs, _ = np.nonzero(taking)
            yield np.uint16(1 << warp), (programs[:, None], those[taking][:, None] // 2 + np.arange(max(size // 2, 1)))

    def _cp(self, i: Instruction) -> None:
        state = self.state
        if "commit_group" in i.name:
            state.copies.append([])
        elif "wait_group" in i.name:
            newest = int(i.operands[0])
            done = len(state.copies) - 1 - newest
            for group in state.copies[: max(done, 0)]:
                for arrive in group:
                    arrive(state)
            state.copies = state.copies[max(done, 0) :]
        else:
            self._copy(i)

    def _copy(self, i: Instruction) -> None:
        (to, to_offset), (base, offset), size, *read = i.operands
        size, active = int(size, 0), self.active(i)
        width = min(size, 4)
        values = np.zeros((*self.shape, size // width), UNSIGNED[8 * width])  # what is not read is zero
        reading = active
        if read:
            wanted = self.read(read[0], "b32")
            if not np.isin(wanted, (0, size)).all():
                self._unknown(i)
            reading = active & (wanted == size)
        if reading.any():
            values[reading] = self.memory.load(self.addresses(base, offset)[reading], width, size // width)
            self._note(i, "global", self.addresses(base, offset), reading, size)
        target = self.read(to, "b32").astype(np.int64) + to_offset
        if active.any():
            self._check_shared(target[active], size)
            self._change(self.state, target, active, size)
            self._note(i, "shared", target, active, size)
            self.state.copies[-1].append(lambda state: self.place(state, target, values, active))

    # Warps

    def _shfl(self, i: Instruction) -> None:
        to, of, lane, clamp, _ = i.operands
        if int(clamp, 0) != LANES - 1 or i.name.split(".")[2] not in ("bfly", "idx"):
            self._unknown(i)
        source = self.by_warp(self.read(lane, "b32")) % LANES
        if ".bfly." in i.name:
            source = np.arange(LANES) ^ source
        value = np.take_along_axis(self.by_warp(self.read(of, "b32")), source.astype(np.int64), -1)
        self.write(i, to, value.reshape(self.shape))

    def by_warp(self, value: Array) -> Array:
        return value.reshape(len(value), -1, LANES)

    def _ldmatrix(self, i: Instruction) -> None:
        to, (base, offset) = i.operands
        addresses, lane = self.by_warp(self.read(base, "b32").astype(np.int64) + offset), np.arange(LANES)
        registers = to if isinstance(to, tuple) else (to,)
        for k, register in enumerate(registers):
            of_rows = addresses[..., 8 * k : 8 * k + 8]
            rows = self.shared(of_rows, 2, 8).astype(np.uint32)  # (C, W, 8, 8)
            of_rows = of_rows.reshape(len(rows), -1)
            self._look(of_rows, np.ones(of_rows.shape, bool), 16)
            self._note(i, "shared", of_rows, np.ones(of_rows.shape, bool), 16)
            if ".trans" in i.name:
                rows = rows.swapaxes(-1, -2)
            first, second = (rows[..., lane // 4, 2 * (lane % 4) + j] for j in (0, 1))
            self.write(i, register, (first | second << np.uint32(16)).reshape(self.shape))

    def _stmatrix(self, i: Instruction) -> None:
        (base, offset), of = i.operands
        addresses, lane = self.by_warp(self.read(base, "b32").astype(np.int64) + offset), np.arange(LANES)
        registers = of if isinstance(of, tuple) else (of,)
        programs, warps = addresses.shape[:2]
        for k, register in enumerate(registers):
            value, rows = self.by_warp(self.read(register, "b32")), np.empty((programs, warps, 8, 8), np.uint16)
            for j in (0, 1):
                rows[..., lane // 4, 2 * (lane % 4) + j] = value >> np.uint32(16 * j) & np.uint32(0xFFFF)
            if ".trans" in i.name:
                rows = rows.swapaxes(-1, -2)
            target = addresses[..., 8 * k : 8 * k + 8].reshape(programs, -1)
            self.place(self.state, target, rows.reshape(programs, -1, 8), np.ones(target.shape, bool))
            self._note(i, "shared", target, np.ones(target.shape, bool), 16)

    def _mma(self, i: Instruction) -> None:
        if ".m16n8k16.row.col.f32." not in i.name:
            self._unknown(i)
        d, a, b, c = i.operands
        kind = i.name.split(".")[-2]
        result = self.fragment_a(a, kind) @ self.fragment_b(b, kind) + self.fragment_c(c)
        row, column = _place_in_c()
        for k, register in enumerate(d):
            self.write(i, register, result[..., row[k], column[k]].reshape(self.shape))

    def fragment_a(self, registers: Sequence[str], kind: str) -> Array:
        """(C, W, 16, 16)"""
        lane, matrix = np.arange(LANES), self._fragment(16, 16)
        for k, register in enumerate(registers):
            for j, half in enumerate(self._halves(register, kind)):
                matrix[..., lane // 4 + 8 * (k % 2), 2 * (lane % 4) + 8 * (k // 2) + j] = half
        return matrix

    def fragment_b(self, registers: Sequence[str], kind: str) -> Array:
        """(C, W, 16, 8)"""
        lane, matrix = np.arange(LANES), self._fragment(16, 8)
        for k, register in enumerate(registers):
            for j, half in enumerate(self._halves(register, kind)):
                matrix[..., 2 * (lane % 4) + 8 * k + j, lane // 4] = half
        return matrix

    def fragment_c(self, registers: Sequence[str]) -> Array:
        """(C, W, 16, 8), and wider for more registers"""
        matrix = self._fragment(16, 2 * len(registers))
        row, column = _place_in_c(len(registers))
        for k, register in enumerate(registers):
            matrix[..., row[k], column[k]] = self.by_warp(self.read(register, "f32"))
        return matrix

    def _fragment(self, rows: int, columns: int) -> Array:
        return np.empty((self.shape[0], self.shape[1] // LANES, rows, columns), np.float32)

    def _halves(self, register: str, kind: str) -> list[Array]:
        value = self.by_warp(self.read(register, "b32"))
        return [_as(half.astype(np.uint16), kind) for half in (value & np.uint32(0xFFFF), value >> np.uint32(16))]

    def _wgmma(self, i: Instruction) -> None:
        if "commit_group" in i.name:
            self.state.products.append([])
        elif "wait_group" in i.name:
            newest = int(i.operands[0])
            while len(self.state.products) - 1 > newest:
                for places in self.state.products.pop(0):
                    self.state.held[places] -= 1
        elif "mma_async" in i.name:
            self._multiply_async(i)

    def _multiply_async(self, i: Instruction) -> None:
        d, a, b, accumulate, sign_a, sign_b, *transposed = i.operands
        columns, kind = int(re.search(r"m64n(\d+)k16\.f32\.", i.name)[1]), i.name.split(".")[-1]  # type: ignore[index]
        if (sign_a, sign_b) != ("1", "1"):
            self._unknown(i)
        warps = self.shape[1] // LANES
        if isinstance(a, tuple):
            left = self.fragment_a(a, kind).reshape(self.shape[0], warps // 4, 64, 16)
            transposed = ["0", *transposed]
        else:
            left = self.described(a, 64, transposed[0] == "1", kind)
        right = self.described(b, columns, transposed[1] == "1", kind).swapaxes(-1, -2)
        result = (left @ right).reshape(self.shape[0], warps, 16, columns)
        scale = self.read(accumulate, "pred" if accumulate[0] == "%" else "b32").astype(bool)
        if scale.any():
            result = result + np.where(scale[:, :1, None, None], self.fragment_c(d), np.float32(0))
        row, column = _place_in_c(len(d))
        for k, register in enumerate(d):
            self.write(i, register, result[..., row[k], column[k]].reshape(self.shape))

    def described(self, register: str, rows: int, transposed: bool, kind: str) -> Array:
        """(C, groups of four warps, rows, 16) from the descriptor of a matrix in shared memory."""
        descriptor = self.read(register, "b64").reshape(self.shape[0], -1, 4 * LANES)[..., 0].astype(np.int64)
        start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        swizzle = descriptor >> 62 & 3
        if (swizzle == 0).any() or (descriptor >> 49 & 7).any() or (swizzle != swizzle.flat[0]).any():
            raise NotImplementedError("a descriptor without swizzle, or with a base offset")
        span = 256 >> int(swizzle.flat[0])  # bytes: 128, 64 or 32
        row, k = np.arange(rows)[:, None], np.arange(16)[None]
        if transposed:
            inside, blocks = k % 8 * span + row % (span // 2) * 2, (row // (span // 2), k // 8)
        else:
            inside, blocks = row % 8 * span + k * 2, (0 * row, row // 8)
        address = start[..., None, None] + inside + blocks[0] * leading[..., None, None]
        address = address + blocks[1] * stride[..., None, None]
        address = address ^ (address >> 7 & (span // 16 - 1)) << 4
        places = np.arange(len(address)).reshape(-1, 1, 1, 1), address // 2
        if self.state.wrote[places].any():
            raise Fault("race: an asynchronous product reads what warps wrote since the last barrier")
        self.state.held[places] += 1
        self.state.products[-1].append(places)
        return _as(self.shared(address, 2, 1)[..., 0], kind)


def _fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _quotient(a: Array, b: Array) -> Array:
    """That of integers is cut towards zero."""
    return a / b if a.dtype == np.float32 else (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "neg": np.negative, "fma": _fused, "div": _quotient, "rem": np.fmod,
    "max": np.fmax, "min": np.fmin, "ex2": np.exp2,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip
COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal
}  # fmt: skip


def _place_in_c(registers: int = 4) -> tuple[Array, Array]:
    """Row and column of each lane's element of an accumulator: (registers, 32) each."""
    k, lane = np.arange(registers)[:, None], np.arange(LANES)[None]
    return lane // 4 + 8 * (k // 2 % 2), 2 * (lane % 4) + k % 2 + 8 * (k // 4)


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(re.search(r"\d+$", kind)[0])  # type: ignore[index]


def _bits_of_halves(kind: str) -> int:
    return 32 if kind.endswith("x2") else 16


def _width(register: str) -> int:
    """Bits, which its name says."""
    letters = re.match(r"%([a-z]+)", register)[1]  # type: ignore[index]
    return {"p": 1, "rs": 16, "r": 32, "f": 32, "rd": 64}[letters]


def _dtype(kind: str) -> Any:
    if kind == "f32":
        return np.float32
    return (SIGNED if kind[0] == "s" else UNSIGNED)[_bits(kind)]


def _as(value: Array, kind: str) -> Array:
    """Unsigned bits as what an instruction takes them for; narrower kinds take the low bits."""
    if kind == "pred" or value.dtype == bool:
        return value.astype(bool)
    bits = value.astype(UNSIGNED[_bits(kind)])
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(_dtype(kind))


def _rounded(value: Array, kind: str) -> Array:
    """fp32 as the bits of a narrower kind, to the nearest, ties to even."""
    if kind == "f16":
        with np.errstate(over="ignore"):
            return value.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)
