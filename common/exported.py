"""A network of one's own as features for evaluation: a file of torch.export, of which nothing is executed.

torch.export.load would unpickle what the file asks for and evaluate expressions in it. Here the file is a
list of operators and arrays, and only operators run that PyTorch counts to its core functions of tensors,
beside resizing with antialiasing. To write one:

    network = torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(network.run_decompositions(), "network.pt2")

with a model that maps images (n, 3, h, w) uint8 to features (n, d).
"""

import json
import operator
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# What numbers in the file stand for (torch/_export/serde/schema.py, whose major version is 8).
DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
RESIZING = {"_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"}
OF_SIZES = {"add", "sub", "mul", "floordiv", "mod", "neg"}  # Python's operators, on sizes


class Network:
    """The network of a file: images (n, 3, h, w) uint8 -> features (n, d)."""

    def __init__(self, file: Path, device: torch.device) -> None:
        """Read a file. ValueError, KeyError and others: it holds what is not run, or is damaged."""
        self.device = device
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():
                raise ValueError(f"{archive.testzip()} in it is damaged")
            (model,) = (name for name in archive.namelist() if name.endswith("/models/model.json"))
            content = json.loads(archive.read(model))
            version = content["schema_version"]["major"]
            if version != 8:
                raise ValueError(f"its format has version {version}, not 8")
            root, arrays = model.removesuffix("models/model.json"), {}
            for kind in ("weights", "constants"):
                entries = json.loads(archive.read(f"{root}data/{kind}/model_{kind}_config.json"))["config"]
                for name, entry in entries.items():
                    if entry["use_pickle"]:
                        raise ValueError(f"{name} in it is pickled")
                    arrays[name] = array(archive.read(f"{root}data/{kind}/{entry['path_name']}"), entry)
        graph, signature = content["graph_module"]["graph"], content["graph_module"]["signature"]
        self.constants = {}
        for spec in signature["input_specs"]:
            ((kind, entry),) = spec.items()
            if kind == "user_input":
                self.input = entry["arg"]["as_tensor"]["name"]
            else:
                self.constants[entry["arg"]["name"]] = arrays[entry[f"{kind}_name"]].to(device)
        ((self.output,),) = (output.values() for output in graph["outputs"])
        nodes = [node for node in graph["nodes"] if "._assert_tensor_metadata." not in node["target"]]
        self.steps = [(function(node["target"]), node) for node in nodes]
        self.last_use = {}  # name of a value: number of the step after which it is not needed
        for i, (_, node) in enumerate(self.steps):
            self.last_use |= dict.fromkeys(names(node["inputs"]), i)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor]:
        """Return the features of images, float32."""
        values = self.constants | {self.input: images}
        for i, (run, node) in enumerate(self.steps):
            positional, named = [], {}
            for argument in node["inputs"]:
                value = self.value(argument["arg"], values)
                if argument["kind"] == 2:
                    named[argument["name"]] = value
                else:
                    positional.append(value)
            result = run(*positional, **named)
            outputs = names(node["outputs"])
            values |= zip(outputs, [result] if len(outputs) == 1 else result)
            for name in names(node["inputs"]):
                if self.last_use[name] == i and name != self.output["name"]:
                    values.pop(name, None)
        return (values[self.output["name"]].float(),)

    def value(self, argument: dict, values: dict) -> object:
        """Return what an argument in the file stands for."""
        ((kind, content),) = argument.items()
        if kind in ("as_tensor", "as_sym_int"):
            return number(content, values)
        if kind in ("as_tensors", "as_sym_ints"):
            return [number(part, values) for part in content]
        if kind == "as_optional_tensors":
            return [None if "as_none" in part else values[part["as_tensor"]["name"]] for part in content]
        meanings = {"as_none": None, "as_layout": torch.strided, "as_device": self.device}
        if kind in meanings:
            return meanings[kind]
        if kind in ("as_scalar_type", "as_memory_format"):
            return (DTYPES if kind == "as_scalar_type" else MEMORY_FORMATS)[content]
        if kind == "as_float":
            return float(content)  # infinity is a word
        if kind in ("as_int", "as_ints", "as_floats", "as_bool", "as_bools", "as_string"):
            return content
        raise ValueError(f"it has an argument {kind}")


def array(data: bytes, entry: dict) -> Tensor:
    """Return the tensor that data and its entry in the file describe."""
    meta = entry["tensor_meta"]
    flat = torch.frombuffer(bytearray(data), dtype=DTYPES[meta["dtype"]])
    sizes = [size["as_int"] for size in meta["sizes"]]
    strides = [stride["as_int"] for stride in meta["strides"]]
    return flat.as_strided(sizes, strides, meta["storage_offset"]["as_int"])


def function(target: str) -> Callable:
    """Return the function that a node in the file names; ValueError: it is none that is run."""
    *library, name, overload = target.split(".")
    if library == ["torch", "ops", "aten"]:
        found = getattr(getattr(torch.ops.aten, name), overload)
        if isinstance(found, torch._ops.OpOverload) and (torch.Tag.core in found.tags or name in RESIZING):
            return found
    if name == "_operator" and overload in OF_SIZES:
        return getattr(operator, overload)
    raise ValueError(f"it calls {target}, no core function of tensors: export run_decompositions() of it")


def names(arguments: object) -> list[str]:
    """Return the names of values in a part of the file."""
    if isinstance(arguments, list):
        found = []
        for argument in arguments:
            found += names(argument)
        return found
    if not isinstance(arguments, dict):
        return []
    if "arg" in arguments:
        return names(arguments["arg"])
    own = [arguments[key] for key in ("name", "as_name") if isinstance(arguments.get(key), str)]
    return own + names(list(arguments.values()))


def number(content: dict, values: dict) -> object:
    """Return a tensor or a size by its name, or a size that is written out."""
    name = content.get("name", content.get("as_name"))
    return content["as_int"] if name is None else values[name]
