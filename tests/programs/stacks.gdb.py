"""Prints the stack of every allocation below work(), one JSON list of addresses per line, as gdb sees it.

memleak counts the outermost call of an allocator only, so what allocator functions ask of each other is left out.
Frames that gdb infers but that are not on the stack (inlined and tail calls) are left out as well. The plugin lies
elsewhere when the process is probed: of its addresses only the offset in the page counts. What a signal has interrupted, and
what the handler returns to, has called nothing: memleak keeps the address behind that of the instruction.
"""
import json

import gdb

ALLOCATORS = ("malloc", "calloc", "realloc")


class Entry(gdb.Breakpoint):
    def stop(self):
        frames, names = [], []
        frame, interrupted = gdb.newest_frame().older(), False
        while frame is not None:
            if frame.type() not in (gdb.INLINE_FRAME, gdb.TAILCALL_FRAME):
                handler = frame.type() == gdb.SIGTRAMP_FRAME
                address = frame.pc() + (handler or interrupted)
                plugin = "libplugin" in (gdb.solib_name(frame.pc()) or "")
                frames.append(address & 0xFFF if plugin else address)
                interrupted = handler
            names.append(frame.name() or "")
            frame = frame.older()
        nested = names[0].strip("_").endswith(ALLOCATORS) and "libc.so" in (gdb.solib_name(frames[0]) or "")
        if not nested and ("work" in names or "thread" in names):
            print("stack " + json.dumps(frames), flush=True)
        return False


gdb.execute("set pagination off")
gdb.execute("set confirm off")
gdb.execute("set startup-with-shell off")
gdb.execute("set backtrace past-main on")
gdb.execute("set backtrace past-entry on")
gdb.execute("handle SIGUSR1 nostop noprint pass")
gdb.execute("tbreak main")
gdb.execute("run")
for name in ALLOCATORS:
    Entry("*" + hex(int(gdb.parse_and_eval("(unsigned long)&" + name))))
gdb.execute("continue")
