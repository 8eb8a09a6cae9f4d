"""`grasp verify DIR`: is this checkpoint what it says it is?

The checkpoint is loaded in fresh processes, the way its users will load it, and compared with
grasp.json and with the probe: logits of the model in memory when it was saved.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp.errors import GraspError

# Another CPU, GPU or torch release rounds differently; relative to the largest logit.
TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 5e-2, "torch.float16": 1e-2}


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    folder: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> VerifyReport:
    """Check a checkpoint written by grasp; a failed check is in the report, not an exception.

    A modeling_grasp.py that is not this release's own is run only with `trust_remote_code`. Raises
    GraspError if the folder is no grasp checkpoint.
    """
    folder = Path(folder).resolve()
    grasp_json, config = _read_json(folder, "grasp.json"), _read_json(folder, "config.json")
    try:
        kept = [(len(layer["ffn"]), len(layer["kv"])) for layer in grasp_json["kept"]]
        parameters = int(grasp_json["params"]["total_after"])
        hashes = dict(grasp_json["sha256"])
        own_code = str(config["model_type"]).startswith("grasp_")
    except (KeyError, TypeError, ValueError) as error:
        raise GraspError(f"{folder} is not a grasp checkpoint: no {error} in its json") from None

    checks = [_check_files(folder, hashes), _check_tensors(folder)]
    if "sparsity" in grasp_json:
        checks.append(check_sparsity(folder, grasp_json["sparsity"]))
    ways = {"with import grasp": "grasp", "without grasp": "remote"}
    if not own_code:
        ways = {"as the stock class": "stock"}
    elif not trust_remote_code and not _is_own_code(folder / "modeling_grasp.py"):
        del ways["without grasp"]
        checks.append(
            Check(
                "loads without grasp",
                False,
                "modeling_grasp.py is not this release's own, so it was not run "
                "(grasp.verify(..., trust_remote_code=True) runs it)",
            )
        )
    for title, way in ways.items():
        checks += _check_loaded(folder, title, way, kept, parameters)
    return VerifyReport(str(folder), tuple(checks))


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GraspError(f"{folder} is not a grasp checkpoint: it has no {name}") from None
    except (OSError, ValueError) as error:
        raise GraspError(f"{folder} is not a grasp checkpoint: {name}: {error}") from None
    if not isinstance(content, dict):
        raise GraspError(f"{folder} is not a grasp checkpoint: {name} holds no object")
    return content


def _is_own_code(path: Path) -> bool:
    own = Path(__file__).parents[1] / "model" / "modeling_grasp.py"
    return path.is_file() and path.read_bytes() == own.read_bytes()


def _check_files(folder: Path, hashes: dict[str, str]) -> Check:
    """The weight files are those that were written, to the last bit."""
    from grasp.checkpoint.save import sha256

    found = {path.name for path in folder.glob("*.safetensors")}
    wrong = sorted(found.symmetric_difference(hashes))
    wrong += [
        name for name in sorted(found & hashes.keys()) if sha256(folder / name) != hashes[name]
    ]
    names = ", ".join(wrong)
    detail = f"not as written: {names}" if wrong else f"{len(hashes)} files as written"
    return Check("files", not wrong, detail)


def _check_tensors(folder: Path) -> Check:
    """Every tensor of the index is there and finite."""
    from safetensors import SafetensorError, safe_open

    count = 0
    try:
        for file, names in _index(folder):
            with safe_open(folder / file, framework="pt") as tensors:
                for name in names if names is not None else tensors.keys():
                    count += 1
                    if not tensors.get_tensor(name).isfinite().all():
                        return Check("tensors", False, f"{name} in {file} is not finite")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return Check("tensors", False, _one_line(str(error)))
    return Check("tensors", count > 0, f"{count} tensors, all finite")


def check_sparsity(folder: Path, sparsity: dict[str, Any]) -> Check:
    """The matrices of the decoder blocks have the zeros of the pattern, and as many as written."""
    from safetensors import SafetensorError

    try:
        return _zeros_by_pattern(folder, sparsity)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return Check("sparsity", False, _one_line(str(error)))


def _zeros_by_pattern(folder: Path, sparsity: dict[str, Any]) -> Check:
    from safetensors import safe_open

    from grasp.budget.pattern import Pattern

    pattern, zeros, matrices = Pattern.parse(sparsity["pattern"]), 0, 0
    for file, names in _index(folder):
        with safe_open(folder / file, framework="pt") as tensors:
            for name in names if names is not None else tensors.keys():
                weight = tensors.get_tensor(name)
                if ".layers." not in name or weight.dim() != 2:
                    continue
                if not pattern.holds(weight):
                    return Check("sparsity", False, f"{name} is not {pattern.text}")
                matrices += 1
                zeros += int((weight == 0).sum())
    detail = f"{pattern.text} in {matrices} matrices, {zeros:,} zeros"
    return Check("sparsity", zeros == sparsity["zeros_after"], detail)


def _index(folder: Path) -> Iterable[tuple[str, list[str] | None]]:
    """(file, its tensors), with None for all where there is one file and so no index."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return [("model.safetensors", None)]
    weight_map: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    files = sorted(set(weight_map.values()))
    return [(file, [name for name, f in weight_map.items() if f == file]) for file in files]


def _check_loaded(
    folder: Path, title: str, way: str, kept: list[tuple[int, int]], parameters: int
) -> list[Check]:
    found = _in_fresh_process(folder, way)
    if "error" in found:
        return [Check(f"loads {title}", False, found["error"])]
    widths = list(zip(found["ffn"], found["kv"], strict=True))
    wrong = [i for i, pair in enumerate(zip(widths, kept, strict=False)) if pair[0] != pair[1]]
    same_widths = widths == kept
    return [
        Check(f"loads {title}", True, found["class"]),
        Check(
            f"widths {title}",
            same_widths,
            f"{len(kept)} layers" if same_widths else f"layers {wrong} differ from grasp.json",
        ),
        Check(
            f"parameters {title}",
            found["parameters"] == parameters,
            f"{found['parameters']:,}, grasp.json says {parameters:,}",
        ),
        _check_logits(f"logits {title}", folder, found),
        Check(
            f"generate {title}",
            found["cached"] == found["uncached"],
            "16 greedy tokens, the same with a cache and without"
            if found["cached"] == found["uncached"]
            else f"with a cache {found['cached']}, without {found['uncached']}",
        ),
    ]


def _check_logits(name: str, folder: Path, found: dict[str, Any]) -> Check:
    """Bit-equal to the probe where processor and torch are those that computed it."""
    import torch
    from safetensors import safe_open

    from grasp.checkpoint.save import PROBE, environment

    with safe_open(folder / PROBE, framework="pt") as probe:
        then = probe.metadata()
    now = environment(torch.device(found["device"]))
    difference, limit = found["difference"], TOLERANCE[found["dtype"]]
    place = f"{then['processor']}, torch {then['torch']}, transformers {then['transformers']}"
    if all(now[key] == then[key] for key in ("torch", "transformers", "device", "processor")):
        if found["bit_equal"]:
            return Check(name, True, f"bit-equal to the model in memory ({found['dtype']})")
        return Check(name, False, f"differ by {difference:.1e} from those computed on this {place}")
    detail = f"differ by {difference:.1e} (limit {limit:.0e}) from those computed on {place}"
    return Check(name, difference <= limit, detail)  # NaN fails


def _in_fresh_process(folder: Path, way: str) -> dict[str, Any]:
    """Run `_load_and_probe` in a new interpreter; {"error": last line} if that fails."""
    source = inspect.getsource(_load_and_probe)
    root = str(Path(__file__).parents[2])  # where grasp is imported from, installed or not
    with tempfile.TemporaryDirectory() as scratch:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": scratch,  # copies of modeling_grasp.py; none survives
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        }
        result = Path(scratch, "result.json")
        run = subprocess.run(
            [sys.executable, "-c", f"{source}\n_load_and_probe()", str(folder), way, str(result)],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
        if run.returncode == 0:
            return dict(json.loads(result.read_text()))
    lines = run.stderr.strip().splitlines() or [f"the process ended with {run.returncode}"]
    return {"error": _one_line(lines[-1])}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _load_and_probe() -> None:
    """Stands alone: its source is run where grasp may not be importable."""
    import json
    import sys
    from pathlib import Path

    folder, way, result = sys.argv[1:]
    if way == "grasp":
        import grasp  # noqa: F401
    else:
        sys.modules["grasp"] = None  # type: ignore[assignment]  # importing it fails

    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    with safe_open(Path(folder, "verify", "probe.safetensors"), framework="pt") as probe:
        input_ids, logits = probe.get_tensor("input_ids"), probe.get_tensor("logits")
        metadata = probe.metadata()
    torch.set_num_threads(int(metadata["threads"]))  # the order of sums depends on it
    device = metadata["device"] if torch.cuda.is_available() else "cpu"

    auto: Any = AutoModelForCausalLM
    model, loading = auto.from_pretrained(
        folder,
        dtype=logits.dtype,
        use_safetensors=True,
        trust_remote_code=way == "remote",
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            raise SystemExit(f"{problem}: {sorted(loading[problem])}")
    model.to(device).eval()
    input_ids = input_ids.to(device)
    with torch.no_grad():
        again = model(input_ids, use_cache=False).logits.cpu()
        error = (again.float() - logits.float()).abs().max() / logits.float().abs().max()
        shapes = {
            part: [p.shape for n, p in model.named_parameters() if n.endswith(f".{part}.weight")]
            for part in ("down_proj", "k_proj", "qkv_proj", "o_proj")
        }
        fused = zip(shapes["qkv_proj"], shapes["o_proj"], strict=False)
        keys = [k[0] for k in shapes["k_proj"]] or [(qkv[0] - o[1]) // 2 for qkv, o in fused]
        parameters = sum(p.numel() for p in model.parameters())
        # In fp32: in bf16 the two ways round differently and near-ties may fall either way.
        model.float()
        cached, uncached = (
            model.generate(
                input_ids[:, :8],
                attention_mask=torch.ones_like(input_ids[:, :8]),
                do_sample=False,
                max_new_tokens=16,
                min_new_tokens=16,
                use_cache=use_cache,
            )[0].tolist()
            for use_cache in (True, False)
        )
    found = {
        "class": f"{type(model).__module__.split('.')[-1]}.{type(model).__name__}",
        "device": device,
        "dtype": str(logits.dtype),
        "bit_equal": torch.equal(again, logits),
        "difference": error.item(),
        "ffn": [columns for _, columns in shapes["down_proj"]],
        "kv": [rows // model.config.head_dim for rows in keys],
        "parameters": parameters,
        "cached": cached,
        "uncached": uncached,
    }
    Path(result).write_text(json.dumps(found))
