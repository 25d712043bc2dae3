"""Damaged and hostile contents of the files in a run folder."""

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bcos_train.runs import checkpoint as files

#: Terminal escape sequences, rich markup, a format string, and a text that spreadsheets run.
ESCAPES = "\x1b]0;x\x07\x1b[2J[/b][link=file:///etc/passwd]{0.__class__}=1+1"
FLIPS, CUTS = 6, (0, 1, 0.3, 0.7, -1)

Damage = Callable[[Path], None]


class Trap:
    """Creates a file once it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _file_of_torch(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)  # a path is part of the content, and can't begin with a dot
    return file.getvalue()


def damages(name: str, mark: Path, elsewhere: Path) -> dict[str, Damage]:
    """Return the damages of the file ``name`` in a run folder.

    Args:
        mark: Exists once planted code has run.
        elsewhere: A file outside of the run folder.
    """
    found: dict[str, Damage] = {}
    for cut in CUTS:
        found[f"cut at {cut}"] = lambda path, cut=cut: path.write_bytes(_cut(path.read_bytes(), cut))
    for n in range(FLIPS):
        found[f"bit {n}"] = lambda path, n=n: path.write_bytes(_flip(path.read_bytes(), n))
    found["longer"] = lambda path: path.write_bytes(path.read_bytes() + b"\n\xff\0x")
    found["missing"] = Path.unlink
    found["a folder"] = lambda path: (path.unlink(), path.mkdir())[0]
    found["a link"] = lambda path: (path.unlink(), path.symlink_to(elsewhere))[0]
    found["a pickle"] = lambda path: path.write_bytes(pickle.dumps({"model": Trap(mark)}, protocol=2))
    found["a file of torch"] = lambda path: path.write_bytes(_file_of_torch({"model": Trap(mark)}))
    found["zeros"] = lambda path: path.write_bytes(bytes(path.stat().st_size))
    found["escapes"] = lambda path: path.write_text(ESCAPES)
    found["deep"] = lambda path: path.write_text("[" * 100_000)
    found["deep mapping"] = lambda path: path.write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    found["a huge number"] = lambda path: path.write_text("9" * 10_000)
    found["a long line"] = lambda path: path.write_text("step," + "x" * 200_000 + "\n1,2\n")
    return found | {
        key: damage for suffix, group in _OF.items() if name.endswith(suffix) for key, damage in group(mark)
    }


def _cut(content: bytes, cut: float) -> bytes:
    return content[: int(cut * len(content)) if isinstance(cut, float) else cut]


def _flip(content: bytes, n: int) -> bytes:
    if not content:
        return b"\x80"
    changed = bytearray(content)
    changed[random.Random(n).randrange(len(changed))] ^= 1 << n
    return bytes(changed)


def _signed(path: Path, write: Callable[[Path], object]) -> None:
    """Write a checkpoint with a valid checksum."""
    path.unlink()
    write(path)
    files.digest_path(path).write_text(f"{files.file_sha256(path)}  {path.name}\n")


def _edited(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        _signed(path, lambda path: torch.save(content, path))

    return damage


def _best(name: object) -> Damage:
    return _edited(
        lambda content: content["callbacks"]["Checkpointer"].update(best=[{"file": name, "score": 1.0, "epoch": 1}])
    )


def _checkpoints(mark: Path) -> list[tuple[str, Damage]]:
    trap = {"model": Trap(mark)}
    entries: dict[str, Damage] = {
        "signed pickle": lambda path: _signed(path, lambda p: p.write_bytes(pickle.dumps(trap, protocol=2))),
        "signed file of torch": lambda path: _signed(path, lambda p: torch.save(trap, p)),
        "signed list": lambda path: _signed(path, lambda p: torch.save([1], p)),
        "signed zip": lambda path: _signed(path, _write_zip),
        "best elsewhere": _best(f"{mark}.ckpt"),
        "best above": _best("../../../../thesis.ckpt"),
        "best with escapes": _best(f"epoch-0001-{ESCAPES.replace('/', '')}.ckpt"),
        "best is a number": _best(7),
        "shapes": _edited(lambda content: content["model"].update({ESCAPES: torch.zeros(1)})),
        "huge position": _edited(lambda content: content.update(global_step=10**30)),
        "negative position": _edited(lambda content: content["position"].update(step=-1)),
        "classes": _edited(lambda content: content.update(class_names=[ESCAPES])),
        "images": _edited(lambda content: content.update(images={"train": ESCAPES})),
        "callbacks": _edited(lambda content: content.update(callbacks={"os.system": {"x": 1}})),
        "loops": _edited(lambda content: content.update(loops={"fit_loop": {"state_dict": ESCAPES}})),
        "optimizer": _edited(lambda content: content.update(optimizer_states=[{"state": {}, "param_groups": []}])),
        "schedule": _edited(lambda content: content.update(lr_schedulers=[{"_step_count": "x"}])),
        "no model": _edited(lambda content: content.pop("model")),
    }
    return list(entries.items())


def _write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../thesis/data.pkl", b"x")


def _lists(mark: Path) -> list[tuple[str, Damage]]:
    names: dict[str, object] = {"elsewhere": f"{mark}.ckpt", "above": "../../../../thesis.ckpt", "a number": 7}
    texts = {f"names {key}": json.dumps([{"file": name, "score": 1, "epoch": 1}]) for key, name in names.items()}
    texts |= {"an object": "{}", "a list of lists": "[[]]", "null": "null", "text": '"x"', "not a number": "[NaN]"}
    return [(key, lambda path, text=text: path.write_text(text)) for key, text in texts.items()]


def _configs(mark: Path) -> list[tuple[str, Damage]]:
    def added(text: str) -> Damage:
        return lambda path: path.write_text(path.read_text() + text.format(mark=mark))

    return [
        ("a target", added("loss: {{_target_: os.mkdir, name: {mark}}}\n")),
        ("hydra's callbacks", added("hydra: {{callbacks: {{x: {{_target_: os.mkdir, name: {mark}}}}}}}\n")),
        ("plugins", added("plugins: [this]\n")),
        ("interpolation", added("name: '${{oc.env:HOME}}'\n")),
        ("a tag", added("name: !!python/object/apply:os.mkdir [{mark}]\n")),
        ("escapes in a name", lambda path: path.write_text(path.read_text() + f"name: {json.dumps(ESCAPES)}\n")),
    ]


def _tables(mark: Path) -> list[tuple[str, Damage]]:
    rows = {"escapes": ESCAPES, "infinite": "inf,inf", "huge": "9" * 400 + "," + "9" * 400, "negative": "-1,0"}
    return [
        (f"row of {key}", lambda path, row=row: path.write_text(f"{path.read_text()}{row}\n"))
        for key, row in rows.items()
    ]


def _safetensors(mark: Path) -> list[tuple[str, Damage]]:
    def header(length: int, text: str = "") -> Damage:
        return lambda path: path.write_bytes(length.to_bytes(8, "little") + text.encode())

    deep = '{"a":' * 20_000 + "1" + "}" * 20_000
    return [
        ("a huge header", header(2**63 - 1)),
        ("no header", header(2, "{}")),
        ("deep header", header(120_001, deep)),
    ]


_OF: dict[str, Callable[[Path], list[tuple[str, Damage]]]] = {
    ".ckpt": _checkpoints,
    ".json": _lists,
    ".yaml": _configs,
    ".csv": _tables,
    ".safetensors": _safetensors,
}
