"""A processor with AVX-512 inside this process: Bochs's, by `pip install bochscpu-python==0.4.0`, over the process's own memory.

call(function, argument) executes machine code of this process at its own addresses, so that torch, numpy and Python stay
native and only what is called runs there, at about 15 million instructions a second. The page tables map each GB that the
process uses; a page is given to the emulator when it is first touched. The caller's fs keeps thread-local variables what they
are. An exception ends the process, and so does a system call: what runs there must not allocate either, since giving a page
may wait for the allocator's lock.
"""
import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

GB = 1 << 30
TABLES, FIRST_GB = 0x100000, 4  # physical: of the page tables; of the process's memory, above the interrupt controller's page
# Bochs's factories of processors by mangled name; the package makes DEFAULT and has no setting for it.
DEFAULT, FACTORY = "corei3_cnl", "_Z{}create_{}_cpuidP8BX_CPU_C"
MODELS = {"skylake": "corei7_skylake_x", "icelake": "corei7_icelake_u", "sapphire_rapids": "sapphire_rapids"}
OF_GLIBC_2_38 = """
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
unsigned long long __isoc23_strtoull(const char* s, char** end, int base) { return strtoull(s, end, base); }
int __isoc23_sscanf(const char* s, const char* format, ...) {
  va_list a;
  va_start(a, format);
  int n = vsscanf(s, format, a);
  va_end(a);
  return n;
}
"""


def load_bochs():
    """The package's module. It was built for glibc 2.38: an older one gets the two functions that it lacks."""
    if not hasattr(ctypes.CDLL(None), "__isoc23_strtoull"):
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "newer.so")
            subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=OF_GLIBC_2_38, text=True,
                           check=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import bochscpu
    import bochscpu.cpu
    import bochscpu.memory
    return bochscpu


def choose_model(bochscpu, name):
    """Lets the factory of the package's only processor make another: a jump at its beginning."""
    library = ctypes.CDLL(sys.modules["bochscpu._bochscpu"].__file__)
    symbols = (FACTORY.format(len(f"create_{n}_cpuid"), n) for n in (DEFAULT, name))
    source, target = (ctypes.cast(library[symbol], ctypes.c_void_p).value for symbol in symbols)
    page = source & -mmap.PAGESIZE
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), 7)
    ctypes.memmove(source, b"\x49\xbb" + target.to_bytes(8, "little") + b"\x41\xff\xe3", 13)  # mov r11, target; jmp r11


class PageTables:
    """Four levels with pages of 2 MB: virtual GB by virtual GB to physical ones, in the order in which they are seen."""

    def __init__(self, memory):
        self.memory, self.buffer, self.used, self.of_virtual, self.virtual = memory, mmap.mmap(-1, 1 << 26), 0, {}, []
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.root = self.table()
        self.refresh()

    def table(self):
        physical = TABLES + (self.used << 12)
        self.memory.page_insert(physical, self.host + (self.used << 12))
        self.used += 1
        return physical

    def entry(self, table, index):
        return ctypes.c_uint64.from_address(self.host + table - TABLES + 8 * index)

    def below(self, table, index):
        entry = self.entry(table, index)
        entry.value = entry.value or self.table() | 7
        return entry.value & -4096

    def map_gb(self, number):
        if number in self.of_virtual:
            return
        physical = self.of_virtual[number] = FIRST_GB + len(self.virtual)
        self.virtual.append(number)
        table = self.below(self.below(self.root, number >> 9), number & 511)
        for i in range(512):
            self.entry(table, i).value = physical * GB + (i << 21) | 0x87

    def refresh(self):
        """Maps what the process has mapped, and GBs around it, where it will map more."""
        self.seen = Path("/proc/self/maps").read_text()
        self.areas = [[int(x, 16) for x in line.split(None, 1)[0].split("-")] for line in self.seen.splitlines()]
        for first, end in self.areas:
            for number in range(max(0, first // GB - 8), min(end // GB + 8, 1 << 17)):
                self.map_gb(number)

    def mapped(self, address):
        return any(first <= address < end for first, end in self.areas)

    def give(self, physical):
        """The emulator's question for a page that it has not seen."""
        address = self.virtual[physical // GB - FIRST_GB] * GB + physical % GB & -4096
        if not self.mapped(address):
            self.refresh()
            if not self.mapped(address):
                die(f"access to unmapped memory at {address:#x}")
        self.memory.page_insert(physical & -4096, address)


def die(reason):
    print(f"avx512 machine: {reason}", file=sys.stderr, flush=True)
    os._exit(3)


class Processor:
    def __init__(self, model):
        self.bochs = load_bochs()
        choose_model(self.bochs, MODELS[model])
        self.session = self.bochs.Session()
        self.tables = PageTables(self.bochs.memory)
        self.session.missing_page_handler = self.tables.give
        self.hook = self.bochs.Hook()
        self.hook.exception = self.stopped
        self.stack = mmap.mmap(-1, 1 << 24)
        self.top = ctypes.addressof(ctypes.c_char.from_buffer(self.stack)) + len(self.stack) - 4096
        ctypes.memmove(self.top, b"\xf4", 1)  # hlt, which a program may not: where calls return to
        self.lock, self.calls = threading.Lock(), 0

    def stopped(self, session, _, vector, code):
        self.vector, self.rip, self.address = vector, session.cpu.rip, session.cpu.cr2
        session.stop()

    def segment(self, attributes, base=0):
        segment = self.bochs.Segment()
        segment.present, segment.selector, segment.base, segment.limit, segment.attr = True, 0x33, base, 2 ** 32 - 1, attributes
        return segment

    def start_state(self, function, argument):
        """A program's state in 64-bit mode whose system saves every register of AVX-512."""
        s = self.bochs.State()
        self.bochs.cpu.set_long_mode(s)
        s.efer &= ~1  # no kernel that a system call could go to
        s.cr0, s.cr3, s.cr4, s.xcr0 = s.cr0 | 2, self.tables.root, s.cr4 | 1 << 9 | 1 << 10 | 1 << 18, 0xE7
        s.mxcsr, s.mxcsr_mask, s.fpcw, s.fptw, s.rflags = 0x1F80, 0xFFFF, 0x37F, 0xFFFF, 2
        s.cs = self.segment(0xA0FB)
        s.ss = s.ds = s.es = s.gs = self.segment(0xC0F3)
        s.fs = self.segment(0xC0F3, threading.get_ident())  # pthread_self()
        s.rip, s.rdi, s.rsp = function, argument, self.top - 64 - 8
        ctypes.c_uint64.from_address(s.rsp).value = self.top
        return s

    def call(self, function, argument):
        with self.lock:
            self.calls += 1
            self.session.cpu.state = self.start_state(function, argument)
            self.session.run([self.hook])
            if self.vector != 13 or self.rip - 1 != self.top:
                die(f"exception {self.vector} before {self.rip:#x} ({self.place()}), address {self.address:#x}: "
                    f"{ctypes.string_at(self.rip - 12, 12).hex()}")

    def place(self):
        for line in self.tables.seen.splitlines():
            first, end = (int(x, 16) for x in line.split(None, 1)[0].split("-"))
            if first <= self.rip < end:
                return f"{line.split()[-1]} + {self.rip - first + int(line.split()[2], 16):#x}"
        return "nowhere"
