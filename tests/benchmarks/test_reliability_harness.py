"""The campaigns of `make reliability` see what must not be, and count a crash and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import warnings
import zlib

import pytest
from result_pages import reliability_page

import damage
import fuzz
import sudden
from forking import forked
from sparseworks.core.errors import CheckpointError
from sparseworks.io.atomic import atomic_file, replaced_folder
from written import Format


def write_checked(path, version):
    data = random.Random(version).randbytes(3000)
    with atomic_file(path) as file:
        file.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))


def read_checked(path):
    data = path.read_bytes()
    if zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        raise CheckpointError(f"{path}: damaged")
    return data[:-4]


CHECKED = Format(write_checked, read_checked)
TRUSTING = Format(write_checked, lambda path: path.read_bytes()[:3000])


def test_damage_always_follows_its_seed():
    data = random.Random(0).randbytes(500)
    kinds = set()
    for seed in range(200):
        bad, kind = damage.damaged(data, random.Random(seed))
        assert (bad, kind) == damage.damaged(data, random.Random(seed))
        kinds.add(kind)
    assert kinds == {"bit", "byte", "swap", "zeros", "truncated", "appended"}


def raising(error):
    raise error


def edited():
    warnings.warn("config.json: is not as it was saved", stacklevel=1)
    return 3


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda: raising(CheckpointError("x")), "named error"),
        (lambda: raising(KeyError("x")), "unnamed error"),
        (lambda: 2, "exact"),
        (lambda: 3, "silently wrong"),
        (edited, "warned"),
    ],
)
def test_outcomes_are_told_apart(read, outcome):
    assert damage.outcome(read, 2)[0] == outcome


def test_a_checked_format_is_sound_and_a_trusting_one_is_found():
    sound = damage.campaign("checked", CHECKED, 60, 0)
    assert not any(sound[k] for k in damage.BAD) and sound["named error"] > 50
    found = damage.campaign("trusting", TRUSTING, 60, 0)
    assert found["silently wrong"] > 10 and found["first that must not be"]


def test_a_crash_is_counted_and_the_rest_goes_on():
    def read(path):
        if len(path.read_bytes()) < 3004:
            os.kill(os.getpid(), signal.SIGKILL)
        return read_checked(path)

    found = damage.campaign("crashing", Format(write_checked, read), 40, 0)
    assert 0 < found["crash"] < 30 and sum(found[k] for k in damage.OUTCOMES) == found["trials"]


def test_a_write_that_is_not_atomic_is_found():
    def write(path, version):
        path.write_bytes(b"")
        with atomic_file(path) as file:
            file.write_bytes(bytes([version]) * 100)

    found = sudden.writes("torn", Format(write, lambda p: p.read_bytes()), 30, 0)
    assert found["neither"] > 0
    sound = sudden.writes("checked", CHECKED, 30, 0)
    assert sound["neither"] == sound["left over"] == 0 and sound["killed"] > 5
    assert sound["old"] and sound["new"]


def test_a_replaced_folder_is_old_or_new_at_every_call(tmp_path):
    """Also between the two renames that a system without an exchange takes."""
    path = tmp_path / "folder"

    def write(text):
        with replaced_folder(path) as made:
            (made / "a").write_text(text)
            (made / "b").write_text(text)

    write("old")
    calls = sudden.calls_of(lambda: write("old"), sudden.PLACING)
    seen = set()
    for number in range(1, calls + 1):
        work = sudden.at_call(lambda: write("new"), number, sudden.PLACING)
        assert sudden.killed(forked(work), 60)
        texts = {(path / name).read_text() for name in ("a", "b")}
        assert len(texts) == 1, number
        seen |= texts
        write("old")
    assert seen == {"old", "new"} and [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("law", fuzz.LAWS)
def test_laws_hold_in_a_few_cases(law):
    found = fuzz.campaign(law, 10, 1, [])
    assert found["agrees"] == 10, found


def test_a_law_that_does_not_hold_is_counted(monkeypatch):
    def law(draw):
        if draw.random() < 0.3:
            os.kill(os.getpid(), signal.SIGKILL)
        return "off" if draw.random() < 0.5 else ""

    monkeypatch.setitem(fuzz.LAWS, "bad", law)
    found = fuzz.campaign("bad", 20, 0, [])
    assert found["crash"] and found["differs"] and found["agrees"]
    assert sum(found[k] for k in ("agrees", "differs", "error", "crash")) == 20


def test_the_page_shows_all_counts():
    sound = damage.campaign("checked", CHECKED, 3, 0)
    result = {
        "seed": 0, "instruction sets": ["base"], "must not be": 0, "damage": [sound],
        "damage of exports": [sound], "writes": [sudden.writes("checked", CHECKED, 3, 0)],
        "commands": [{"command": "train", "kills": 1}],
        "fuzz": [fuzz.campaign("zeroing", 3, 0, [])],
    }  # fmt: skip
    page = reliability_page(json.loads(json.dumps(result)))
    for text in (
        "| checked |",
        "| train | 1 |",
        "| zeroing | 3 | 3 | 0 | 0 | 0 |",
        "trials none",
    ):
        assert text in page
