"""Names of addresses: ELF symbol tables, kallsyms, DWARF lines, and files that are not what they say."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from pykvm import ImageError, SymbolError, Symbols
from pykvm.debug.symbols import Symbol

SOURCE = """\
int counter;
static int twice(int x) {
    return 2 * x;
}
__attribute__((noinline)) int add(int a, int b) { counter++; return twice(a) + b; }
void _start(void) {
    for (;;)
        counter = add(counter, 1);
}
"""
BASE = 0x100000
KALLSYMS = """\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81000000 T startup_64
ffffffff81000040 t secondary_startup_64
ffffffff82000000 D init_task
ffffffffc0001000 t helper\t[virtio_net]
"""


@pytest.fixture(scope="module", params=["-m64", "-m32"])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SOURCE, linked at BASE with debugging information."""
    folder = tmp_path_factory.mktemp("elf")
    (folder / "kernel.c").write_text(SOURCE)
    output = folder / "kernel.elf"
    flags = ["-g", "-O1", "-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-Wl,--build-id=none"]
    subprocess.run(
        ["gcc", request.param, *flags, f"-Wl,-Ttext={BASE:#x}", "-o", str(output), "kernel.c"], cwd=folder, check=True
    )
    return output


def test_names_and_addresses_of_an_elf(kernel: Path) -> None:
    """Functions and variables have addresses, and addresses inside of them their names."""
    symbols = Symbols.from_elf(kernel)
    add = symbols["add"]
    assert BASE <= add < BASE + 0x1000
    assert symbols.describe(add) == "add"
    assert symbols.describe(add + 1) == "add+0x1"
    assert symbols.symbol("add").kind == "func" and symbols.symbol("add").size > 1
    assert symbols.find(symbols["counter"] + 3) == (symbols.symbol("counter"), 3)
    assert "twice" not in symbols or symbols["twice"] != add


def test_addresses_outside_have_no_name(kernel: Path) -> None:
    """Where no symbol is, an address stays a number."""
    symbols = Symbols.from_elf(kernel)
    assert symbols.find(0x10) is None
    assert symbols.describe(0x7FFFFFF0) == "0x7ffffff0"


def test_lines_of_an_elf(kernel: Path) -> None:
    """DWARF tells the source line of an instruction, and nothing of what is not code."""
    symbols = Symbols.from_elf(kernel)
    assert symbols.line(symbols["add"]) == ("kernel.c", 5)
    assert symbols.line(0x10) is None
    assert symbols.locate(symbols["add"]) == "add (kernel.c:5)"


def test_a_bias_moves_everything(kernel: Path) -> None:
    """With a bias names and lines are those of the image where it was moved to."""
    plain, moved = Symbols.from_elf(kernel), Symbols.from_elf(kernel, bias=0x200000)
    assert moved["add"] == plain["add"] + 0x200000
    assert moved.line(moved["add"]) == ("kernel.c", 5)


def test_resolve_takes_what_people_write(kernel: Path) -> None:
    """Numbers, names and offsets to names are addresses; a name that is not there comes with its neighbours."""
    symbols = Symbols.from_elf(kernel)
    add = symbols["add"]
    assert symbols.resolve("add+0x10") == symbols.resolve("add + 16") == add + 16
    assert symbols.resolve("add-1") == add - 1
    assert symbols.resolve("0x1234") == symbols.resolve(0x1234) == symbols.resolve("4660") == 0x1234
    with pytest.raises(SymbolError, match="did you mean counter"):
        symbols.resolve("countr+4")
    assert symbols.get("nothing") is None


def test_kallsyms() -> None:
    """A Linux guest's own list: modules too, no absolute symbols, each address up to the next one's."""
    symbols = Symbols.from_map(KALLSYMS)
    assert symbols["_text"] == symbols["startup_64"] == 0xFFFFFFFF81000000
    assert symbols.describe(0xFFFFFFFF81000048) == "secondary_startup_64+0x8"
    assert symbols.describe(0xFFFFFFFFC0001010) == "helper+0x10"
    assert symbols.find(0xFFFFFFFFC0001000 + (1 << 20)) is None
    assert "fixed_percpu_data" not in symbols


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ffffffff81000000 T\n", "line 1 is not of the form"),
        ("zzzz T name\n", "is no hexadecimal address"),
        ("0000000000000000 T _text\n0000000000000000 T other\n", "hides the addresses"),
    ],
)
def test_other_texts_are_refused(text: str, reason: str) -> None:
    """What is no list of symbols is refused with its line and the reason."""
    with pytest.raises(ImageError, match=reason):
        Symbols.from_map(text)


def test_labels_inside_a_function_do_not_hide_it() -> None:
    """A label without size in the middle of a function leaves the function its rest."""
    symbols = Symbols([Symbol("main", 0x1000, 0x100, "func"), Symbol("loop", 0x1010), Symbol("end", 0x1100)])
    assert symbols.describe(0x1018) == "main+0x18"
    assert symbols.describe(0x1104) == "end+0x4"


def test_tables_are_joined() -> None:
    """A module's symbols come beside the kernel's, whose names go first."""
    symbols = Symbols([Symbol("init", 0x1000, 16)])
    symbols.add(Symbols([Symbol("init", 0x5000, 16), Symbol("probe", 0x5010, 16)]))
    assert symbols["init"] == 0x1000
    assert [each.address for each in symbols.all_named("init")] == [0x1000, 0x5000]
    assert symbols.describe(0x5018) == "probe+0x8"
    assert len(symbols) == 3


def test_files_that_are_no_elf(tmp_path: Path) -> None:
    """A missing file, a directory and a text are refused in one line each."""
    text = tmp_path / "text"
    text.write_text("hello")
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "directory"), (text, "no ELF file")):
        with pytest.raises(ImageError, match=reason):
            Symbols.from_elf(path)


def test_damaged_files_raise_only_image_errors(kernel: Path, tmp_path: Path) -> None:
    """Flipped bytes and cut-off ends never give anything but symbols or an ImageError."""
    data = kernel.read_bytes()
    victim, dice = tmp_path / "victim", random.Random(4)
    for _ in range(60):
        broken = bytearray(data[: dice.choice([len(data), dice.randrange(16, len(data))])])
        for _ in range(dice.randrange(1, 20)):
            broken[dice.randrange(4, len(broken))] = dice.randrange(256)
        victim.write_bytes(broken)
        try:
            symbols = Symbols.from_elf(victim)
        except ImageError:
            continue
        symbols.line(BASE + 4)
        symbols.describe(BASE + 4)
