"""The syscall filter of a sandbox, as classic BPF for x86_64 and aarch64 (seccomp(2), `struct seccomp_data`).

It refuses what reaches the kernel's administration or other namespaces and lets everything else through; refused
calls fail with an errno, so that programs take their fallbacks.
"""

from __future__ import annotations

import errno
import struct

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_KILL = 0x80000000

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24  # offsets of the low halves; both machines are little-endian

_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_TTY_INJECTION = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX
_SOCKET_FAMILIES = (1, 2, 10, 16)  # unix, IPv4, IPv6, netlink; a vsock would reach past the network namespace

# asm/unistd_64.h and asm-generic/unistd.h; None where a machine lacks the call
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "lookup_dcookie": (212, 18),
    "fanotify_init": (300, 262),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "uselib": (134, None),
    "modify_ldt": (154, None),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
}
_ABSENT = {
    "clone3": (435, 435),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
"""Answered ENOSYS: clone3 hides its flags behind a pointer, io_uring would pass by this filter."""

_MACHINES = {
    "x86_64": (0, 0xC000003E, {"clone": 56, "ioctl": 16, "socket": 41}),
    "aarch64": (1, 0xC00000B7, {"clone": 220, "ioctl": 29, "socket": 198}),
}


def supported(machine: str) -> bool:
    return machine in _MACHINES


def program(machine: str) -> bytes:
    """The filter for `machine` (as `os.uname().machine` names it). Raises ValueError for an unknown one."""
    if machine not in _MACHINES:
        raise ValueError(f"no syscall filter is known for {machine}")
    column, arch, numbers = _MACHINES[machine]
    code = [
        _op(_LOAD, _ARCH),
        _op(_JUMP_EQUAL, arch, 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":  # the x32 calls are a second door to everything below
        code += [_op(_JUMP_AT_LEAST, 0x40000000, 0, 1), _op(_RETURN, _ERRNO | errno.ENOSYS)]
    for table, answer in ((_REFUSED, errno.EPERM), (_ABSENT, errno.ENOSYS)):
        for entry in table.values():
            number = entry[column]
            if number is not None:
                code += [_op(_JUMP_EQUAL, number, 0, 1), _op(_RETURN, _ERRNO | answer)]
    code += _guard(
        numbers["clone"],
        [
            _op(_LOAD, _ARG0),
            _op(_JUMP_ANY_BIT, _NEW_NAMESPACES, 0, 1),
            _op(_RETURN, _ERRNO | errno.EPERM),
        ],
    )
    code += _guard(
        numbers["ioctl"],
        [
            _op(_LOAD, _ARG1),
            _op(_JUMP_EQUAL, _TTY_INJECTION[0], 1, 0),
            _op(_JUMP_EQUAL, _TTY_INJECTION[1], 0, 1),
            _op(_RETURN, _ERRNO | errno.EPERM),
        ],
    )
    families = [_op(_JUMP_EQUAL, family, len(_SOCKET_FAMILIES) - i, 0) for i, family in enumerate(_SOCKET_FAMILIES)]
    code += _guard(numbers["socket"], [_op(_LOAD, _ARG0), *families, _op(_RETURN, _ERRNO | errno.EAFNOSUPPORT)])
    code.append(_op(_RETURN, _ALLOW))
    return b"".join(code)


def _guard(number: int, check: list[bytes]) -> list[bytes]:
    """`check` for one call; whoever passes it is allowed."""
    return [_op(_JUMP_EQUAL, number, 0, len(check) + 1), *check, _op(_RETURN, _ALLOW)]


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)
