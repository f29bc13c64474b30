"""The zip file around what ``torch.save`` writes, looked over before torch maps it into memory."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hessdiag.checkpoint import refusals
from hessdiag.errors import CheckpointError

CHUNK = 1 << 22


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive at ``path``; what fails in it while it is open means damage.

    Raises:
        CheckpointError: It is damaged, or no zip file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or cut short ({reason}); copy or save it again"
        ) from error


def check_records(path: Path) -> None:
    """Refuse an archive whose bytes are not those that were stored.

    torch looks at no checksum: a flipped bit would be a weight. And it maps a compressed record
    as if that were the numbers themselves.

    Raises:
        CheckpointError: A record is damaged or compressed.
    Cost:
        One pass over the file.
    """
    with opened(path) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise CheckpointError(refusals.compressed(path))
        # torch.serialization.set_crc32_options(False) leaves every checksum 0.
        if any(record.CRC for record in records):
            for record in records:
                with archive.open(record) as content:
                    while content.read(CHUNK):
                        pass
