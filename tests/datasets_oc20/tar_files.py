"""Makers of archives."""

import io
import tarfile
from pathlib import Path


def make_tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size, info.mode = len(member[1]), 0o4777
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


FOLDER = link("a", "", tarfile.DIRTYPE)
GOOD = (FOLDER, ("a/README", b"read"), ("a/b/0.extxyz.xz", b"frames"), ("./a/b/0.txt.xz", b"labels"))
