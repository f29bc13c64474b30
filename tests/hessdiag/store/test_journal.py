import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sample_runs
from hessdiag.errors import OutOfResources, StoreError
from hessdiag.run import BlockResult
from hessdiag.store import atomic, is_unfinished, open_run, read_run, validate_run, write_run
from hessdiag.store import folder as folders
from hessdiag.store.journal import open_journal, remove_leftover
from hessdiag.store.parts import Finished, read_part, write_part
from hessdiag.store.seal import seal

ROOT = Path(__file__).parents[3]
RUN = sample_runs.small_run()
NAMES = [block.name for block in RUN.blocks]
EARLY, LATE = "2026-11-21T11:00:00+00:00", "2026-11-21T13:00:00+00:00"


def done(position, name=None):
    block = RUN.blocks[position]
    return Finished(
        BlockResult(name or block.name, block.parameters, block.variants), "raw", "kept", 0.5, None
    )


def opened(path, *, force=False, **changed):
    return open_journal(
        path,
        fingerprint=RUN.provenance.fingerprint | changed,
        config=RUN.provenance.config,
        blocks=NAMES,
        variants=["raw"],
        created_at=EARLY,
        hessdiag_version="0.1.0",
        force=force,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture
def folder(path):
    return path.with_name("run.h5.parts")


@pytest.fixture
def unfinished(path):
    """Two of three blocks and the matrix, as a kill would leave them."""
    journal = opened(path)
    journal.keep_matrix(np.arange(100.0).reshape(10, 10))
    journal.add(done(2))
    journal.add(done(0))
    journal.release()
    return path


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_what_was_added_is_there_after_the_process_is_gone(unfinished, folder):
    journal = opened(unfinished)
    assert set(journal.finished) == {("whole", "raw"), ("0", "raw")}
    for position in (0, 2):
        back = journal.finished[NAMES[position], "raw"]
        ours = sample_runs.run((RUN.blocks[position],))
        assert sample_runs.differences(ours, sample_runs.run((back.block,))) == []
        assert (back.engine, back.seconds) == ("kept", 0.5)
    assert np.array_equal(journal.load_matrix(10), np.arange(100.0).reshape(10, 10))
    assert "2 of 3 blocks are finished and kept in" in journal.kept()
    journal.release()


def test_finishing_writes_the_run_and_removes_the_folder(unfinished, folder):
    journal = opened(unfinished)
    journal.add(done(1))
    assert journal.finish(RUN, force=False, keep_matrix=False) == []
    assert sample_runs.differences(RUN, read_run(unfinished)) == []
    assert [p.name for p in unfinished.parent.iterdir()] == ["run.h5"]
    assert journal.kept() is None


def test_the_matrix_stays_while_blocks_are_left_and_the_parts_go(unfinished, folder):
    opened(unfinished).finish(RUN, force=False, keep_matrix=True)
    assert sorted(contents(folder)) == ["header", "lock", "whole-matrix"]
    journal = opened(unfinished)
    assert journal.finished == {}
    assert journal.load_matrix(10) is not None
    journal.release()
    assert (folder / "whole-matrix").exists()


def test_without_a_matrix_nothing_stays(path, folder):
    journal = opened(path)
    assert journal.load_matrix(10) is None
    journal.add(done(0))
    journal.finish(RUN, force=False, keep_matrix=True)
    assert not folder.exists()


def test_an_analysis_without_a_finished_block_leaves_nothing(path, folder):
    journal = opened(path)
    assert journal.kept() is None
    journal.release()
    assert list(path.parent.iterdir()) == []


def test_a_second_process_is_refused_until_the_first_is_gone(path, folder):
    first = opened(path)
    first.add(done(0))
    with pytest.raises(StoreError, match=r"another hessdiag is analysing into .*wait"):
        opened(path)
    with pytest.raises(StoreError, match="another hessdiag"):
        opened(path, force=True)
    assert len(contents(folder)) == 3
    first.release()
    opened(path).release()


HOLDER = """
import sys, time
from hessdiag.store.folder import take_lock
from pathlib import Path
take_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(path):
    command = [sys.executable, "-c", HOLDER, str(path)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "probes")))
    environment = os.environ | {"PYTHONPATH": paths}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreError, match="another hessdiag"):
            opened(path)
        holder.kill()
    opened(path).release()


def test_a_lock_whose_folder_was_removed_meanwhile_is_taken_again(path, folder, monkeypatch):
    locked, seen = folders._locked, []

    def late(descriptor):
        if not seen:
            folders.clear(folder)  # its last owner was just done
        seen.append(descriptor)
        return locked(descriptor)

    monkeypatch.setattr(folders, "_locked", late)
    journal = opened(path)
    assert len(seen) == 2
    with pytest.raises(StoreError, match="another hessdiag"):
        opened(path)
    journal.release()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"seed": 3}, "another analysis: seed differs"),
        ({"weights": "x", "dtype": "float32"}, "another analysis: weights, dtype differ;"),
    ],
)
def test_another_analysis_is_refused_by_field_and_nothing_is_touched(
    changed, says, unfinished, folder
):
    (folder / ".hessdiag-0123456789abcdef.tmp").write_bytes(b"x")
    before = contents(folder)
    with pytest.raises(StoreError, match=says) as refused:
        opened(unfinished, **changed)
    assert "--force" in str(refused.value)
    assert str(folder) in str(refused.value)
    assert contents(folder) == before
    opened(unfinished).release()


def test_another_release_is_refused_by_name(unfinished, folder):
    before = contents(folder)
    with pytest.raises(StoreError, match=r"begun by hessdiag 0\.1\.0, this is 0\.2\.0"):
        open_journal(
            unfinished,
            fingerprint=RUN.provenance.fingerprint,
            config={},
            blocks=NAMES,
            variants=["raw"],
            created_at=LATE,
            hessdiag_version="0.2.0",
            force=False,
        )
    assert contents(folder) == before


def test_force_begins_anew_and_the_same_forced_command_resumes(unfinished, folder):
    journal = opened(unfinished, force=True)
    assert (journal.finished, journal.load_matrix(10)) == ({}, None)
    journal.add(done(1))
    journal.release()
    resumed = opened(unfinished, force=True)
    assert set(resumed.finished) == {("2", "raw")}
    resumed.release()
    other = opened(unfinished, force=True, seed=9)
    assert other.finished == {}
    other.release()


@pytest.mark.parametrize(
    "left",
    [[], ["lock"], ["lock", ".hessdiag-0123456789abcdef.tmp"], [".hessdiag-0123456789abcdef.tmp"]],
)
def test_a_killed_beginning_is_begun_again(left, path, folder):
    folder.mkdir()
    for name in left:
        (folder / name).write_bytes(b"half a hea")
    journal = opened(path)
    assert sorted(contents(folder)) == ["header", "lock"]
    journal.release()


def test_temporary_files_of_a_killed_writer_are_removed(unfinished, folder):
    (folder / ".hessdiag-0123456789abcdef.tmp").write_bytes(b"half a part")
    opened(unfinished).release()
    assert not any(name.endswith(".tmp") for name in contents(folder))


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["thesis.tex", "block-0000-raw.part", "whole-matrix", ".x"])
def test_a_folder_that_is_not_ours_is_refused_and_untouched(name, force, path, folder):
    folder.mkdir()
    (folder / name).write_bytes(b"mine")
    with pytest.raises(StoreError, match=r"run\.h5\.parts is not a folder of hessdiag"):
        opened(path, force=force)
    assert contents(folder) == {name: b"mine"}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_or_a_link_of_the_folders_name_is_refused(force, path, folder, tmp_path):
    folder.write_text("mine")
    with pytest.raises(StoreError, match=r"run\.h5\.parts is a file"):
        opened(path, force=force)
    assert folder.read_text() == "mine"
    folder.unlink()
    for target in (tmp_path / "elsewhere", tmp_path / "nowhere"):
        if target.name == "elsewhere":
            target.mkdir()
        folder.symlink_to(target)
        with pytest.raises(StoreError, match="symbolic link"):
            opened(path, force=force)
        assert folder.is_symlink()
        folder.unlink()
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_files_of_others_in_our_folder_stay_and_are_named(force, unfinished, folder):
    (folder / "notes.txt").write_text("mine")
    journal = opened(unfinished, force=force)
    assert journal.finish(RUN, force=False, keep_matrix=False) == ["notes.txt"]
    assert contents(folder) == {"notes.txt": b"mine"}
    assert sample_runs.differences(RUN, open_run(unfinished)) == []


def test_a_damaged_part_is_refused_with_its_name_and_a_remedy(unfinished, folder):
    part, source = folder / "block-0000-raw.part", random.Random(1)
    whole = part.read_bytes()
    damages = [b"", b"junk", whole[:-1], whole + b"x", b"\n" + whole]
    for _ in range(5):
        flipped = bytearray(whole)
        flipped[source.randrange(len(whole))] ^= 4
        damages.append(bytes(flipped))
    for content in damages:
        part.write_bytes(content)
        before = contents(folder)
        for look in (opened, open_run, validate_run):
            with pytest.raises(StoreError, match=r"block-0000-raw\.part is damaged .*remove it"):
                look(unfinished)
        assert contents(folder) == before
    part.unlink()
    journal = opened(unfinished)
    assert set(journal.finished) == {("whole", "raw")}
    journal.release()


def test_a_damaged_matrix_is_refused_with_its_name(unfinished, folder):
    matrix = folder / "whole-matrix"
    content = bytearray(matrix.read_bytes())
    content[-100] ^= 1
    matrix.write_bytes(content)
    journal = opened(unfinished)
    with pytest.raises(StoreError, match="whole-matrix is damaged"):
        journal.load_matrix(10)
    journal.keep_matrix(np.eye(9))
    with pytest.raises(StoreError, match="no matrix of 10×10"):
        journal.load_matrix(10)
    journal.keep_matrix(np.full((10, 10), np.nan))
    with pytest.raises(StoreError, match="no matrix of 10×10"):
        journal.load_matrix(10)
    journal.release()


def test_a_damaged_header_is_refused_even_with_force(unfinished, folder):
    header = folder / "header"
    content = header.read_bytes()
    for damage in (b"", content[:50], content.replace(b"seed", b"sead", 1)):
        header.write_bytes(damage)
        before = contents(folder)
        for force in (False, True):
            with pytest.raises(StoreError, match=r"header is damaged, .*remove .*run\.h5\.parts"):
                opened(unfinished, force=force)
        with pytest.raises(StoreError, match="header is damaged"):
            open_run(unfinished)
        assert contents(folder) == before


def test_a_part_of_another_analysis_or_another_block_is_refused(unfinished, folder, tmp_path):
    other = opened(tmp_path / "other.h5", seed=5)
    other.add(done(1))
    stray = tmp_path / "other.h5.parts" / "block-0001-raw.part"
    (folder / stray.name).write_bytes(stray.read_bytes())
    with pytest.raises(StoreError, match=r"block-0001-raw\.part .*another analysis: seed"):
        opened(unfinished)
    other.release()
    (folder / "block-0000-raw.part").rename(folder / "block-0001-raw.part")
    with pytest.raises(StoreError, match=r"block-0001-raw\.part .*holds the block '0'"):
        opened(unfinished)


def test_an_unfinished_run_shows_what_is_done_and_says_how_much(unfinished):
    assert is_unfinished(unfinished)
    run = open_run(unfinished)
    assert [block.name for block in run.blocks] == ["0", "whole"]
    expected = sample_runs.run((RUN.blocks[0], RUN.blocks[2]))
    assert [dict(b.variants["raw"].values) for b in run.blocks] == [
        dict(b.variants["raw"].values) for b in expected.blocks
    ]
    assert "unfinished: 2 of 3 blocks" in run.provenance.warnings[0]
    assert run.provenance.config == RUN.provenance.config
    assert validate_run(unfinished) == []


def test_the_numbers_of_an_unfinished_run_are_validated(path):
    journal = opened(path)
    odd = sample_runs.VariantResult(sample_runs.values(4), **sample_runs.exact_arrays(6))
    journal.add(Finished(BlockResult("0", (), {"raw": odd}), "raw", None, 0.0, None))
    journal.release()
    assert "block '0', variant 'raw': eigenvalue has 6 entries, not size 4" in validate_run(path)


def test_a_finished_run_is_never_called_unfinished(unfinished, path):
    write_run(RUN, path)
    assert not is_unfinished(path)
    assert sample_runs.differences(open_run(path), RUN) == []


def test_only_the_leftover_of_the_very_run_is_removed(unfinished, folder, path):
    other = sample_runs.run(RUN.blocks)
    other.provenance.fingerprint["seed"] = 7
    assert remove_leftover(other, path) == []
    assert folder.exists()
    journal = opened(path)
    remove_leftover(RUN, path)  # in use
    assert len(contents(folder)) == 5
    journal.release()
    (folder / "notes.txt").write_text("mine")
    assert remove_leftover(RUN, path) == ["notes.txt"]
    assert contents(folder) == {"notes.txt": b"mine"}
    assert remove_leftover(RUN, path) == []


def test_a_later_unfinished_analysis_is_no_leftover(path, folder):
    journal = opened(path)
    journal.add(done(0))
    journal.release()
    old = type(RUN)(RUN.blocks, RUN.variants, RUN.provenance, "2026-11-21T10:59:59+00:00", "0.1.0")
    remove_leftover(old, path)
    assert (folder / "block-0000-raw.part").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_keeps_what_is_finished(code, unfinished, folder, monkeypatch):
    journal = opened(unfinished)
    before = contents(folder)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as full:
        full.setattr(atomic.os, "fsync", refuse)
        with pytest.raises(OutOfResources, match=r"no room for .*block-0001-raw\.part"):
            journal.add(done(1))
        with pytest.raises(OutOfResources, match=r"no room for .*whole-matrix"):
            journal.keep_matrix(np.eye(10))
        with pytest.raises(OutOfResources, match=r"no room for .*run\.h5,"):
            journal.finish(RUN, force=False, keep_matrix=False)
    assert contents(folder) == before
    assert not unfinished.exists()
    journal.add(done(1))
    journal.finish(RUN, force=False, keep_matrix=False)
    assert sample_runs.differences(RUN, read_run(unfinished)) == []


def test_a_full_disk_at_the_beginning_leaves_nothing(path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(atomic.os, "fsync", refuse)
        with pytest.raises(OutOfResources, match="no room for"):
            opened(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_folder_that_cannot_be_made_is_one_error(call, code, path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as closed:
        closed.setattr(*((Path, "mkdir") if call == "mkdir" else (os, "open")), refuse)
        with pytest.raises(StoreError, match=r"run\.h5\.parts cannot be written .*-o/--output"):
            opened(path)


def test_the_run_is_written_from_inside_the_folder_so_that_a_kill_leaves_no_stray(
    unfinished, folder, monkeypatch
):
    seen = []
    replace = Path.replace

    def watched(self, target):
        seen.append((self.parent, Path(target).name))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    opened(unfinished).finish(RUN, force=False, keep_matrix=False)
    assert seen == [(folder, "run.h5")]


def test_a_run_that_appeared_meanwhile_is_not_replaced(unfinished, folder):
    journal = opened(unfinished)
    write_run(sample_runs.rich_run(), unfinished)
    before = unfinished.read_bytes()
    with pytest.raises(StoreError, match="exists; replace it with --force"):
        journal.finish(RUN, force=False, keep_matrix=False)
    assert unfinished.read_bytes() == before
    assert (folder / "block-0000-raw.part").exists()
    journal.release()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("fingerprint", None), ("config", []), ("blocks", 3), ("blocks", ["0", 2])),
        *(("variants", "raw"), ("forced", 1), ("created_at", 3), ("hessdiag_version", None)),
    ],
)
def test_a_header_of_other_types_is_damaged(entry, value, unfinished, folder):
    document, _ = read_part(folder / "header")
    write_part(folder / "header", document | {entry: value})
    for read in (open_run, opened):
        with pytest.raises(StoreError, match="header is damaged"):
            read(unfinished)


def test_nested_beyond_measure_is_damaged(unfinished, folder):
    content = b"[" * 100_000 + b"\n"
    (folder / "block-0000-raw.part").write_bytes(content + seal(content))
    with pytest.raises(StoreError, match="damaged"):
        open_run(unfinished)


@pytest.mark.parametrize("name", [f".hessdiag-{'0' * 16}.tmp", "block-0001-raw.part"])
def test_a_folder_with_the_name_of_a_part_is_named_and_stays(name, unfinished, folder):
    (folder / name).mkdir()
    with pytest.raises(StoreError, match=name):
        opened(unfinished, force=True)
    assert (folder / name).is_dir()


def test_a_place_that_never_gets_a_folder_is_refused(path, monkeypatch):
    def gone(folder, *_arguments, **_options):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))

    monkeypatch.setattr(Path, "mkdir", gone)
    with pytest.raises(StoreError, match=r"folder of .* does not exist"):
        opened(path)


def test_parts_without_their_header_are_named_when_the_run_is_read(tmp_path):
    folder = tmp_path / "run.h5.parts"
    folder.mkdir()
    (folder / "block-0-raw").write_bytes(b"")
    with pytest.raises(StoreError, match=r"run\.h5\.parts beside it has no header"):
        open_run(tmp_path / "run.h5")
