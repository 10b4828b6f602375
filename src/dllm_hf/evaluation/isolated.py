"""The process in which [`isolation.run`] tries a program: this file is run as a script, with the standard library alone.

The program comes from standard input. It gets no network, no other process, no file to write or to remove, little memory,
and the process ends with the status `PASSED` if it comes to its end. On Linux a filter of system calls (seccomp) refuses the
rest; elsewhere an audit hook of Python's does, which is no boundary for a program that wants to get out.
"""

import ctypes
import os
import platform
import struct
import sys

PASSED = 91  # a program that calls `exit()` ends with another status
MEMORY = 2 * 2**30  # bytes of address space
SECCOMP, AUDIT_HOOK = "seccomp", "audit hook"

# Numbers of the system calls that are refused, on x86-64 and on AArch64 (None: there is none of that name).
_REFUSED = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "io_uring_setup": (425, 425),
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "process_vm_writev": (311, 271),
    "kill": (62, 129), "tkill": (200, 130), "pidfd_send_signal": (424, 424),
    "creat": (85, None), "openat2": (437, 437), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None),
    "mknodat": (259, 33), "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "add_key": (248, 217), "keyctl": (250, 219), "shmget": (29, 194), "msgget": (68, 186),
}  # fmt: skip
# Those refused where their flags ask for writing: number, and which argument the flags are.
_OPENING: dict[str, tuple[tuple[int, int] | None, ...]] = {"open": ((2, 1), None), "openat": ((257, 2), (56, 2))}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # index above, and the kernel's number

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # operations of the filter's language (BPF)
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: the error EPERM


def system_call_filter(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter's instructions: operation, jumps where it holds and where not, and a number."""
    column, number = _MACHINES[machine]
    program: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, number),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    # Calls of x86-64's 32-bit variant have the numbers from 2**30 on.
    program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _REFUSE)]
    for numbers in _REFUSED.values():
        if (refused := numbers[column]) is not None:
            program += [(_EQUAL, 0, 1, refused), (_RETURN, 0, 0, _REFUSE)]
    for calls in _OPENING.values():
        if (opening := calls[column]) is not None:
            call, argument = opening
            program += [(_EQUAL, 0, 4, call), (_LOAD, 0, 0, 16 + 8 * argument), (_ANY_BIT, 0, 1, _WRITING)]
            program += [(_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW)]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def filter_system_calls() -> bool:
    """Have the kernel refuse what a program has no use for, from here to the end of the process. False where it cannot."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        return False
    instructions = system_call_filter(platform.machine())
    code = b"".join(struct.pack("HBBI", *each) for each in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(buffer)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    # PR_SET_NO_NEW_PRIVS, which the kernel asks for, and PR_SET_SECCOMP with a filter.
    return prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, ctypes.byref(header), 0, 0) == 0


def limit_resources(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # on Windows
        return
    wanted = {"RLIMIT_CPU": seconds, "RLIMIT_AS": MEMORY, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NOFILE": 64}
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError):  # macOS does not limit the address space
            pass


def refuse(event: str, arguments: tuple) -> None:
    """An audit hook."""
    begins = ("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "shutil.", "ctypes.")
    exact = {
        "os.system",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "os.link",
    }
    exact |= {"os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "pty.spawn"}
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or event in exact or event.startswith(begins):
        raise PermissionError(f"{event} is refused to a program that is tried.")


def main() -> None:
    program = sys.stdin.buffer.read().decode()
    limit_resources(int(sys.argv[1]))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    isolated = filter_system_calls()
    os.write(1, (SECCOMP if isolated else AUDIT_HOOK).encode())
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    if not isolated:
        sys.addaudithook(refuse)
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    os._exit(PASSED)


if __name__ == "__main__":
    main()
