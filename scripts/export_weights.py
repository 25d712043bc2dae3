"""Export trained weights.

python scripts/export_weights.py RUN out/resnet50 --license apache-2.0     # a folder for the Hugging Face Hub
python scripts/export_weights.py RUN resnet50.pth --hash --no-ema          # like the official files
python scripts/export_weights.py official:resnet50 resnet50.safetensors
python scripts/export_weights.py RUN resnet50.onnx                         # compared with the model by onnxruntime
python scripts/export_weights.py epoch=89.ckpt out --model resnet50        # a checkpoint of the official training code

SOURCE is a run folder, a checkpoint or weights file (.ckpt, .pth, .safetensors), an exported folder, or
official:<model>. TARGET is a .pth, .safetensors or .onnx file, or else a folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bcos_train.utils.command_line import MISTAKE, Parser
from bcos_train.utils.terminal import print_line
from bcos_train.weights.export import export


def parser() -> Parser:
    result = Parser(__doc__)
    add = result.add_argument
    add("source", metavar="SOURCE")
    add("target", metavar="TARGET")
    # With a default, argparse doesn't list it among the missing arguments.
    add(
        "options",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="model options that the source doesn't specify",
    )
    add("--model", metavar="NAME", help="model name, if the source doesn't name it; timm:<name> for timm models")
    add(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="export the averaged or the plain weights (default: averaged)",
    )
    add("--hash", action="store_true", help="append ten digits of the SHA-256 to the file's name")
    add("--force", action="store_true", help="overwrite existing files")
    add("--license", metavar="ID", help="license of the weights, such as apache-2.0 (default: that of the source)")
    add("--classes", metavar="FILE", type=Path, help="class names, one per line, in the order of the outputs")
    add("--image-size", metavar="PIXELS", type=int, help="side of an ONNX model's images (default: the transform's)")
    return result


def model_option(text: str) -> tuple[str, object]:
    import yaml

    key, is_pair, value = text.partition("=")
    if not is_pair or not key:
        raise ValueError(f"{text}: model options are given as KEY=VALUE")
    # JSON first, since YAML reads 1e-3 as text.
    for parse, error in ((json.loads, ValueError), (yaml.safe_load, yaml.YAMLError)):
        try:
            return key, parse(value)
        except error:
            continue
    return key, value


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't read --classes {path}: {error}") from error


def model_options(texts: Sequence[str]) -> dict[str, object]:
    options: dict[str, object] = {}
    for key, value in map(model_option, texts):
        if key in options:
            raise ValueError(f"{key} is set twice: {options[key]} and {value}")
        options[key] = value
    return options


def run(arguments: argparse.Namespace) -> None:
    for name in ("source", "target"):
        if not getattr(arguments, name):  # an empty path would be the current folder
            raise ValueError(f"{name.upper()} is empty")
    exported = export(
        arguments.source,
        Path(arguments.target).expanduser(),
        model=arguments.model,
        options=model_options(arguments.options),
        use_ema=arguments.ema,
        with_hash=arguments.hash,
        force=arguments.force,
        license=arguments.license,
        class_names=None if arguments.classes is None else read_lines(arguments.classes),
        image_size=arguments.image_size,
    )
    source = exported.source
    print(f"{source.model_name}, {'averaged' if source.is_ema else 'plain'} weights of {source.origin}")
    print(f"written: {exported.path}")
    print(f"sha256 of the {'file' if exported.path.suffix == '.onnx' else 'weights'}: {exported.sha256}")
    if source.license is None and exported.path.is_dir():
        print("no license: give one with --license before you publish the folder", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parser().parse_intermixed_args(argv))
    except ValueError as error:
        print_line(error)
        return MISTAKE
    return 0


if __name__ == "__main__":
    sys.exit(main())
