"""What does a wrapped layer cost? Time, memory and error of `Rank1EditModule` against the plain `nn.Linear`.

    python benchmarks/bench_layer.py

Every contender runs side by side with the plain layer in one process. Each round times all of them in turn; a
ratio is the median over rounds. A row is the geometric mean over Stable Diffusion 1.5's shapes: (2, 77, 768)
to 320, 640 and 1280. Training is forward and backward on frozen weights, with a gradient into the text
encodings, as in personalization. peft's LoRA of rank 1 runs beside it. So does perfusion-pytorch 0.1.23 if
`--reference_dir` names a folder that holds it; it has the same import name, so it gets its own process:

    pip install --no-deps --target /tmp/reference perfusion-pytorch==0.1.23 opt_einsum
    python benchmarks/bench_layer.py --reference_dir /tmp/reference

All ratios are written to `--output` as JSON, with versions, threads and device.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
from torch import nn

HERE = Path(__file__).parent
OUT_FEATURES = (320, 640, 1280)
BATCH, TOKENS, D = 2, 77, 768
CONCEPTS = (1, 3, 8)


def covariance_matrix(d):
    """Return that of CLIP ViT-L/14 if it lies beside the repository, else a random one of condition 1e3."""
    path = HERE.parent.parent / "shared" / "data" / "clip_vit_l14_covariance.safetensors"
    if d == D and path.exists():
        from perfusion_pytorch import InputCovariance

        return InputCovariance.load(path).matrix
    basis, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))
    return (basis * torch.logspace(0, -3, d, dtype=torch.float64)) @ basis.T


def ratios(contenders, rounds, seconds):
    """Return each contender's time over the first one's: the median over rounds that time all in turn."""
    first, *_ = contenders
    for run in contenders.values():
        for _ in range(5):
            run()
    start = time.perf_counter()
    contenders[first]()
    calls = max(1, round(seconds / max(1e-6, time.perf_counter() - start)))
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append(time.perf_counter() - start)
    return {
        name: median(t / plain for t, plain in zip(times[name], times[first], strict=True))
        for name in contenders
    }


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def forward(layer, text_enc, **options):
    def run():
        with torch.no_grad():
            layer(text_enc, **options)

    return run


def forward_and_backward(layer, text_enc, **options):
    leaf = text_enc.clone().requires_grad_()

    def run():
        layer(leaf, **options).sum().backward()
        leaf.grad = None

    return run


def forwards_and_backward(layers, text_enc, **options):
    """As in a model: all layers see the same encodings in one `concept_inputs`; one backward for all."""
    from perfusion_pytorch import concept_inputs

    leaf = text_enc.clone().requires_grad_()

    def run():
        with concept_inputs(layers, **options) if options else nullcontext():
            sum(layer(leaf).sum() for layer in layers).backward()
        leaf.grad = None

    return run


def plain_layer(o):
    return nn.Linear(D, o, bias=False).requires_grad_(False)


def edited_layer(o, C, is_key_proj, concepts):
    """A wrapped layer that has seen all its concepts."""
    from perfusion_pytorch import Rank1EditModule

    layer = Rank1EditModule(plain_layer(o), C=C, is_key_proj=is_key_proj, num_concepts=concepts)
    for concept in range(concepts):
        layer(*torch.randn(2, BATCH, TOKENS, D), torch.tensor([3, 5]), concept_id=concept)
    return layer


def loaded_layer(o, is_key_proj, concepts, text_enc):
    """A layer with loaded concepts, all of which the prompts of these encodings hold."""
    from perfusion_pytorch.layers.loaded import LoadedProjection
    from perfusion_pytorch.layers.prompt_rows import Held, fingerprints
    from perfusion_pytorch.layers.row_edits import RowEdits, row_of

    edits = RowEdits()
    for _ in range(concepts):
        i, s = torch.randn(2, D)
        inputs = {"concept_input": i, "concept_dual": i / (i @ i), "superclass_input": s}
        edits.active.append(edits.table.add(row_of(inputs, {"to_v": torch.randn(o)}, (0.7, 0.1), True)))
        edits.table.write(edits.active[-1], {"active": torch.tensor(True)})
    edits.remember(fingerprints(text_enc), [[Held(slot) for slot in edits.active]] * len(text_enc))
    return LoadedProjection(plain_layer(o), is_key_proj=is_key_proj, edits=edits, name="to_v")


def lora_layer(o):
    from peft import LoraConfig, inject_adapter_in_model

    return inject_adapter_in_model(
        LoraConfig(r=1, target_modules=["to_v"]), nn.ModuleDict({"to_v": plain_layer(o)})
    )["to_v"]


def measure_ours(rounds, seconds):
    from perfusion_pytorch import InputCovariance

    C = InputCovariance(covariance_matrix(D))

    def inference(concepts, o):
        keys, values = (edited_layer(o, C, is_key_proj, concepts).eval() for is_key_proj in (True, False))
        text_enc = torch.randn(BATCH, TOKENS, D)
        layers = {"plain": plain_layer(o), "values": values, "keys": keys, "LoRA": lora_layer(o).eval()}
        return {name: forward(layer, text_enc) for name, layer in layers.items()}

    def inference_of_loaded(concepts, o):
        text_enc = torch.randn(BATCH, TOKENS, D)
        keys, values = (loaded_layer(o, is_key_proj, concepts, text_enc) for is_key_proj in (True, False))
        layers = {"plain": plain_layer(o), "values": values, "keys": keys, "LoRA": lora_layer(o).eval()}
        return {name: forward(layer, text_enc) for name, layer in layers.items()}

    def training(concepts, o):
        text_enc, superclass = torch.randn(2, BATCH, TOKENS, D)
        call = {"text_enc_with_superclass": superclass, "concept_indices": torch.tensor([3, 5])}
        keys, values = (edited_layer(o, C, is_key_proj, concepts) for is_key_proj in (True, False))
        layers = {
            "plain": (plain_layer(o), {}),
            "values": (values, call),
            "keys": (keys, call),
            "LoRA": (lora_layer(o), {}),
        }
        return {
            name: forward_and_backward(layer, text_enc, **options)
            for name, (layer, options) in layers.items()
        }

    def training_in_a_model(concepts, o):
        text_enc, superclass = torch.randn(2, BATCH, TOKENS, D)
        call = {"text_enc_with_superclass": superclass, "concept_indices": torch.tensor([3, 5])}
        make = {
            "plain": (lambda: plain_layer(o), {}),
            "values": (lambda: edited_layer(o, C, False, concepts), call),
            "keys": (lambda: edited_layer(o, C, True, concepts), call),
            "LoRA": (lambda: lora_layer(o), {}),
        }
        return {
            name: forwards_and_backward(nn.ModuleList(layer() for _ in range(8)), text_enc, **options)
            for name, (layer, options) in make.items()
        }

    rows = {}
    for name, contenders in (
        ("inference", inference),
        ("inference of loaded concepts", inference_of_loaded),
        ("training", training),
        ("training, 8 layers in one context", training_in_a_model),
    ):
        for concepts in CONCEPTS:
            found = [ratios(contenders(concepts, o), rounds, seconds) for o in OUT_FEATURES]
            rows[f"{name}, {concepts} concepts"] = {
                kind: geometric_mean([f[kind] for f in found]) for kind in found[0]
            }
    return rows


def measure_training_step(rounds):
    """The ratio of a training step of the small model's UNet with wrapped projections to a plain one."""
    from diffusers import UNet2DConditionModel

    from perfusion_pytorch import InputCovariance, concept_inputs, wrap_cross_attentions_

    folder = HERE.parent / "examples" / "shapes" / "tiny-sd" / "unet"
    plain, wrapped = (
        UNet2DConditionModel.from_pretrained(folder).float().train().requires_grad_(False) for _ in range(2)
    )
    d = plain.config.cross_attention_dim
    wrap_cross_attentions_(wrapped, C=InputCovariance(torch.eye(d)))
    latents, times, superclass = (
        torch.randn(16, 4, 16, 16),
        torch.randint(0, 1000, (16,)),
        torch.randn(16, 20, d),
    )
    text_enc, indices = torch.randn(16, 20, d, requires_grad=True), torch.full((16,), 5)

    def plain_step():
        plain(latents, times, text_enc).sample.square().mean().backward()

    def wrapped_step():
        with concept_inputs(wrapped, text_enc_with_superclass=superclass, concept_indices=indices):
            wrapped(latents, times, text_enc).sample.square().mean().backward()

    return ratios({"plain": plain_step, "wrapped": wrapped_step}, rounds, 0.1)["wrapped"]


def measure_memory():
    """Return the bytes that wrapping adds to SD 1.5's 32 projections: in state, and saved for backward."""
    from perfusion_pytorch import InputCovariance

    C = InputCovariance(torch.eye(D))

    def state(concepts):
        total = 0
        for o in (320,) * 5 + (640,) * 5 + (1280,) * 6:
            for is_key_proj in (True, False):
                layer = edited_layer(o, C, is_key_proj, concepts)
                tensors = [*layer.parameters(), *layer.buffers()]
                total += sum(t.numel() * t.element_size() for t in tensors if t is not layer.weight)
        return total

    def saved(layer, **call):
        seen = {}

        def remember(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            layer(text_enc, **call)
        for shared in (layer.weight, C.inverse(), text_enc):  # by all layers of a model
            seen.pop(shared.untyped_storage().data_ptr(), None)
        return sum(seen.values())

    text_enc, superclass = torch.randn(BATCH, TOKENS, D, requires_grad=True), torch.randn(BATCH, TOKENS, D)
    call = {"text_enc_with_superclass": superclass, "concept_indices": torch.tensor([3, 5])}
    return {
        "state added to all of SD 1.5's projections, bytes": {str(c): state(c) for c in CONCEPTS},
        "saved for backward by one layer to 1280, bytes": {
            "plain": saved(plain_layer(1280)),
            **{kind: saved(edited_layer(1280, C, kind == "keys", 1), **call) for kind in ("values", "keys")},
        },
        "inverse covariance, once a model, bytes": D * D * 4,
    }


def measure_error():
    """Return the largest error against the float64 oracle, over the largest output, for a short input."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import oracle

    from perfusion_pytorch import InputCovariance

    C, errors = InputCovariance(covariance_matrix(D)), {}
    text_enc, superclass = torch.randn(2, 1, 4, D)
    for kind in ("values", "keys"):
        for concepts in CONCEPTS:
            layer = edited_layer(320, C, kind == "keys", concepts)
            text_enc[0, 1] = layer.concept_input[0, 0]
            for mode in ("inference", "training"):
                call = (superclass, torch.tensor([2])) if mode == "training" else ()
                output = layer.train(mode == "training")(text_enc, *call)
                inputs = layer.concept_input[:, 0]
                outputs = (
                    layer.superclass_input[:, 0].double() @ layer.weight.double().T
                    if layer.is_key_proj
                    else layer.concept_output
                )
                if mode == "inference":
                    gate = layer.eval_beta.tolist(), layer.eval_temperature.tolist()
                    expected = oracle.edit_of_many(text_enc, layer.weight, C.matrix, inputs, outputs, *gate)
                else:  # of concept 0 alone
                    gate = layer.train_beta, layer.train_temperature
                    expected = oracle.edit_of_one(
                        text_enc, layer.weight, C.matrix, inputs[0], outputs[0], *gate
                    )
                error = ((output.double() - expected).abs().max() / expected.abs().max()).item()
                errors[f"{mode}, {kind}, {concepts} concepts"] = error
    return errors


@torch.no_grad()
def measure_lora_fusing():
    """What fusing a LoRA into a wrapped layer changes of its output, relative to the output, at the concept's
    token and at others.

    The LoRA (rank 4) is scaled to a tenth of the plain projection. At the concept's token e = i*; the others
    are random encodings.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from perfusion_pytorch import InputCovariance

    C, changes = InputCovariance(covariance_matrix(D)), {}
    for kind in ("values", "keys"):
        layer = edited_layer(640, C, kind == "keys", 1).eval()
        config = LoraConfig(r=4, target_modules=["to_v"], init_lora_weights=False)
        lora = inject_adapter_in_model(config, nn.ModuleDict({"to_v": layer}))["to_v"].eval()
        text_enc = torch.randn(1, TOKENS, D)
        text_enc[0, 0] = layer.concept_input[0, 0]
        added = (
            text_enc
            @ lora.lora_A["default"].weight.T
            @ lora.lora_B["default"].weight.T
            * lora.scaling["default"]
        )
        lora.lora_B["default"].weight *= (
            0.1 * nn.functional.linear(text_enc, layer.weight).norm() / added.norm()
        )
        unfused = lora(text_enc)
        lora.merge()
        change = (lora(text_enc) - unfused).norm(dim=-1)[0] / unfused.norm(dim=-1)[0]
        changes[kind] = {
            "concept's token": change[0].item(),
            "other tokens, median": change[1:].median().item(),
        }
    return changes


def measure_reference(rounds, seconds):
    """Return the same table for perfusion-pytorch 0.1.23, whose training has only one concept."""
    sys.modules["open_clip"] = types.ModuleType("open_clip")
    sys.modules["open_clip"].tokenizer = types.SimpleNamespace(tokenize=None)
    from perfusion_pytorch import Rank1EditModule, merge_rank1_edit_modules

    C, rows = covariance_matrix_of_reference(), {}

    def trained(plain, is_key_proj):
        layer = Rank1EditModule(plain, C=C, is_key_proj=is_key_proj, text_seq_len=TOKENS)
        text_enc, superclass = torch.randn(2, BATCH, TOKENS, D)
        layer(text_enc, concept_indices=torch.tensor([3, 5]), text_enc_with_superclass=superclass)
        return layer

    for concepts in CONCEPTS:
        for mode in ("inference", "training") if concepts == 1 else ("inference",):
            found = []
            for o in OUT_FEATURES:
                text_enc, superclass = torch.randn(2, BATCH, TOKENS, D)
                plain = plain_layer(o)
                layers = {}
                for kind in ("values", "keys"):
                    parts = [trained(plain, kind == "keys") for _ in range(concepts)]
                    layers[kind] = parts[0] if concepts == 1 else merge_rank1_edit_modules(*parts)
                if mode == "inference":
                    chosen = 0 if concepts == 1 else tuple(range(concepts))
                    contenders = {
                        name: forward(layer.eval(), text_enc, concept_id=chosen)
                        for name, layer in layers.items()
                    }
                    contenders = {"plain": forward(plain, text_enc)} | contenders
                else:
                    call = {"text_enc_with_superclass": superclass, "concept_indices": torch.tensor([3, 5])}
                    contenders = {
                        name: forward_and_backward(layer, text_enc, **call) for name, layer in layers.items()
                    }
                    contenders = {"plain": forward_and_backward(plain, text_enc)} | contenders
                found.append(ratios(contenders, rounds, seconds))
            rows[f"{mode}, {concepts} concepts"] = {
                name: geometric_mean([f[name] for f in found]) for name in found[0]
            }
    return rows


def covariance_matrix_of_reference():
    basis, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    return ((basis * torch.logspace(0, -3, D, dtype=torch.float64)) @ basis.T).float()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference_dir", type=Path, help="folder with perfusion-pytorch 0.1.23")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--seconds", type=float, default=0.02, help="of the plain layer's calls in each round"
    )
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "bench_layer.json")
    parser.add_argument("--only_reference", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.num_threads)
    if args.only_reference:
        print(json.dumps(measure_reference(args.rounds, args.seconds)))
        return
    result = {
        "versions": {name: __import__(name).__version__ for name in ("torch", "diffusers", "peft")}
        | {"python": platform.python_version()},
        "threads": args.num_threads,
        "device": f"cpu, {platform.machine()}",
        "time over the plain layer's": measure_ours(args.rounds, args.seconds),
        "training step of the small UNet over that with plain projections": measure_training_step(
            args.rounds
        ),
        "memory": measure_memory(),
        "error against the oracle": measure_error(),
        "relative change by fusing a LoRA of a tenth of W": measure_lora_fusing(),
    }
    if args.reference_dir is not None:
        command = [
            sys.executable,
            __file__,
            "--only_reference",
            "--rounds",
            str(args.rounds),
            "--seconds",
            str(args.seconds),
        ]
        command += ["--num_threads", str(args.num_threads)]
        environment = os.environ | {"PYTHONPATH": str(args.reference_dir)}
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        result["perfusion-pytorch 0.1.23, time over the plain layer's"] = json.loads(done.stdout)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
