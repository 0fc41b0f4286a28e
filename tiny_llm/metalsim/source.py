"""The text of a kernel as MLX makes it, and what of it must change to be C++. Knows no compiler and no array.

MLX writes a function's head around the author's body: inputs, outputs, and a parameter for each of Metal's
attributes whose name the body holds. ``Kernel.text`` is that text, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

Template = tuple[str, str | bool | int]

# MLX hands smaller inputs over as `constant`.
SMALLEST_IN_DEVICE_MEMORY = 8
ATTRIBUTES = (
    ("dispatch_quadgroups_per_threadgroup", "uint"),
    ("dispatch_simdgroups_per_threadgroup", "uint"),
    ("dispatch_threads_per_threadgroup", "uint3"),
    ("grid_origin", "uint3"),
    ("grid_size", "uint3"),
    ("quadgroup_index_in_threadgroup", "uint"),
    ("quadgroups_per_threadgroup", "uint"),
    ("simdgroup_index_in_threadgroup", "uint"),
    ("simdgroups_per_threadgroup", "uint"),
    ("thread_execution_width", "uint"),
    ("thread_index_in_quadgroup", "uint"),
    ("thread_index_in_simdgroup", "uint"),
    ("thread_index_in_threadgroup", "uint"),
    ("thread_position_in_grid", "uint3"),
    ("thread_position_in_threadgroup", "uint3"),
    ("threadgroup_position_in_grid", "uint3"),
    ("threadgroups_per_grid", "uint3"),
    ("threads_per_grid", "uint3"),
    ("threads_per_simdgroup", "uint"),
    ("threads_per_threadgroup", "uint3"),
)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# threadgroup TYPE NAME[..].., NAME..; a type may be alignas(..) T, or vec<T, 4>; pointers are no arrays.
_ARRAY = re.compile(
    r"\bthreadgroup\s+(?P<align>alignas\s*\([^)]*\)\s*)?(?P<type>[A-Za-z_][\w:]*(?:\s*<[^;(){}]*?>)?)\s+"
    r"(?P<names>[A-Za-z_]\w*\s*(?:\[[^;=]*?\]\s*)*(?:,\s*[A-Za-z_]\w*\s*(?:\[[^;=]*?\]\s*)*)*);"
)
_NAME = re.compile(r"([A-Za-z_]\w*)\s*((?:\[[^\]]*\]\s*)*)")
# float4(..) and vec<T, 4>(..): what is called here is a type.
_VECTOR = re.compile(
    r"\b((?:metal::)?(?:vec\s*<[^<>;(){}]*>|(?:float|half|bfloat|u?char|u?short|u?int|u?long)[234]))\s*\("
)
_LINE = re.compile(r'\s*#\s*line\s+(\d+)(?:\s+"([^"]*)")?')


@dataclass(frozen=True)
class Input:
    """What the head of a kernel depends on: Metal's name of an input's dtype, its elements and dimensions."""

    name: str
    dtype: str
    size: int
    ndim: int

    @property
    def by_reference(self) -> bool:
        """Whether the body sees one value instead of a pointer."""
        return self.ndim == 0


@dataclass(frozen=True)
class Parameter:
    """A parameter bound to a buffer; ``what`` is data, shape, strides or ndim of an input, or output."""

    name: str
    what: str
    dtype: str
    space: str
    by_reference: bool

    @property
    def full_name(self) -> str:
        """What the body calls it."""
        return self.name if self.what in ("data", "output") else f"{self.name}_{self.what}"

    @property
    def text(self) -> str:
        """Its declaration, without the buffer's number."""
        const = "" if self.what == "output" else "const "
        return f"  {const}{self.space} {self.dtype}{'&' if self.by_reference else '*'} {self.full_name}"


@dataclass(frozen=True)
class Kernel:
    """A kernel for inputs of certain types; ``name`` is unique among the variants of one author's kernel."""

    name: str
    header: str
    body: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]
    template: tuple[Template, ...] = ()
    atomic_outputs: bool = False

    @property
    def parameters(self) -> list[Parameter]:
        """Every parameter that is bound to a buffer, in order."""
        found = []
        for given in self.inputs:
            space = "constant" if given.size < SMALLEST_IN_DEVICE_MEMORY else "device"
            found.append(Parameter(given.name, "data", given.dtype, space, given.by_reference))
            for what, dtype in (("shape", "int"), ("strides", "int64_t"), ("ndim", "int")):
                if given.ndim > 0 and f"{given.name}_{what}" in self.body:
                    found.append(Parameter(given.name, what, dtype, "constant", what == "ndim"))
        kind = "atomic<{}>" if self.atomic_outputs else "{}"
        return found + [Parameter(n, "output", kind.format(t), "device", False) for n, t in self.outputs]

    @property
    def attributes(self) -> list[tuple[str, str]]:
        """Name and type of each of Metal's attributes that the body asks for."""
        return [(name, kind) for name, kind in ATTRIBUTES if name in self.body]

    @property
    def full_name(self) -> str:
        """MLX's name for this variant."""
        name = f"custom_kernel_{self.name}"
        if self.template:
            arguments = re.sub(r"\W", "_", self._arguments.replace(", ", "_"))
            name += "_" + arguments.removesuffix("_")  # what was the bracket at the end
        for given in self.inputs:
            name += f"_{given.dtype}"
            if given.by_reference:
                name += "s"
            elif given.size < SMALLEST_IN_DEVICE_MEMORY:
                name += "c"
        for _, dtype in self.outputs:
            name += f"_{dtype}"
        return name

    @property
    def call_name(self) -> str:
        """The name with its template's arguments."""
        return self.full_name + (self._arguments if self.template else "")

    @property
    def _arguments(self) -> str:
        values = [str(int(value)) if isinstance(value, bool) else str(value) for _, value in self.template]
        return f"<{', '.join(values)}>"

    @property
    def head(self) -> str:
        """Template and signature, up to the body."""
        text = ""
        if self.template:
            kinds = [f"{_template_kind(value)} {name}" for name, value in self.template]
            text += f"template <{', '.join(kinds)}>\n"
        text += f"[[kernel]] void {self.full_name}(\n"
        parameters, attributes = self.parameters, self.attributes
        for index, parameter in enumerate(parameters):
            # As MLX has it: with shapes and no attributes the last output's bracket closes too early.
            last = index >= len(self.inputs) + len(self.outputs) - 1 and not attributes
            ends = ") {\n" if last and parameter.what == "output" else ",\n"
            text += f"{parameter.text} [[buffer({index})]]{ends}"
        if attributes:
            text += ",\n".join(f"  {kind} {name} [[{name}]]" for name, kind in attributes)
            text += ") {\n"
        return text

    @property
    def text(self) -> str:
        """What MLX gives to Metal's compiler, after its own ``utils.h``."""
        text = f"{self.header}{self.head}{self.body}\n}}\n"
        if self.template:
            text += (
                f'\ntemplate [[host_name("{self.full_name}")]] [[kernel]] '
                f"decltype({self.call_name}) {self.call_name};\n"
            )
        return text


def _template_kind(value: str | bool | int) -> str:
    """What a template's parameter is declared as. A bool is an int too, so it is asked for first."""
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def _cpp(kernel: Kernel) -> str:
    """The kernel as C++, its lines still those of the author's header and body."""
    return (
        '#include "mlx/backend/metal/kernels/utils.h"\n'
        f'#line 1 "header"\n{_vectors(kernel.header)}\n#line 1 "signature"\n{kernel.head}'
        f'#line 1 "source"\n{_vectors(threadgroup_arrays(kernel.body))}\n}}\n'
    )


def program(kernel: Kernel) -> str:
    """C++ that runs: the kernel, and ``msim_entry``, which calls it for the thread that is on."""
    arguments = []
    for index, p in enumerate(kernel.parameters):
        const = "" if p.what == "output" else "const "
        pointer = f"({const}{p.dtype}*)buffers[{index}]"
        arguments.append(f"*{pointer}" if p.by_reference else pointer)
    for name, kind in kernel.attributes:
        value = f"t.{name}"
        if kind == "uint3":
            value = f"uint3{{{value}[0], {value}[1], {value}[2]}}"
        arguments.append(value)
    return (
        f"{_cpp(kernel)}"
        '#line 1 "entry"\n'
        'extern "C" {\n'
        '__attribute__((visibility("hidden"))) extern u8 __ehdr_start[], _end[];\n'
        '__attribute__((no_sanitize("thread"))) '
        "u8* msim_image(u64* bytes) { *bytes = u64(_end - __ehdr_start); return __ehdr_start; }\n"
        '__attribute__((no_sanitize("thread", "undefined"))) void msim_entry(void* const* buffers) {\n'
        "  const msim_thread& t = *msim_me();\n  (void)t;\n"
        f"  {kernel.call_name}({', '.join(arguments)});\n}}\n}}\n"
    )


def without_comments(text: str) -> str:
    """The text with blanks for comments, every other character where it was."""
    return _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)


def find_arrays(body: str) -> Iterator[re.Match[str]]:
    """Each statement that declares threadgroup memory."""
    return _ARRAY.finditer(without_comments(body))


def threadgroup_arrays(body: str) -> str:
    """The body with its threadgroup arrays as references to memory that the simulator gives out."""
    parts, at, number = [], 0, 0
    for found in find_arrays(body):
        made = []
        for name, dims in _NAME.findall(found["names"]):
            kind = f"msim_array_of_{name}"
            dims = " ".join(dims.split())
            element = f"alignof(::metal::msim_scalar<{found['type']}>)"
            made.append(
                f"typedef {found['type']} {kind}{dims}; threadgroup {kind}& {name} = *(threadgroup {kind}*)"
                f'(ulong)msim_array({number}, sizeof({kind}), {element}, "{name}");'
            )
            number += 1
        lines = body[found.start() : found.end()].count("\n")
        parts += [body[at : found.start()], " ".join(made), "\n" * lines]
        at = found.end()
    return "".join([*parts, body[at:]])


def _vectors(text: str) -> str:
    """A vector made of its parts: clang's vectors have no constructors, so it is a call of ``msim_make``."""
    return _VECTOR.sub(r"::metal::msim_make<\1>(", text)


def author_lines(kernel: Kernel) -> dict[tuple[str, int], str]:
    """The text of each line by the file and number that the compiler knows it by."""
    return {
        (file, number): line.strip()
        for given, text in (("header", kernel.header), ("source", kernel.body))
        for file, number, line in numbered(given, text)
    }


def numbered(file: str, text: str) -> Iterator[tuple[str, int, str]]:
    """File, number and text of each line of an author's ``file``, which a ``#line`` may have named."""
    number = 1
    for line in text.split("\n"):
        moved = _LINE.match(line)
        yield file, number, line
        file, number = (moved[2] or file, int(moved[1])) if moved else (file, number + 1)
