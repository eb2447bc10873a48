"""Do two installations of this package write the same bits?

    python benchmarks/same_bits.py OLD/.venv/bin NEW/.venv/bin [CASE ...]

Makes small checkpoints, runs varied configs by the console scripts of both installations, and
compares what they leave: every tensor byte by byte, the other files, the summary of the merge, and
the numbers of reports. Sentences in reports may differ. CASEs, if any, are those to run. Prints a
line a case and a total; exit status 1 on any difference.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from same_bits_cases import Case, all_cases


@dataclass(frozen=True)
class Result:
    """What a command left behind.

    tensors: dtype, shape and bytes by file and name. files: the bytes of all other files.
    """

    exit_code: int
    output: str
    errors: str
    tensors: dict[tuple[str, str], tuple[Any, Any, bytes]]
    files: dict[str, bytes]

    @property
    def summary(self) -> list[str]:
        """The lines about the merge that end the command."""
        lines = self.errors.replace("\r", "\n").splitlines()
        starts = [number for number, line in enumerate(lines) if "tensors merged" in line]
        return lines[starts[0] :] if starts else []


def main(old: str, new: str, *names: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        inputs, sides = Path(folder) / "inputs", [Path(folder) / side for side in ("old", "new")]
        for path in (inputs, *sides):
            path.mkdir()
        every = {case.name: case for case in all_cases(inputs)}
        if unknown := set(names) - every.keys():
            sys.exit(
                f"There is no case {', '.join(sorted(unknown))}: give any of {', '.join(every)}."
            )
        cases = [every[name] for name in names or every]
        different = 0
        for case in cases:
            # Side by side: most of the time goes into Python's start.
            started = [
                _start(case, Path(scripts).absolute(), side)
                for scripts, side in zip((old, new), sides, strict=True)
            ]
            results = [
                _result(process, side / case.name)
                for process, side in zip(started, sides, strict=True)
            ]
            differences = list(_differences(case, *results))
            different += bool(differences)
            print(f"{'DIFFERENT' if differences else 'same':10}{case.name}", flush=True)
            for line in differences[:5]:
                print(f"{'':10}  {line}", flush=True)
    print(f"{len(cases) - different} of {len(cases)} cases are the same.")
    return int(different > 0 or not cases)


def _start(case: Case, scripts: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a case's command; its output folder is named like the case.

    That folder and the config are given as relative paths, which may stand in what is written.
    """
    out, config = case.name, f"{case.name}.yml"
    command = {
        "mergekit-multi": ["mergekit-multi", config, "--out-path", out, "-I", f"{out}/stages"],
        "report": ["mergekit-karcher", "report", config, "--json"],
        "fisher": ["mergekit-karcher", "fisher", "--out", out],
        "align": ["mergekit-karcher", "align", "--out", out],
    }.get(case.command, [case.command, config, out])
    if case.config is not None:
        configs = case.config if isinstance(case.config, list) else [case.config]
        (folder / config).write_text(yaml.safe_dump_all(configs))
    return subprocess.Popen(
        [str(scripts / command[0]), *command[1:], *case.options],
        cwd=folder,
        # mergekit goes through sets of models: the order must be the same in both processes.
        env=os.environ | {"PYTHONHASHSEED": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _result(process: subprocess.Popen[str], out: Path) -> Result:
    output, errors = process.communicate()
    tensors, files = {}, {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.suffix != ".safetensors":
            # align writes absolute paths of its models.
            files[name] = path.read_bytes().replace(str(out.parent).encode(), b"")
            continue
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                tensors[name, key] = (tensor.dtype, tensor.shape, data)
    return Result(process.returncode, output, errors, tensors, files)


def _differences(case: Case, old: Result, new: Result) -> Iterator[str]:
    """What differs, in words. A case that does not do what it is for counts as different too."""
    for side, result in (("old", old), ("new", new)):
        if (result.exit_code != 0) != case.refused:
            last = (result.errors.strip().splitlines() or [""])[-1]
            yield f"{side}: exit status {result.exit_code}: {last}"
        done = result.output if case.command == "report" else result.tensors
        if bool(done) == case.refused:
            yield f"{side}: {'something' if case.refused else 'nothing'} was written"
    for key in sorted(old.tensors.keys() | new.tensors.keys()):
        if old.tensors.get(key) != new.tensors.get(key):
            yield f"the tensor {key[1]} in {key[0]}"
    if case.command == "report":
        yield from _number_differences(_parsed(old.output), _parsed(new.output))
    if not case.refused:
        for name in sorted(old.files.keys() | new.files.keys()):
            if name not in old.files or name not in new.files:
                yield f"the file {name} is missing from one"
            else:
                yield from _file_differences(case, name, old.files[name], new.files[name])
        if old.summary != new.summary:
            yield f"the summary: {old.summary} and {new.summary}"


def _file_differences(case: Case, name: str, old: bytes, new: bytes) -> Iterator[str]:
    if case.config is None:  # written by our own commands: sentences may differ
        yield from _number_differences(_parsed(old), _parsed(new), name)
    elif name.endswith(".md"):  # lists models in the order of such a set
        if sorted(old.splitlines()) != sorted(new.splitlines()):
            yield f"the file {name}"
    elif old != new and not Path(name).name.startswith("tokenizer"):
        # mergekit copies those from the first of a set of models, or unites them in its order.
        yield f"the file {name}"


def _parsed(output: str | bytes) -> Any:
    try:
        return json.loads(output)
    except ValueError:
        return output


def _number_differences(old: Any, new: Any, where: str = "report") -> Iterator[str]:
    """Where two values of JSON differ in anything but sentences."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        for key in old:
            yield from _number_differences(old[key], new[key], f"{where}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _number_differences(*pair, f"{where}[{index}]")
    elif old != new and not (_is_sentence(old) and _is_sentence(new)):
        yield f"{where}: {old} and {new}"


def _is_sentence(value: Any) -> bool:
    return isinstance(value, str) and " " in value


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
